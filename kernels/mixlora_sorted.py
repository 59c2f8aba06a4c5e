"""The MixLoRA feed-forward over a shared frozen base in Triton, copy-sorted, as operators that autograd and torch.compile know.

The six large GEMMs have T rows and are torch's; between them lie the passes of `hecate.kernels.passes`. The backward pass computes
everything of a pair again from G = x Wg', U = x Wu' and its shrunk inputs. Nothing here waits for the device.

Shapes: T tokens, D hidden, F ffn hidden, K choices, P = T·K pairs, S slots, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hecate.kernels import passes
from hecate.kernels.combine import combine
from hecate.kernels.dropout import Dropout
from hecate.kernels.mixlora_inputs import PROJECTIONS, FfnBase, Lora, dropout_rows
from hecate.kernels.mixlora_launches import Adapter, Keep, config_for
from hecate.kernels.pair_blocks import PairBlocks, pair_blocks
from hecate.kernels.pair_order import pair_order


def mixlora_ffn_sorted(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    base: FfnBase,
    loras: dict[str, Lora],
    *,
    dropout: Dropout | None = None,
    token_T: Tensor | None = None,
    expert_S: Tensor | None = None,
) -> Tensor:
    """As `hecate.kernels.mixlora.mixlora_ffn`, on CUDA tensors, or on the CPU under TRITON_INTERPRET=1; not in float64.

    Ranks are 1 to 256 and may differ by projection. Slots whose ranks differ share matrices of the largest, the rest zeros: such rows of A
    and columns of B stay zero, since the gradient of either is a product with the other.
    """
    y_TD, *_ = mixlora_forward(
        *forward_arguments(x_TD, slot_TK, weight_TK, base, loras, dropout=dropout, token_T=token_T, expert_S=expert_S)
    )
    return y_TD


def forward_arguments(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    base: FfnBase,
    loras: dict[str, Lora],
    *,
    dropout: Dropout | None = None,
    token_T: Tensor | None = None,
    expert_S: Tensor | None = None,
) -> tuple[Any, ...]:
    """What the forward operator is given: pairs sorted, maps made, dropout's rows hashed."""
    assert len(loras) > 0, "a MixLoRA layer without adapters is its base FFN"
    assert x_TD.dtype.itemsize <= 4, x_TD.dtype
    num_slots = next(iter(loras.values())).a_SrI.shape[0]
    rank = max(lora.a_SrI.shape[1] for lora in loras.values())
    assert rank <= 256, "the kernels take ranks to 256"
    order, config = pair_order(slot_TK, num_slots), config_for("mixlora_rows", rank, x_TD).blocks
    blocks = pair_blocks(order, config["ROWS"], config["CHUNK_ROWS"])
    rows, grow, levels = None, 1.0, 0
    if dropout is not None:
        rows = dropout_rows(dropout, order.order_P, slot_TK, token_T, expert_S)
        grow, levels = dropout.scale, dropout.dropped_levels
    matrices = [m for name in PROJECTIONS for m in ((loras[name].a_SrI, loras[name].b_SOr) if name in loras else (None, None))]
    return (
        x_TD.contiguous(),
        weight_TK.contiguous(),
        base.gate_FD,
        base.up_FD,
        base.down_DF,
        *matrices,
        [loras[name].scale * grow if name in loras else 0.0 for name in PROJECTIONS],
        base.activation,
        list(blocks.tensors()),
        blocks.rows,
        None if rows is None else rows["in"],
        None if rows is None else rows["down"],
        levels,
    )


@dataclass(frozen=True)
class _Pairs:
    """Matrices of the adapters; None for a projection without one."""

    a_gate: Tensor | None
    b_gate: Tensor | None
    a_up: Tensor | None
    b_up: Tensor | None
    a_down: Tensor | None
    b_down: Tensor | None
    scales: Sequence[float]

    @property
    def inputs(self) -> list[tuple[Tensor, Tensor, float]]:
        """A, B and scale of those of gate and up that have an adapter."""
        each = zip((self.a_gate, self.a_up), (self.b_gate, self.b_up), self.scales[:2], strict=True)
        return [(a, b, scale) for a, b, scale in each if a is not None and b is not None]

    def adapters(self, low_gate: Tensor, low_up: Tensor) -> tuple[Adapter | None, Adapter | None]:
        """What expands the shrunk inputs of gate and up."""
        return (
            None if self.b_gate is None else Adapter(low_gate, self.b_gate),
            None if self.b_up is None else Adapter(low_up, self.b_up),
        )


