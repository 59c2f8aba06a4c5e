"""Read a GGUF file once, where transformers reads it for the configuration, for the weights and for the tokenizer; or its first entry."""

from __future__ import annotations

import copy
import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from hecate.errors import UserError
from hecate.io.plain_files import open_plain

_MAGIC, _TEXT = b"GGUF", 8
_LONGEST_NAME = 1 << 10


def refuse_unknown_architecture(path: Path) -> None:
    """Refuse a file whose model transformers cannot build, by the first entry of its header; the whole header takes seconds.

    A file that begins otherwise is not judged: reading it will say what is wrong.

    Raises:
        UserError: its architecture is none that transformers knows.
    """
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    name = _architecture(path)
    if name is not None and _plain(name) not in map(_plain, GGUF_SUPPORTED_ARCHITECTURES):
        raise UserError(
            f"{path}: its architecture is {name[:80]!r}, which transformers cannot read from a GGUF file\n"
            "  give the folder of the model's safetensors instead"
        )


def _architecture(path: Path) -> str | None:
    try:
        with open_plain(path) as file:
            magic, _, _, _ = struct.unpack("<4sIQQ", file.read(24))  # version, number of tensors, number of entries
            if magic == _MAGIC and _text(file) == "general.architecture" and struct.unpack("<I", file.read(4)) == (_TEXT,):
                return _text(file)
    except (OSError, struct.error, UnicodeDecodeError):
        pass
    return None


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(min(length, _LONGEST_NAME)).decode()


def _plain(name: str) -> str:
    """transformers writes qwen3_moe where the files have qwen3moe, and gpt_oss for gpt-oss."""
    return name.replace("_", "").replace("-", "")


@contextmanager
def one_gguf_reader(gguf_file: str | None) -> Iterator[None]:
    """Let what transformers does with GGUF files take a third of the time within the block, and print no bar.

    - The header is parsed once, out of an ordinary array: numpy's arrays over mapped files take a microsecond more for each of its million
      slices. The file is mapped all the same.
    - What the header says of configuration and tokenizer is kept, and each caller gets a copy.
    - The table of tensor names of an architecture is made once; transformers asks for it for each module of the model.
    - transformers' setting for bars (`disable_progress_bar`), which its reader of these files does not ask, holds for that one, too.

    Args:
        gguf_file: its name. None: nothing is changed, since importing transformers' reader would take a quarter of a second.
    """
    if gguf_file is None:
        yield
        return
    try:
        import gguf
        from transformers import modeling_gguf_pytorch_utils as reading
        from transformers.utils import logging
    except ImportError:  # transformers will say what to install if it is needed
        yield
        return
    of_reading = ((reading, "load_gguf_checkpoint"), (reading, "tqdm"))
    places: tuple[tuple[Any, str], ...] = ((gguf, "GGUFReader"), (gguf, "get_tensor_name_map"), *of_reading)
    originals = [getattr(owner, name) for owner, name in places]
    reader, name_map, load, _ = originals
    within = (_once_from_arrays(reader), functools.cache(name_map), _header_once(load), logging.tqdm)
    for (owner, name), other in zip(places, within, strict=True):
        setattr(owner, name, other)
    try:
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def _once_from_arrays(reader: Any) -> Any:
    import numpy as np

    class ArrayReader(reader):
        @property
        def data(self) -> Any:
            return self._array

        @data.setter
        def data(self, mapped: Any) -> None:
            self._array = mapped.view(np.ndarray)

    return functools.cache(ArrayReader)


def _header_once(load: Any) -> Any:
    """`load_gguf_checkpoint` of transformers, which keeps what it has found without tensors."""
    header = functools.cache(lambda path: load(path, return_tensors=False))

    def loaded(path: Any, return_tensors: bool = False, **more: Any) -> Any:
        return load(path, return_tensors=True, **more) if return_tensors else copy.deepcopy(header(path))

    return loaded
