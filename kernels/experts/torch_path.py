"""The feed-forward, in plain torch, of experts that have their own weights: fully trained ones, or frozen ones with LoRA pairs.

Assignments are sorted by expert and computed in tiles of one expert, large enough for GEMMs at full speed and small enough for buffers
that are allocated once per call. Gate and up are adjacent in a chunk, so one GEMM computes both. A layer keeps x and each assignment's
gate and up outputs for its backward pass, which writes gradients of trained experts directly into their chunk.

Shapes: T tokens, D hidden, F ffn hidden, K assignments of a token, P assignments on this rank, S slots, C elements of an expert's chunk,
m assignments of a tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hecate.kernels.common.assignments import RoutedTokens, Tile, assignment_tiles
from hecate.kernels.common.dropout import Dropout, DropoutMasks, FfnDropout, ffn_dropout, masked
from hecate.kernels.common.ffn import FfnShape, activation_backward_into, activation_into, gradient_dtype, product_into
from hecate.kernels.common.low_rank import LowRankPairs, ShrunkInput, shrunk_inputs

_TILE_ROWS = 512
"""the assignments of a tile: enough rows to make reading an expert's weights, and adding to their gradients, cheap"""


def full_ffn(routed: RoutedTokens, experts_SC: Tensor, shape: FfnShape) -> Tensor:
    """Return the weighted sum of each token's experts, which are fully trained gated FFNs.

    It computes in x's dtype; the experts' gradient has the `gradient_dtype` of experts. It is differentiable in x, weights and experts.

    Args:
        experts_SC: [slots, C], chunks as `FfnShape` lays them out.

    Returns:
        [tokens, hidden]; zero where no assignment of a token is computed on this rank.
    """
    tiles, _ = assignment_tiles(routed.slot_TK, _TILE_ROWS)
    return _FullFfn.apply(routed.x_TD, routed.weight_TK, experts_SC, shape, tiles)


def moe_lora_ffn(
    routed: RoutedTokens,
    frozen_S: Sequence[Tensor],
    pairs: dict[str, LowRankPairs],
    shape: FfnShape,
    *,
    dropout: Dropout | None = None,
) -> Tensor:
    """Return the weighted sum of each token's experts, each of which is its own frozen gated FFN plus low-rank pairs.

    It computes in x's dtype; gradients of the pairs have their own dtype. It is differentiable in x, weights and pairs, but not in the
    frozen parts.

    Args:
        frozen_S: the flat chunk of each slot, as `FfnShape` lays it out.
        pairs: the pairs by projection (`gate_proj`, `up_proj`, `down_proj`; or `gate_up_proj`, one pair whose B has the rows of both). A
            projection that is left out has no pair. At least one must be given.
        dropout: the dropout of the pairs' inputs; `routed` must then have `token_T` and `expert_S`. Gate and up have the same input.

    Returns:
        [tokens, hidden]; zero where no assignment of a token is computed on this rank.
    """
    assert pairs, "frozen experts without adapters have nothing to train"
    tiles, order_P = assignment_tiles(routed.slot_TK, _TILE_ROWS)
    of_rows = ffn_dropout(dropout, routed, order_P)
    grow = 1.0 if of_rows is None else of_rows.scale
    inputs, down = shrunk_inputs(pairs, shape.ffn, grow), pairs.get("down_proj")
    down_scale = 0.0 if down is None else down.scale * grow
    context = _MoeLoraContext(shape, tuple(frozen_S), tiles, tuple(inputs.values()), down_scale, of_rows)
    # Gate and up share their input, so one GEMM shrinks it for both.
    a_each = [pairs[name].a_SrI for name in inputs]
    a_in = None if not a_each else a_each[0] if len(a_each) == 1 else torch.cat(a_each, dim=1)
    of_down = (None, None, None) if down is None else down.matrices
    of_inputs = itertools.chain(*(pairs[name].matrices[1:] for name in inputs))
    return _MoeLoraFfn.apply(routed.x_TD, routed.weight_TK, context, a_in, *of_down, *of_inputs)


@dataclass(frozen=True)
class _MoeLoraContext:
    """The values that both passes need, apart from the tensors that are differentiated."""

    shape: FfnShape
    frozen_S: tuple[Tensor, ...]
    tiles: list[Tile]
    inputs: tuple[ShrunkInput, ...]
    down_scale: float
    dropout: FfnDropout | None
    """the dropout of each assignment, in the order of the tiles"""

    def masks(self, like_TD: Tensor) -> DropoutMasks:
        """Allocate the buffers for the masks of a tile."""
        return DropoutMasks(self.dropout, _largest(self.tiles), self.shape.hidden, self.shape.ffn, like_TD)


