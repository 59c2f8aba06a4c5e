"""Convert records to the arguments of a `torch.library` operator and back.

An operator takes tensors, lists of tensors, numbers and strings, in one flat list. Both kinds of low-rank experts pack their pairs in
the same way, and all operators keep tensors for their backward pass in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hecate.kernels.common.dropout import Dropout
from hecate.kernels.common.ffn import PROJECTIONS
from hecate.kernels.common.low_rank import LowRankPairs


def pack_pairs(pairs: dict[str, LowRankPairs], dropout: Dropout | None) -> tuple[list[Tensor], str, list[float], list[float]]:
    """Return the A and B of each projection with a pair, in the order of `PROJECTIONS`, their names, scales times dropout's, and etas.

    An eta of 0 stands for none.
    """
    grow = 1.0 if dropout is None else dropout.scale
    names = [name for name in PROJECTIONS if name in pairs]
    matrices = [matrix for name in names for matrix in (pairs[name].a_SrI, pairs[name].b_SOr)]
    return matrices, " ".join(names), [pairs[name].scale * grow for name in names], [pairs[name].eta or 0.0 for name in names]


def unpack_pairs(matrices: Sequence[Tensor], projections: str, scales: Sequence[float], etas: Sequence[float]) -> dict[str, LowRankPairs]:
    """Return the pairs that `pack_pairs` has packed, or gradients in the same order. The scales include dropout's."""
    each = zip(projections.split(), matrices[0::2], matrices[1::2], scales, etas, strict=True)
    return {name: LowRankPairs(a, b, scale, eta or None) for name, a, b, scale, eta in each}


def gradients_of_pairs(gradients: Sequence[Tensor], *, of_a: bool) -> list[Tensor | None]:
    """Return an operator's gradients of A and B in the order of `pack_pairs`. Without those of A, which is then fixed, they are None."""
    return list(gradients) if of_a else [each for of_b in gradients for each in (None, of_b)]


def keep_for_backward(ctx: Any, values: Sequence[Any]) -> None:
    """Keep tensors, lists of tensors and other values for `kept_for_backward`."""
    # Without this, autograd would fill in zeros for the gradients of outputs that are only kept.
    ctx.set_materialize_grads(False)
    tensors: list[Tensor] = []
    ctx.kept = []
    for value in values:
        if isinstance(value, Tensor):
            ctx.kept.append(("tensor", None))
            tensors.append(value)
        elif _is_tensors(value):
            ctx.kept.append(("tensors", len(value)))
            tensors += value
        else:
            ctx.kept.append(("value", value))
    ctx.save_for_backward(*tensors)


def kept_for_backward(ctx: Any) -> list[Any]:
    """Return the values that were passed to `keep_for_backward`."""
    tensors = iter(ctx.saved_tensors)
    values: list[Any] = []
    for kind, value in ctx.kept:
        if kind == "value":
            values.append(value)
        else:
            values.append(next(tensors) if kind == "tensor" else [next(tensors) for _ in range(value)])
    return values


def _is_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, Tensor) for each in value)
