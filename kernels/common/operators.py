"""Convert records to the arguments of a `torch.library` operator and back.

An operator takes tensors, lists of tensors, numbers and strings, in one flat list. Both kinds of low-rank experts pack their pairs in
the same way, and all operators keep tensors for their backward pass in the same way.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hecate.kernels.common.dropout import Dropout
from hecate.kernels.common.ffn import PROJECTIONS
from hecate.kernels.common.low_rank import LowRankPairs


def pack_pairs(pairs: dict[str, LowRankPairs], dropout: Dropout | None) -> tuple[list[Tensor], str, list[float], list[float], bool]:
    """Return the A and B of each projection with a pair, in the order of `PROJECTIONS`, their names, scales times dropout's, and etas.

    An eta of 0 stands for none. The last value is whether A trains: not where B alone requires a gradient.
    """
    grow = 1.0 if dropout is None else dropout.scale
    names = [name for name in PROJECTIONS if name in pairs]
    matrices = [matrix for name in names for matrix in (pairs[name].a_SrI, pairs[name].b_SOr)]
    scales, etas = [pairs[name].scale * grow for name in names], [pairs[name].eta or 0.0 for name in names]
    of_a, of_b = (any(matrix.requires_grad for matrix in matrices[first::2]) for first in (0, 1))
    return matrices, " ".join(names), scales, etas, of_a or not of_b


def unpack_pairs(matrices: Sequence[Tensor], projections: str, scales: Sequence[float], etas: Sequence[float]) -> dict[str, LowRankPairs]:
    """Return the pairs that `pack_pairs` has packed, or gradients in the same order. The scales include dropout's."""
    each = zip(projections.split(), matrices[0::2], matrices[1::2], scales, etas, strict=True)
    return {name: LowRankPairs(a, b, scale, eta or None) for name, a, b, scale, eta in each}


def gradients_of_pairs(gradients: Sequence[Tensor], *, of_a: bool) -> list[Tensor | None]:
    """Return an operator's gradients of A and B in the order of `pack_pairs`. Without those of A, which is then fixed, they are None."""
    return list(gradients) if of_a else [each for of_b in gradients for each in (None, of_b)]


def split_like(all_NC: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return views of the columns, which hold matrices side by side: [N, ...] with the sizes of each of `matrices` but its first."""
    shapes = [matrix.shape[1:] for matrix in matrices]
    columns = all_NC.split_with_sizes([math.prod(shape) for shape in shapes], dim=1)
    return [each.view(all_NC.shape[0], *shape) for each, shape in zip(columns, shapes, strict=True)]


Form = list[tuple[str, Any]]
"""what `take_apart` has found in place of each value"""


def take_apart(values: Sequence[Any]) -> tuple[list[Tensor], Form]:
    """Return the tensors among the values and in their lists, and what `put_together` needs besides."""
    tensors: list[Tensor] = []
    form: Form = []
    for value in values:
        if isinstance(value, Tensor):
            form.append(("tensor", None))
            tensors.append(value)
        elif _is_tensors(value):
            form.append(("tensors", len(value)))
            tensors += value
        else:
            form.append(("value", value))
    return tensors, form


def put_together(tensors: Iterable[Tensor], form: Form) -> list[Any]:
    """Return the values that `take_apart` was given."""
    rest = iter(tensors)
    values: list[Any] = []
    for kind, value in form:
        if kind == "value":
            values.append(value)
        else:
            values.append(next(rest) if kind == "tensor" else list(itertools.islice(rest, value)))
    return values


def keep_for_backward(ctx: Any, values: Sequence[Any]) -> None:
    """Keep tensors, lists of tensors and other values for `kept_for_backward`."""
    # Without this, autograd would fill in zeros for the gradients of outputs that are only kept.
    ctx.set_materialize_grads(False)
    tensors, ctx.kept = take_apart(values)
    ctx.save_for_backward(*tensors)


def kept_for_backward(ctx: Any) -> list[Any]:
    """Return the values that were passed to `keep_for_backward`."""
    return put_together(ctx.saved_tensors, ctx.kept)


class Operator(NamedTuple):
    library: Any
    """what `torch.library.custom_op` has made of the function"""
    function: Callable[..., Any]


class DifferentiableOperator:
    """An operator whose backward pass is another one. Calls go through torch.library under torch.compile only, which needs that.

    torch.library takes the host a third of a millisecond for both passes, as long as all else that a layer's experts do on the host.

    Args:
        setup_context: as `register_autograd` takes it.
        gradients: (backward operator, ctx, *gradients of the results) -> gradients of the arguments.
    """

    def __init__(self, forward: Operator, backward: Operator, setup_context: Callable[..., None], gradients: Callable[..., Any]) -> None:
        forward.library.register_autograd(functools.partial(gradients, backward.library), setup_context=setup_context)
        self._forward, self._setup_context = forward, setup_context
        self._gradients = functools.partial(gradients, backward.function)

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():
            return self._forward.library(*arguments)
        tensors, form = take_apart(arguments)
        return _Direct.apply(self, form, *tensors)

    def run(self, ctx: Any, form: Form, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The forward pass, without torch.library."""
        arguments = put_together(tensors, form)
        results = self._forward.function(*arguments)
        self._setup_context(ctx, tuple(arguments), results)
        return results

    def gradients(self, ctx: Any, form: Form, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The backward pass without torch.library: the gradients of the tensors that `run` was given."""
        found: list[Tensor | None] = []
        for (kind, _), gradient in zip(form, self._gradients(ctx, *grads), strict=True):
            if kind != "value":
                found += [gradient] if kind == "tensor" else gradient
        return found


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: DifferentiableOperator, form: Form, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.operator, ctx.form = operator, form
        return operator.run(ctx, form, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.operator.gradients(ctx, ctx.form, grads)


def _is_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, Tensor) for each in value)