class _ExpertBuffers:
    """The buffers of one tile, allocated once per call, because allocating memory costs more than the arithmetic on it."""

    def __init__(self, shape: FfnShape, tiles: list[Tile], like_TD: Tensor, *, double: int, wide: int, narrow: int) -> None:
        sizes = ((double, 2 * shape.ffn), (wide, shape.ffn), (narrow, shape.hidden))
        self._kinds = [like_TD.new_empty((count, _largest(tiles), width)) for count, width in sizes]

    def take(self, rows: int) -> tuple[Tensor, ...]:
        """Return buffers of [rows, 2F], of [rows, F] and of [rows, D], in this order."""
        return tuple(buffer for kind in self._kinds for buffer in kind[:, :rows].unbind())


class _FullFfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, experts_SC: Tensor, shape: FfnShape, tiles: list[Tile]) -> Tensor:
        weight = weight_TK.detach().flatten().to(x_TD.dtype)
        gate_up_P = x_TD.new_empty((_num_assignments(tiles), 2 * shape.ffn))
        y_TD = torch.zeros_like(x_TD)
        buffers = _ExpertBuffers(shape, tiles, x_TD, double=0, wide=1, narrow=2)
        for tile in tiles:
            gate_up_weight, down_weight = shape.matrices(experts_SC[tile.slot].detach().to(x_TD.dtype))
            h, x, y = buffers.take(len(tile.token))
            gate_up = torch.mm(torch.index_select(x_TD, 0, tile.token, out=x), gate_up_weight.T, out=gate_up_P[tile.span])
            _gate(shape, gate_up, act=h, out=h)
            y_TD.index_add_(0, tile.token, torch.mm(h, down_weight.T, out=y).mul_(weight[tile.assignment, None]))
        ctx.shape, ctx.tiles = shape, tiles
        ctx.save_for_backward(x_TD, weight_TK, experts_SC, gate_up_P)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shape: FfnShape = ctx.shape
        tiles: list[Tile] = ctx.tiles
        x_TD, weight_TK, experts_SC, gate_up_P = ctx.saved_tensors
        dy_TD = grads[0].contiguous()
        weight, dweight = weight_TK.flatten().to(x_TD.dtype), _weight_gradient(weight_TK, x_TD)
        dx_TD = torch.zeros_like(x_TD)
        dexperts_SC = experts_SC.new_empty(experts_SC.shape, dtype=gradient_dtype(experts_SC))
        for slot in set(range(len(experts_SC))) - {tile.slot for tile in tiles}:
            dexperts_SC[slot].zero_()
        buffers = _ExpertBuffers(shape, tiles, x_TD, double=1, wide=3, narrow=3)
        for tile in tiles:
            gate_up_weight, down_weight = shape.matrices(experts_SC[tile.slot].to(x_TD.dtype))
            dgate_up_weight, ddown_weight = shape.matrices(dexperts_SC[tile.slot])
            dgate_up, act, h, dh, x, dy, dx = buffers.take(len(tile.token))
            gate_up, w = gate_up_P[tile.span], weight[tile.assignment, None]
            _gate(shape, gate_up, act=act, out=h)
            torch.mm(torch.index_select(dy_TD, 0, tile.token, out=dy), down_weight, out=dh)
            dweight[tile.assignment] = _row_products(dh, h, scratch=dgate_up)
            _ungate(shape, gate_up, act, dh.mul_(w), out=dgate_up)
            product_into(ddown_weight, dy.mul_(w).T, h, add=not tile.first)
            product_into(dgate_up_weight, dgate_up.T, torch.index_select(x_TD, 0, tile.token, out=x), add=not tile.first)
            dx_TD.index_add_(0, tile.token, torch.mm(dgate_up, gate_up_weight, out=dx))
        return dx_TD, dweight.view_as(weight_TK).to(weight_TK.dtype), dexperts_SC, None, None


