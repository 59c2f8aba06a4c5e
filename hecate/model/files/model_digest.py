"""A digest of a base model's files, by which a checkpoint recognizes its base model wherever the model's folder has been moved."""

from __future__ import annotations

import os

import xxhash

from hecate.errors import UserError
from hecate.io.plain_files import open_plain, read_plain
from hecate.model.files.load import ModelSource
from hecate.model.files.safetensors_headers import weight_files

_BLOCK_BYTES = 1 << 16
_BLOCKS = 32


def model_digest(source: ModelSource) -> str:
    """Return 32 hex digits that are the same for a copy of a model's files in another place, and others for another model.

    Of each file of weights the size and 32 blocks of 64 KiB are read, evenly spread, so that a large model costs nothing. Another training
    of the same architecture changes nearly all weights, and so nearly all blocks. The tokenizer is left out: training compares the
    tokenized samples (`hecate.data.stream`).

    Raises:
        UserError: a file cannot be read.
    """
    digest = xxhash.xxh3_128()
    try:
        if source.gguf_file is None:
            digest.update(read_plain(source.folder / "config.json"))
        for file in weight_files(source.folder) if source.gguf_file is None else [source.folder / source.gguf_file]:
            with open_plain(file) as opened:
                size = os.fstat(opened.fileno()).st_size
                digest.update(size.to_bytes(8, "little"))
                for start in sorted({number * max(0, size - _BLOCK_BYTES) // (_BLOCKS - 1) for number in range(_BLOCKS)}):
                    opened.seek(start)
                    digest.update(opened.read(_BLOCK_BYTES))
    except OSError as error:
        raise UserError(f"{source.folder}: the base model cannot be read: {error.strerror or error} ({error.filename})") from error
    return digest.hexdigest()
