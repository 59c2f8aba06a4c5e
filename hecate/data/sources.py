"""Open one data source of a run: text, which is tokenized, or an indexed data set, which holds token ids already."""

from pathlib import Path
from typing import Any

from hecate.config import DataSource
from hecate.config.files.paths import indexed_prefix
from hecate.data.encode import STOP_AT_BAD_SAMPLES, BadSamples, EncodedSource, encode_source
from hecate.data.files.indexed import IndexedSource, encode_indexed
from hecate.data.files.user_features import UserFeatures
from hecate.data.routed_experts import RoutingShape
from hecate.data.token_cache import cached_source

TokenSource = EncodedSource | IndexedSource


def read_source(
    source: DataSource,
    tokenizer: Any,
    *,
    seq_len: int,
    vocab_size: int,
    bad: BadSamples = STOP_AT_BAD_SAMPLES,
    users: UserFeatures | None = None,
    routing: RoutingShape | None = None,
    cache: Path | None = None,
) -> TokenSource:
    """Read and encode one data source, by `encode_indexed` if its path names an indexed data set and by `encode_source` otherwise.

    Arguments and errors are those of the two functions.

    Args:
        cache: a folder in which the tokenized source is kept, or is found (`hecate.data.token_cache`); None: it is kept in memory. An
            indexed data set needs none.
    """
    prefix = indexed_prefix(source.path)
    options: dict[str, Any] = {"seq_len": seq_len, "vocab_size": vocab_size, "bad": bad}
    if prefix is None:
        if cache is not None:
            return cached_source(source, tokenizer, cache, users=users, routing=routing, **options)
        return encode_source(source, tokenizer, users=users, routing=routing, **options)
    assert users is None, "an indexed data set names no users"
    assert routing is None, "an indexed data set brings no routing"
    return encode_indexed(source, prefix, tokenizer, **options)