class _MoeLoraFfn(torch.autograd.Function):
    """Its last arguments are those of `_AdapterMatrices.of`."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, context: _MoeLoraContext, *matrices: Tensor | None) -> Tensor:
        shape, tiles = context.shape, context.tiles
        pairs = _AdapterMatrices.of(matrices, x_TD.dtype)
        weight = weight_TK.detach().flatten().to(x_TD.dtype)
        gate_up_P = x_TD.new_empty((_num_assignments(tiles), 2 * shape.ffn))
        y_TD = torch.zeros_like(x_TD)
        buffers, masks = _ExpertBuffers(shape, tiles, x_TD, double=0, wide=2, narrow=3), context.masks(x_TD)
        for tile in tiles:
            s = tile.slot
            gate_up_weight, down_weight = shape.matrices(context.frozen_S[s])
            h, h_dropped, x, x_dropped, y = buffers.take(len(tile.token))
            gate_up = torch.mm(torch.index_select(x_TD, 0, tile.token, out=x), gate_up_weight.T, out=gate_up_P[tile.span])
            if pairs.a_in is not None:
                low = masked(x, masks.gate_up(tile.span), out=x_dropped) @ pairs.a_in[s].T
                for part, b in zip(context.inputs, pairs.b_in, strict=True):
                    gate_up[:, part.output].addmm_(low[:, part.low], b[s].T, alpha=part.scale)
            _gate(shape, gate_up, act=h, out=h)
            torch.mm(h, down_weight.T, out=y)
            if pairs.a_down is not None:
                low = masked(h, masks.down(tile.span), out=h_dropped) @ pairs.a_down[s].T
                y.addmm_(low, pairs.b_down[s].T, alpha=context.down_scale)
            y_TD.index_add_(0, tile.token, y.mul_(weight[tile.assignment, None]))
        ctx.context = context
        ctx.save_for_backward(x_TD, weight_TK, gate_up_P, *matrices)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        context: _MoeLoraContext = ctx.context
        shape, tiles = context.shape, context.tiles
        x_TD, weight_TK, gate_up_P, *matrices = ctx.saved_tensors
        pairs = _AdapterMatrices.of(matrices, x_TD.dtype)
        # What has no gradient: A that does not train, and what stands for B in A's gradient.
        found = [torch.zeros_like(matrix) if needed else None for matrix, needed in zip(matrices, ctx.needs_input_grad[3:], strict=True)]
        gradients = _AdapterMatrices.of(found)
        dy_TD = grads[0].contiguous()
        weight, dweight = weight_TK.flatten().to(x_TD.dtype), _weight_gradient(weight_TK, x_TD)
        dx_TD = torch.zeros_like(x_TD)
        buffers, masks = _ExpertBuffers(shape, tiles, x_TD, double=1, wide=3, narrow=3), context.masks(x_TD)
        for tile in tiles:
            gate_up_weight, down_weight = shape.matrices(context.frozen_S[tile.slot])
            dgate_up, act, h, dh, x, dy, dx = buffers.take(len(tile.token))
            gate_up, w = gate_up_P[tile.span], weight[tile.assignment, None]
            _gate(shape, gate_up, act=act, out=h)
            torch.mm(torch.index_select(dy_TD, 0, tile.token, out=dy), down_weight, out=dh)
            if pairs.a_down is None:
                dweight[tile.assignment] = _row_products(dh, h, scratch=dgate_up)
            else:
                keep = masks.down(tile.span)
                low_dy = (dy @ pairs.b_down[tile.slot]).mul_(context.down_scale)
                if keep is None:
                    dh.addmm_(low_dy, pairs.a_down[tile.slot])
                else:
                    dh.addcmul_(torch.mm(low_dy, pairs.a_down[tile.slot], out=dgate_up[:, : shape.ffn]), keep)
                dweight[tile.assignment] = _row_products(dh, h, scratch=dgate_up)
                _add_down_gradients(context, tile.slot, pairs, gradients, _DownRows(masked(h, keep, out=h), dy, low_dy, w))
            _ungate(shape, gate_up, act, dh.mul_(w), out=dgate_up)
            torch.mm(dgate_up, gate_up_weight, out=dx)
            if pairs.a_in is not None:
                keep = masks.gate_up(tile.span)
                x_dropped = masked(torch.index_select(x_TD, 0, tile.token, out=x), keep, out=x)
                dlow = _add_input_gradients(context, tile.slot, pairs, gradients, x_dropped, dgate_up)
                if keep is None:
                    dx.addmm_(dlow, pairs.a_in[tile.slot])
                else:
                    dx.addcmul_(torch.mm(dlow, pairs.a_in[tile.slot], out=dy), keep)
            dx_TD.index_add_(0, tile.token, dx)
        return dx_TD, dweight.view_as(weight_TK).to(weight_TK.dtype), None, *found


@dataclass(frozen=True)
class _AdapterMatrices:
    """The matrices of a layer's pairs, or their gradients; None for what a layer lacks."""

    a_in: Any
    """A of gate and up side by side"""
    a_down: Any
    b_down: Any
    b_for_a_down: Any
    """what stands for B of down in A's gradient; None: B"""
    b_in: Sequence[Any]
    """B of gate and up, or of both as one projection"""
    b_for_a_in: Sequence[Any]
    """what stands for each of `b_in` in A's gradient; None: B"""

    @staticmethod
    def of(matrices: Sequence[Tensor | None], dtype: torch.dtype | None = None) -> _AdapterMatrices:
        """Of A of gate and up, then A, B and `b_for_a_down`, then B and what stands for it of each pair of gate and up; in this type."""
        converted = (matrix if matrix is None or dtype is None else matrix.detach().to(dtype) for matrix in matrices)
        a_in, a_down, b_down, b_for_a_down, *of_inputs = converted
        return _AdapterMatrices(a_in, a_down, b_down, b_for_a_down, of_inputs[0::2], of_inputs[1::2])


