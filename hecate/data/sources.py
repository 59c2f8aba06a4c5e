"""Open the data sources of a run: text, which is tokenized, or an indexed data set, which holds token ids already.

A source may give up a share of its samples to evaluation (`data.eval_share`); it then becomes two parts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from hecate.config import DataConfig, DataSource
from hecate.config.files.paths import indexed_prefix
from hecate.data.encode import STOP_AT_BAD_SAMPLES, BadSamples, Encoded, EncodedSource, Samples, encode_source
from hecate.data.files.indexed import IndexedSource, encode_indexed
from hecate.data.files.user_features import UserFeatures
from hecate.data.routed_experts import RoutingShape
from hecate.data.token_cache import cached_source
from hecate.errors import UserError


class SourcePart(Samples):
    """Some of the samples of a source, in its order."""

    def __init__(self, whole: EncodedSource | IndexedSource, indices: NDArray[np.int64]) -> None:
        """`indices`: of the samples in the whole source, rising; at least one."""
        assert len(indices) > 0, "a part has samples"
        self.whole = whole
        self.name, self.path, self.weight = whole.name, whole.path, whole.weight
        self.lines = whole.lines[indices]
        self.users = whole.users[indices] if isinstance(whole, EncodedSource) and whole.users is not None else None
        self.starts = np.cumsum(np.append(0, np.diff(whole.starts)[indices]), dtype=np.int64)
        self._indices = indices

    def sample(self, index: int) -> Encoded:
        return self.whole.sample(int(self._indices[index]))

    def digest(self) -> str:
        """Return a hash of the whole source and of which samples these are."""
        return xxhash.xxh3_64_hexdigest(self.whole.digest().encode() + self._indices.tobytes())


TokenSource = EncodedSource | IndexedSource | SourcePart


def hold_out(data: DataConfig, sources: Sequence[EncodedSource | IndexedSource]) -> tuple[list[TokenSource], list[SourcePart]]:
    """Return what is left of each source, and what is held out of those in `data.held_out`, in this order: `data.eval_share` of it.

    A sample is held out if the digest of its content is among the lowest: it depends on nothing else, and the share is met on average.

    Raises:
        UserError: nothing would be held out of a source, or nothing left.
    """
    names, share = {source.name for source in data.held_out}, data.eval_share or 0.0
    trained, evaluated = list[TokenSource](), list[SourcePart]()
    for source in sources:
        if source.name not in names:
            trained.append(source)
            continue
        assert source.digests is not None, "read_source gives them"
        held = source.digests < np.uint64(int(share * 2**64))
        if held.all() or not held.any():
            what, other = ("all", "smaller") if held.any() else ("none", "larger")
            raise UserError(
                f"data.eval_share: {share:g} of {source.path} would hold out {what} of its {len(source)} samples, by their contents\n"
                f"  give a {other} share, more samples, or evaluation data in data.eval under the name {source.name}"
            )
        trained.append(SourcePart(source, np.flatnonzero(~held)))
        evaluated.append(SourcePart(source, np.flatnonzero(held)))
    return trained, evaluated


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
) -> EncodedSource | IndexedSource:
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
