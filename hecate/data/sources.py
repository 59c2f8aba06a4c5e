"""What a run reads: text that is tokenized as it is read, or token ids."""

from pathlib import Path
from typing import Any

from hecate.config import DataSource
from hecate.config.paths import indexed_prefix
from hecate.data.encode import EncodedSource, encode_source
from hecate.data.indexed import IndexedSource, encode_indexed

TokenSource = EncodedSource | IndexedSource


def read_source(
    source: DataSource,
    tokenizer: Any,
    *,
    seq_len: int,
    vocab_size: int,
    on_bad_sample: str = "error",
    quarantine: str | Path | None = None,
) -> TokenSource:
    """`encode_source`, or `encode_indexed` where the path means an indexed data set."""
    prefix = indexed_prefix(source.path)
    options: dict[str, Any] = {
        "seq_len": seq_len,
        "vocab_size": vocab_size,
        "on_bad_sample": on_bad_sample,
        "quarantine": quarantine,
    }
    return encode_source(source, tokenizer, **options) if prefix is None else encode_indexed(source, prefix, tokenizer, **options)