@dataclass(frozen=True)
class _DownRows:
    """The rows of a tile that the gradients of down's pair come from."""

    h: Tensor
    """[m, F], after dropout"""
    dy: Tensor
    low_dy: Tensor
    """scale · dy B; it is overwritten"""
    weight: Tensor
    """[m, 1], the router's weight of each assignment"""


def _add_down_gradients(context: _MoeLoraContext, slot: int, pairs: _AdapterMatrices, gradients: _AdapterMatrices, rows: _DownRows) -> None:
    """Add a tile's part of the gradients of A and B of down."""
    low_h = (rows.h @ pairs.a_down[slot].T).mul_(rows.weight).mul_(context.down_scale)
    if gradients.a_down is not None:
        of_a = rows.low_dy if pairs.b_for_a_down is None else (rows.dy @ pairs.b_for_a_down[slot]).mul_(context.down_scale)
        product_into(gradients.a_down[slot], of_a.mul_(rows.weight).T, rows.h, add=True)
    product_into(gradients.b_down[slot], rows.dy.T, low_h, add=True)


def _add_input_gradients(
    context: _MoeLoraContext, slot: int, pairs: _AdapterMatrices, gradients: _AdapterMatrices, x: Tensor, dgate_up: Tensor
) -> Tensor:
    """Add a tile's part of the gradients of A and B of gate and up, and return that of A x, [m, r].

    Args:
        x: after dropout.
    """
    low_x = x @ pairs.a_in[slot].T
    dlow = torch.empty_like(low_x)
    for part, b, db in zip(context.inputs, pairs.b_in, gradients.b_in, strict=True):
        dout = dgate_up[:, part.output]
        dlow[:, part.low] = torch.mm(dout, b[slot]).mul_(part.scale)
        product_into(db[slot], dout.T, low_x[:, part.low] * part.scale, add=True)
    if gradients.a_in is not None:
        of_a = dlow
        if any(b is not None for b in pairs.b_for_a_in):
            of_a = dlow.clone()
            for part, b in zip(context.inputs, pairs.b_for_a_in, strict=True):
                if b is not None:
                    of_a[:, part.low] = torch.mm(dgate_up[:, part.output], b[slot]).mul_(part.scale)
        product_into(gradients.a_in[slot], of_a.T, x, add=True)
    return dlow


def _num_assignments(tiles: list[Tile]) -> int:
    return tiles[-1].span.stop if tiles else 0


def _largest(tiles: list[Tile]) -> int:
    """Return the number of rows of the largest tile."""
    return max((len(tile.token) for tile in tiles), default=0)


def _weight_gradient(weight_TK: Tensor, x_TD: Tensor) -> Tensor:
    """Return zeros [T·K] for the weights' gradients, which stay zero for assignments that other ranks compute."""
    dtype = torch.float32 if x_TD.dtype.itemsize < 4 else x_TD.dtype
    return torch.zeros(weight_TK.numel(), dtype=dtype, device=x_TD.device)


def _gate(shape: FfnShape, gate_up: Tensor, *, act: Tensor, out: Tensor) -> None:
    """Write act(gate) into `act` and act(gate) · up into `out`. The two may be the same tensor."""
    gate, up = gate_up.split(shape.ffn, dim=1)
    torch.mul(activation_into(shape.activation, gate, act), up, out=out)


def _ungate(shape: FfnShape, gate_up: Tensor, act: Tensor, dh: Tensor, *, out: Tensor) -> None:
    """Write the gradients of gate and up into `out`, from the gradient of their gated product. `act` is overwritten."""
    gate, up = gate_up.split(shape.ffn, dim=1)
    dgate, dup = out.split(shape.ffn, dim=1)
    torch.mul(dh, act, out=dup)
    activation_backward_into(shape.activation, torch.mul(dh, up, out=act), gate, dgate)


def _row_products(left: Tensor, right: Tensor, *, scratch: Tensor) -> Tensor:
    """Return the dot products of rows, [m], summed in float32 or wider."""
    dtype = torch.float32 if left.dtype.itemsize < 4 else left.dtype
    return torch.mul(left, right, out=scratch[:, : left.shape[1]]).sum(dim=1, dtype=dtype)
