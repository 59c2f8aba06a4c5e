"""Make a differentiable operator for torch.compile of a kernel family's two passes, which are functions of records.

The schemas of the operators are read off the records, and their fake versions are the passes themselves with all launches left out. So no
signature is written anywhere, and a result that is declared cannot differ from one that is computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import GenericAlias
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from hecate.kernels.common.kernel_launch import recorded
from hecate.kernels.common.operands import Form, Operands, flattened, leaf_types, put_together, take_apart, unflattened


class DifferentiableOperator:
    """An operator whose backward pass is another one. Calls go through torch.library under torch.compile only, which needs that.

    torch.library takes the host a third of a millisecond for both passes, as long as all else that a layer's experts do on the host.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[Any, Any], tuple[Tensor, Any]],
        backward: Callable[[Tensor, Any, Any], list[Tensor]],
        gradients: Callable[[Any, list[Tensor]], Mapping[str, Any]],
    ) -> None:
        """Args:
        forward: (call, once) -> (y, kept), annotated with three classes of records: what both passes take, what the forward pass alone
            takes, and tensors for the backward pass. None of the results may share memory with another or with an argument.
        backward: (gradient of y, call, kept) -> tensors that `gradients` takes; the same holds of them.
        gradients: (call, those tensors) -> the gradients of the call's leaves, by their names in `leaf_types`. What has none is left out.
        """
        hints = get_type_hints(forward)
        kept = get_args(hints.pop("return"))[1]
        call, once = hints.values()
        self._call, self._kept, self._num_kept = call, kept, len(leaf_types(kept))
        self._forward, self._backward, self._gradients = forward, backward, gradients
        results = GenericAlias(tuple, (Tensor,) * (1 + self._num_kept))
        self.library = _library_operator(name, {**leaf_types(call), **leaf_types(once)}, results, self._flat_forward(once))
        backward_types = {"dy": Tensor, **leaf_types(kept), **leaf_types(call)}
        self._library_backward = _library_operator(f"{name}_backward", backward_types, list[Tensor], self._flat_backward)
        self.library.register_autograd(self._library_gradients, setup_context=self._library_keep)

    def __call__(self, call: Operands, once: Operands) -> Tensor:
        leaves = flattened(call)
        if torch.compiler.is_compiling():
            return self.library(*leaves, *flattened(once))[0]
        tensors, form = take_apart(leaves)
        return _Direct.apply(self, call, once, form, *tensors)

    def run(self, ctx: Any, call: Operands, once: Operands, form: Form, tensors: Sequence[Tensor]) -> Tensor:
        """The forward pass without torch.library, of a call whose leaves have been taken apart."""
        y, kept = self._forward(call, once)
        self._keep(ctx, flattened(kept), tensors, form)
        return y

    def gradients(self, ctx: Any, dy: Tensor | None) -> list[Tensor | None]:
        """The backward pass without torch.library: the gradients of the tensors that `run` was given."""
        call, kept = self._of_context(ctx)
        found = {} if dy is None else self._gradients(call, self._backward(dy, call, kept))
        gradients: list[Tensor | None] = []
        for (kind, size), name in zip(ctx.form, leaf_types(self._call), strict=True):
            if kind != "value":
                gradients += [found.get(name)] if kind == "tensor" else found.get(name) or [None] * size
        return gradients

    def _keep(self, ctx: Any, kept: Sequence[Tensor], tensors: Sequence[Tensor], form: Form) -> None:
        # Without this, autograd would fill in zeros for the gradients of outputs that are only kept.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *tensors)
        ctx.form = form

    def _of_context(self, ctx: Any) -> tuple[Any, Any]:
        """The call and what was kept of its forward pass."""
        kept, tensors = ctx.saved_tensors[: self._num_kept], ctx.saved_tensors[self._num_kept :]
        return unflattened(self._call, iter(put_together(tensors, ctx.form))), unflattened(self._kept, iter(kept))

    def _flat_forward(self, once: type[Operands]) -> Callable[..., tuple[Tensor, ...]]:
        def forward(*leaves: Any) -> tuple[Tensor, ...]:
            rest = iter(leaves)
            y, kept = self._forward(unflattened(self._call, rest), unflattened(once, rest))
            return y, *flattened(kept)

        return forward

    def _flat_backward(self, dy: Tensor, *leaves: Any) -> list[Tensor]:
        rest = iter(leaves)
        kept = unflattened(self._kept, rest)
        return self._backward(dy, unflattened(self._call, rest), kept)

    def _library_keep(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *kept = output
        ctx.mark_non_differentiable(*kept)  # they are for the backward pass alone; nothing may be derived from them
        count = len(leaf_types(self._call))
        # The gradient of an argument that is a list is a list.
        ctx.none_of_once = [[None] * len(leaf) if isinstance(leaf, list | tuple) else None for leaf in inputs[count:]]
        self._keep(ctx, kept, *take_apart(inputs[:count]))

    def _library_gradients(self, ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        call, kept = self._of_context(ctx)
        found: Mapping[str, Any] = {}
        if dy is not None:
            found = self._gradients(call, self._library_backward(dy, *flattened(kept), *flattened(call)))
        of_call = (
            found.get(name) or [None] * size if kind == "tensors" else found.get(name)
            for (kind, size), name in zip(ctx.form, leaf_types(self._call), strict=True)
        )
        return *of_call, *ctx.none_of_once


class _Direct(torch.autograd.Function):
    """Its tensors are those of the call, for autograd to see."""

    @staticmethod
    def forward(ctx: Any, operator: DifferentiableOperator, call: Operands, once: Operands, form: Form, *tensors: Tensor) -> Tensor:
        ctx.operator = operator
        return operator.run(ctx, call, once, form, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *ctx.operator.gradients(ctx, grads[0])


def _library_operator(name: str, types: Mapping[str, Any], result: Any, function: Callable[..., Any]) -> Any:
    """Return what torch.library makes of a function of these arguments."""

    def run(*leaves: Any) -> Any:
        return function(*leaves)

    def fake(*leaves: Any) -> Any:
        with recorded():  # allocates the results, launches nothing: so shapes and strides cannot differ from what is computed
            return function(*leaves)

    # torch infers an operator's schema from its function's signature.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    arguments = [inspect.Parameter(leaf.replace(".", "_"), kind, annotation=type_) for leaf, type_ in types.items()]
    run.__signature__ = inspect.Signature(arguments, return_annotation=result)  # type: ignore[attr-defined]
    operator = torch.library.custom_op(f"hecate::{name}", run, mutates_args=())
    operator.register_fake(fake)
    return operator
