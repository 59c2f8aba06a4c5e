"""How records become the arguments of a `torch.library` operator and are put together again inside it.

An operator takes tensors, lists of tensors, numbers and strings, in one flat list. Both kinds of low-rank experts pack their pairs and
their dropout in the same way, and all operators keep tensors for their backward pass in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hecate.kernels.common.dropout import FfnDropout, RowDropout
from hecate.kernels.common.ffn import PROJECTIONS
from hecate.kernels.common.low_rank import LowRankPairs


def pack_pairs(pairs: dict[str, LowRankPairs], dropout: FfnDropout | None) -> tuple[list[Tensor], str, list[float]]:
    """A and B of each projection that has a pair, in the order of `PROJECTIONS`; the names; the scales, dropout's included."""
    grow = 1.0 if dropout is None else dropout.scale
    names = [name for name in PROJECTIONS if name in pairs]
    matrices = [matrix for name in names for matrix in (pairs[name].a_SrI, pairs[name].b_SOr)]
    return matrices, " ".join(names), [pairs[name].scale * grow for name in names]


def unpack_pairs(matrices: Sequence[Tensor], projections: str, scales: Sequence[float]) -> dict[str, LowRankPairs]:
    """What `pack_pairs` took apart, or gradients in the same order; scales have dropout's in them."""
    each = zip(projections.split(), matrices[0::2], matrices[1::2], scales, strict=True)
    return {name: LowRankPairs(a, b, scale) for name, a, b, scale in each}


def pack_dropout(dropout: FfnDropout | None) -> tuple[list[Tensor], int]:
    """The words of both inputs' rows, none without dropout, and how many levels are dropped."""
    return ([], 0) if dropout is None else ([dropout.gate_up.word_R, dropout.down.word_R], dropout.down.dropped_levels)


def unpack_dropout(words: Sequence[Tensor], dropped_levels: int) -> FfnDropout | None:
    """What `pack_dropout` took apart."""
    if not words:
        return None
    gate_up, down = words
    return FfnDropout(RowDropout(gate_up, dropped_levels), RowDropout(down, dropped_levels))


def keep_for_backward(ctx: Any, values: Sequence[Any]) -> None:
    """Keep tensors, lists of tensors and other values for `kept_for_backward`."""
    # Without this, a missing gradient of what is only kept would be made up of zeros.
    ctx.set_materialize_grads(False)
    flat: list[Tensor] = []
    ctx.kept = []
    for value in values:
        tensors = [value] if isinstance(value, Tensor) else list(value) if _is_tensors(value) else None
        # How many tensors, or None and the value itself.
        ctx.kept.append((isinstance(value, Tensor), None, value) if tensors is None else (isinstance(value, Tensor), len(tensors), None))
        flat += tensors or []
    ctx.save_for_backward(*flat)


def kept_for_backward(ctx: Any) -> list[Any]:
    """The values that `keep_for_backward` was given."""
    tensors = iter(ctx.saved_tensors)
    values: list[Any] = []
    for single, number, value in ctx.kept:
        several = None if number is None else [next(tensors) for _ in range(number)]
        values.append(value if several is None else several[0] if single else several)
    return values


def _is_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, Tensor) for each in value)
