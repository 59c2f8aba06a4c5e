"""The tokenizer of a model that has none of its own yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hecate.config import Config
from hecate.model.load import ModelSource, load_tokenizer, one_gguf_reader, resolve_model


def tokenizer_of(config: Config) -> Any:
    """`model.tokenizer`: a folder with a tokenizer's files, or whatever `model.name_or_path` may be elsewhere.

    Raises:
        UserError: there is none, or it is a slow one.
    """
    name = config.model.tokenizer
    assert name is not None
    source = ModelSource(Path(name), None) if Path(name).is_dir() else resolve_model(name)
    with one_gguf_reader():
        return load_tokenizer(source)
