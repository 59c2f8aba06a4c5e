"""A sequence: the samples that share one line of a batch, laid end to end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hecate.data.pack import Piece
from hecate.data.sources import TokenSource


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """n <= seq_len tokens of whole samples; padding comes with the batch."""

    number: int  # counts the sequences of the whole run, whatever the number of ranks; -1: an empty sequence
    input_ids: NDArray[np.int64]  # [n]
    targets: NDArray[np.int64]  # [n]
    position_ids: NDArray[np.int64]  # [n], from 0 in each sample
    segment_ids: NDArray[np.int64]  # [n], from 1, one a sample
    task: NDArray[np.int64]  # [n], index of the source
    samples: tuple[tuple[int, int], ...]  # (source, sample) of each segment


def piece_of(sources: Sequence[TokenSource], source: int, sample: int) -> Piece:
    """The sample as the packer sees it."""
    starts = sources[source].starts
    return Piece(source, sample, int(starts[sample + 1] - starts[sample]))


def build_sequence(number: int, pieces: Sequence[Piece], sources: Sequence[TokenSource]) -> PackedSequence:
    """Fetch the tokens of `pieces`; no pieces make an empty sequence."""
    parts = [sources[piece.source][piece.sample] for piece in pieces]
    lengths = np.array([len(part.input_ids) for part in parts], dtype=np.int64)
    nothing = np.zeros(0, dtype=np.int64)
    return PackedSequence(
        number=number,
        input_ids=np.concatenate([nothing, *(part.input_ids for part in parts)]),
        targets=np.concatenate([nothing, *(part.targets for part in parts)]),
        position_ids=np.concatenate([nothing, *(np.arange(length) for length in lengths)]),
        segment_ids=np.repeat(np.arange(1, len(parts) + 1), lengths),
        task=np.repeat(np.array([piece.source for piece in pieces], dtype=np.int64), lengths),
        samples=tuple((piece.source, piece.sample) for piece in pieces),
    )


def empty_sequence() -> PackedSequence:
    """All padding: for a rank that has no sequence left where others have one."""
    return build_sequence(-1, (), ())