def forward_passes(
    x_TD: Tensor,
    weight_TK: Tensor,
    gate_FD: Tensor,
    up_FD: Tensor,
    down_DF: Tensor,
    a_gate: Tensor | None,
    b_gate: Tensor | None,
    a_up: Tensor | None,
    b_up: Tensor | None,
    a_down: Tensor | None,
    b_down: Tensor | None,
    scales: Sequence[float],
    activation: str,
    order: Sequence[Tensor],
    rows: int,
    keep_in_P: Tensor | None,
    keep_down_P: Tensor | None,
    dropped_levels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [T, D], and what the backward pass needs: G and U [T, F], the shrunk inputs of gate, up and down [P, R].

    Args:
        scales: of gate, up and down, dropout's included.
        order, rows: of `PairBlocks`.
    """
    blocks, pairs = PairBlocks.of_tensors(rows, tuple(order)), _Pairs(a_gate, b_gate, a_up, b_up, a_down, b_down, scales)
    gate_TF, up_TF = x_TD @ gate_FD.T, x_TD @ up_FD.T
    low_gate, low_up = _shrink_inputs(x_TD, blocks, pairs, _keep(keep_in_P, dropped_levels))
    h_PF, low_down = passes.gated(
        gate_TF,
        up_TF,
        blocks,
        *pairs.adapters(low_gate, low_up),
        None if a_down is None else a_down.transpose(1, 2),
        scales[2],
        _keep(keep_down_P, dropped_levels),
        activation,
    )
    y_TD = combine(h_PF, weight_TK, blocks.order) @ down_DF.T
    if low_down is not None and b_down is not None:
        y_TD = combine(passes.expand((Adapter(low_down, b_down),), blocks, None), weight_TK, blocks.order, y_TD)
    return y_TD, gate_TF, up_TF, low_gate, low_up, _no_rank(x_TD, blocks) if low_down is None else low_down


mixlora_forward = torch.library.custom_op("hecate::mixlora_forward", forward_passes, mutates_args=())


@mixlora_forward.register_fake
def _(x_TD: Tensor, weight_TK: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    a_gate, _, a_up, _, a_down, _, _, _, order, *_ = rest
    num_pairs = order[0].shape[0]
    wide = [x_TD.new_empty((x_TD.shape[0], gate_FD.shape[0])) for _ in range(2)]
    return torch.empty_like(x_TD), *wide, *(x_TD.new_empty((num_pairs, 0 if a is None else a.shape[1])) for a in (a_gate, a_up, a_down))


def backward_passes(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor,
    low_gate: Tensor,
    low_up: Tensor,
    low_down: Tensor,
    gate_FD: Tensor,
    up_FD: Tensor,
    down_DF: Tensor,
    a_gate: Tensor | None,
    b_gate: Tensor | None,
    a_up: Tensor | None,
    b_up: Tensor | None,
    a_down: Tensor | None,
    b_down: Tensor | None,
    scales: Sequence[float],
    activation: str,
    order: Sequence[Tensor],
    rows: int,
    keep_in_P: Tensor | None,
    keep_down_P: Tensor | None,
    dropped_levels: int,
) -> list[Tensor]:
    """Gradients of x and the weights, then of A and B of each projection that has an adapter, in its order."""
    blocks, pairs = PairBlocks.of_tensors(rows, tuple(order)), _Pairs(a_gate, b_gate, a_up, b_up, a_down, b_down, scales)
    keep_in, keep_down = _keep(keep_in_P, dropped_levels), _keep(keep_down_P, dropped_levels)
    pair_dtype = next(m for m in (a_gate, a_up, a_down) if m is not None).dtype
    gate, up = pairs.adapters(low_gate, low_up)
    down, db_down = None, None
    if a_down is not None and b_down is not None:
        (low_dy,) = passes.shrink(dy_TD, blocks, (b_down,), (scales[2],), None, gather=True)
        (db_down,) = passes.outer(dy_TD, blocks, (low_down,), weight_TK, None, pair_dtype, transposed=False)
        down = Adapter(low_dy, a_down.transpose(1, 2))
    dgate_PF, dup_PF, dweight_TK, db_gate, db_up, da_down = passes.gated_backward(
        gate_TF, up_TF, dy_TD @ down_DF, weight_TK, blocks, gate, up, down, keep_down, activation, pair_dtype
    )
    dx_TD = torch.mm(combine(dgate_PF, None, blocks.order), gate_FD)
    dx_TD.addmm_(combine(dup_PF, None, blocks.order), up_FD)
    da_in: tuple[Tensor, ...] = ()
    if pairs.inputs:
        douts = [dout for dout, b in ((dgate_PF, b_gate), (dup_PF, b_up)) if b is not None]
        dlows = tuple(
            passes.shrink(dout, blocks, (b,), (scale,), None, gather=False)[0]
            for dout, (_, b, scale) in zip(douts, pairs.inputs, strict=True)
        )
        da_in = passes.outer(x_TD, blocks, dlows, None, keep_in, pair_dtype, transposed=True)
        adapters = tuple(Adapter(dlow, a.transpose(1, 2)) for dlow, (a, _, _) in zip(dlows, pairs.inputs, strict=True))
        dx_TD = combine(passes.expand(adapters, blocks, keep_in), None, blocks.order, dx_TD)
    each_da = iter(da_in)
    grads = [dx_TD, dweight_TK.to(weight_TK.dtype)]
    for db in (db_gate, db_up):
        grads += [] if db is None else [next(each_da), db]
    return grads + ([] if da_down is None or db_down is None else [da_down, db_down])


mixlora_backward = torch.library.custom_op("hecate::mixlora_backward", backward_passes, mutates_args=())


@mixlora_backward.register_fake
def _(dy_TD: Tensor, x_TD: Tensor, weight_TK: Tensor, *rest: Any) -> list[Tensor]:
    matrices = rest[8:14]
    return [torch.empty_like(x_TD), torch.empty_like(weight_TK), *(m.new_empty(m.shape) for m in matrices if m is not None)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, weight_TK, *frozen_and_matrices = inputs[:11]
    scales, activation, order, rows, keep_in_P, keep_down_P, dropped_levels = inputs[11:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.scales, ctx.activation, ctx.rows, ctx.dropped_levels = scales, activation, rows, dropped_levels
    ctx.save_for_backward(x_TD, weight_TK, *output[1:], *frozen_and_matrices, keep_in_P, keep_down_P, *order)


def _backward(ctx: Any, dy_TD: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x_TD, weight_TK, *saved = ctx.saved_tensors
    kept, frozen_and_matrices, (keep_in_P, keep_down_P, *order) = saved[:5], saved[5:14], saved[14:]
    assert dy_TD is not None, "the operator's other results are not differentiable"
    dx_TD, dweight_TK, *grads = mixlora_backward(
        dy_TD.contiguous(),
        x_TD,
        weight_TK,
        *kept,
        *frozen_and_matrices,
        ctx.scales,
        ctx.activation,
        order,
        ctx.rows,
        keep_in_P,
        keep_down_P,
        ctx.dropped_levels,
    )
    each = iter(grads)
    d_matrices = [None if m is None else next(each) for m in frozen_and_matrices[3:]]
    # One gradient for an argument that is a list: a list.
    return (dx_TD, dweight_TK, None, None, None, *d_matrices, None, None, [None] * len(order), None, None, None, None)


mixlora_forward.register_autograd(_backward, setup_context=_setup_context)


def _keep(row_P: Tensor | None, dropped_levels: int) -> Keep | None:
    return None if row_P is None else Keep(row_P, dropped_levels)


def _no_rank(x_TD: Tensor, blocks: PairBlocks) -> Tensor:
    return x_TD.new_empty((blocks.order.num_pairs, 0))


def _shrink_inputs(x_TD: Tensor, blocks: PairBlocks, pairs: _Pairs, keep: Keep | None) -> tuple[Tensor, Tensor]:
    """The shrunk inputs of gate and up; of rank 0 for one without adapter."""
    lows: Iterator[Tensor] = iter(())
    if pairs.inputs:
        matrices = tuple(a.transpose(1, 2) for a, _, _ in pairs.inputs)
        lows = iter(passes.shrink(x_TD, blocks, matrices, tuple(scale for _, _, scale in pairs.inputs), keep, gather=True))
    low_gate, low_up = (_no_rank(x_TD, blocks) if b is None else next(lows) for b in (pairs.b_gate, pairs.b_up))
    return low_gate, low_up
