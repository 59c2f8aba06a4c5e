"""A sequence is one line of a batch: one or more whole samples laid end to end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hecate.data.pack import Piece
from hecate.data.sources import TokenSource


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """The n <= seq_len tokens of whole samples, without padding; `collate` adds the padding."""

    number: int  # the sequence's number in the whole run, from 0, the same at every world size; -1 for an empty sequence
    input_ids: NDArray[np.int64]  # [n]
    targets: NDArray[np.int64]  # [n], the token that each position is to predict; -100: none
    position_ids: NDArray[np.int64]  # [n], the position within the sample, from 0
    segment_ids: NDArray[np.int64]  # [n], the sample's number within the sequence, from 1
    task: NDArray[np.int64]  # [n], the index of the sample's source
    samples: tuple[tuple[int, int], ...]  # the (source index, sample index) of each segment
    user: NDArray[np.int64] | None = None  # [n], the row of the sample's user in the features; None: nothing depends on users
    routed: NDArray[np.int16] | None = None  # [n, MoE layers, top_k], see `Encoded.routed`; None: nothing depends on them


def piece_of(sources: Sequence[TokenSource], source: int, sample: int) -> Piece:
    """Return what the packer needs of a sample: its indices and its length in tokens."""
    starts = sources[source].starts
    return Piece(source, sample, int(starts[sample + 1] - starts[sample]))


def build_sequence(number: int, pieces: Sequence[Piece], sources: Sequence[TokenSource]) -> PackedSequence:
    """Fetch the tokens of `pieces` and lay them end to end. Without pieces the sequence is empty."""
    parts = [sources[piece.source][piece.sample] for piece in pieces]
    lengths = np.array([len(part.input_ids) for part in parts], dtype=np.int64)
    nothing = np.zeros(0, dtype=np.int64)
    routed = [part.routed for part in parts if part.routed is not None]
    return PackedSequence(
        number=number,
        input_ids=np.concatenate([nothing, *(part.input_ids for part in parts)]),
        targets=np.concatenate([nothing, *(part.targets for part in parts)]),
        position_ids=np.concatenate([nothing, *(np.arange(length) for length in lengths)]),
        segment_ids=np.repeat(np.arange(1, len(parts) + 1), lengths),
        task=np.repeat(np.array([piece.source for piece in pieces], dtype=np.int64), lengths),
        samples=tuple((piece.source, piece.sample) for piece in pieces),
        user=np.repeat(np.array([part.user for part in parts]), lengths) if any(part.user >= 0 for part in parts) else None,
        routed=np.concatenate(routed) if routed else None,
    )


def empty_sequence() -> PackedSequence:
    """Return a sequence without tokens, for a rank that has none left while other ranks still have one."""
    return build_sequence(-1, (), ())
