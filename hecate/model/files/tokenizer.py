"""The tokenizer of a model that has none of its own yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hecate.config import Config
from hecate.errors import UserError
from hecate.model.files.gguf_files import one_gguf_reader
from hecate.model.files.load import ModelSource, load_tokenizer, resolve_model


def tokenizer_of(config: Config) -> Any:
    """`model.tokenizer`: a folder with a tokenizer's files, or whatever `model.name_or_path` may be elsewhere.

    Raises:
        UserError: there is none, or it is a slow one.
    """
    name = config.model.tokenizer
    assert name is not None
    source = ModelSource(Path(name), None) if Path(name).is_dir() else resolve_model(name)
    with one_gguf_reader(source.gguf_file):
        return load_tokenizer(source)


def vocabulary_of(config: Config, tokenizer: Any) -> int:
    """Rows of the model's embedding. Raises UserError: they cannot be shared out equally."""
    size, parts = len(tokenizer), config.model.tensor_parallel
    if size % parts:
        divisors = ", ".join(str(number) for number in range(1, min(size, 64) + 1) if size % number == 0)
        raise UserError(
            f"model.tensor_parallel: must divide the {size} tokens of the vocabulary, got {parts}\n"
            f"  give one of {divisors}, or add tokens to the tokenizer"
        )
    return size
