"""The feed-forward of experts that each have weights of their own, forward and backward: all of them trained, or frozen under LoRA pairs.

(token, choice) pairs are sorted by expert and worked off in tiles of one expert, large enough for GEMMs at full speed and small enough
for buffers that are allocated once a call. Gate and up lie side by side in a chunk, so they are one GEMM. What a layer keeps for its
backward pass is x and each pair's gate and up outputs; gradients of trained experts are written where they belong in their chunk.

Shapes: T tokens, D hidden, F ffn hidden, K choices, S slots, C elements of an expert's chunk, P pairs, m pairs of a tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hecate.kernels.activation import activation_backward_into, activation_into
from hecate.kernels.dropout import Dropout
from hecate.kernels.expert_ffn_inputs import FfnShape
from hecate.kernels.mixlora_inputs import Lora, dropout_rows
from hecate.kernels.pair_tiles import Tile, pair_tiles

_TILE_ROWS = 512
"""pairs of a tile: a GEMM of so many rows repays reading its expert's weights, and adding to their gradients"""


def full_ffn(x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, experts_SC: Tensor, shape: FfnShape) -> Tensor:
    """The weighted sum of each token's experts, gated FFNs that are trained.

    Works in x's dtype; the experts' gradient comes in their own. Differentiable in x, weights and experts.

    Args:
        x_TD: [tokens, hidden].
        slot_TK: int64 [tokens, k], the slot of each choice; -1: that choice is computed elsewhere and adds nothing here.
        weight_TK: [tokens, k], the router's weights.
        experts_SC: [slots, C], chunks as `FfnShape` lays them out.

    Returns:
        [tokens, hidden]; zero where no choice of a token is here.
    """
    tiles, _ = pair_tiles(slot_TK, _TILE_ROWS)
    return _FullExperts.apply(x_TD, weight_TK, experts_SC, shape, tiles)


def moe_lora_ffn(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    frozen_S: Sequence[Tensor],
    loras: dict[str, Lora],
    shape: FfnShape,
    *,
    dropout: Dropout | None = None,
    token_T: Tensor | None = None,
    expert_S: Tensor | None = None,
) -> Tensor:
    """The weighted sum of each token's experts, each a frozen gated FFN of its own plus low-rank pairs.

    Works in x's dtype; gradients of the pairs come in their own. Differentiable in x, weights and pairs, not in the frozen parts.

    Args:
        x_TD, slot_TK, weight_TK: as for `full_ffn`.
        frozen_S: the flat chunk of each slot, as `FfnShape` lays it out.
        loras: by projection (`gate_proj`, `up_proj`, `down_proj`; or `gate_up_proj`, one pair whose B has the rows of both); a projection
            left out has no adapter. At least one.
        dropout: on the adapters' inputs; needs `token_T` (int64 [tokens], global token numbers) and `expert_S` (int64 [slots], the
            experts in the slots). Gate and up see the same dropped input.

    Returns:
        [tokens, hidden]; zero where no choice of a token is here.
    """
    assert loras, "frozen experts without adapters have nothing to train"
    tiles, order_P = pair_tiles(slot_TK, _TILE_ROWS)
    row_P = {} if dropout is None else dropout_rows(dropout, order_P, slot_TK, token_T, expert_S)
    grow = 1.0 if dropout is None else dropout.scale
    outputs = {"gate_proj": slice(0, shape.ffn), "up_proj": slice(shape.ffn, None), "gate_up_proj": slice(0, None)}
    inputs = [name for name in outputs if name in loras]
    ends = list(itertools.accumulate(loras[name].a_SrI.shape[1] for name in inputs))
    parts = tuple(
        _Input(outputs[name], slice(start, end), loras[name].scale * grow)
        for name, start, end in zip(inputs, [0, *ends], ends, strict=False)
    )
    down = loras.get("down_proj")
    context = _Adapted(shape, tuple(frozen_S), tiles, parts, 0.0 if down is None else down.scale * grow, dropout, row_P)
    # Gate and up share their input, so one GEMM shrinks it for both.
    a_in = None
    if inputs:
        a_in = loras[inputs[0]].a_SrI if len(inputs) == 1 else torch.cat([loras[name].a_SrI for name in inputs], dim=1)
    a_down, b_down = (None, None) if down is None else (down.a_SrI, down.b_SOr)
    return _LoraExperts.apply(x_TD, weight_TK, context, a_in, a_down, b_down, *(loras[name].b_SOr for name in inputs))


@dataclass(frozen=True)
class _Input:
    """The adapter of gate, of up, or of both."""

    output: slice
    """its columns of the gate and up outputs"""
    low: slice
    """its columns of the shrunk input"""
    scale: float


@dataclass(frozen=True)
class _Adapted:
    """Frozen experts and what there is to know of their adapters, the pairs themselves left out."""

    shape: FfnShape
    frozen_S: tuple[Tensor, ...]
    tiles: list[Tile]
    inputs: tuple[_Input, ...]
    down_scale: float
    dropout: Dropout | None
    row_P: dict[str, Tensor]
    """what dropout needs of each pair, for both of its inputs"""


class _Buffers:
    """Room for one tile, allocated once a call: fresh memory costs more than the arithmetic on it."""

    def __init__(self, shape: FfnShape, tiles: list[Tile], like_TD: Tensor, *, double: int, wide: int, narrow: int) -> None:
        self._rows = max((len(tile.token) for tile in tiles), default=0)
        sizes = ((double, 2 * shape.ffn), (wide, shape.ffn), (narrow, shape.hidden))
        self._kinds = [like_TD.new_empty((count, self._rows, width)) for count, width in sizes]

    def take(self, rows: int) -> tuple[Tensor, ...]:
        """Buffers [rows, 2F], then [rows, F], then [rows, D]."""
        return tuple(buffer for kind in self._kinds for buffer in kind[:, :rows].unbind())


class _Masks:
    """Dropout's masks of one tile."""

    def __init__(self, context: _Adapted, like_TD: Tensor) -> None:
        self._context = context
        if context.dropout is not None:
            rows = max((len(tile.token) for tile in context.tiles), default=0)
            self._keep = {"in": like_TD.new_empty((rows, context.shape.hidden)), "down": like_TD.new_empty((rows, context.shape.ffn))}
            self._scratch = Dropout.scratch(max(self._keep.values(), key=Tensor.numel))

    def keep(self, tile: Tile, side: str) -> Tensor | None:
        """1 where dropout keeps an element and 0 where it drops it; None without dropout."""
        if self._context.dropout is None:
            return None
        row = self._context.row_P[side][tile.span]
        return self._context.dropout.keep_into(row, self._scratch, self._keep[side][: len(row)])


class _FullExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, experts_SC: Tensor, shape: FfnShape, tiles: list[Tile]) -> Tensor:
        weight = weight_TK.detach().flatten().to(x_TD.dtype)
        gate_up_P = x_TD.new_empty((_num_pairs(tiles), 2 * shape.ffn))
        y_TD = torch.zeros_like(x_TD)
        buffers = _Buffers(shape, tiles, x_TD, double=0, wide=1, narrow=2)
        for tile in tiles:
            gate_up_weight, down_weight = shape.matrices(experts_SC[tile.slot].detach().to(x_TD.dtype))
            h, x, y = buffers.take(len(tile.token))
            gate_up = torch.mm(torch.index_select(x_TD, 0, tile.token, out=x), gate_up_weight.T, out=gate_up_P[tile.span])
            _gate(shape, gate_up, act=h, out=h)
            y_TD.index_add_(0, tile.token, torch.mm(h, down_weight.T, out=y).mul_(weight[tile.pair, None]))
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
        dexperts_SC = torch.empty_like(experts_SC, memory_format=torch.contiguous_format)
        for slot in set(range(len(experts_SC))) - {tile.slot for tile in tiles}:
            dexperts_SC[slot].zero_()
        buffers = _Buffers(shape, tiles, x_TD, double=1, wide=3, narrow=3)
        for tile in tiles:
            gate_up_weight, down_weight = shape.matrices(experts_SC[tile.slot].to(x_TD.dtype))
            dgate_up_weight, ddown_weight = shape.matrices(dexperts_SC[tile.slot])
            dgate_up, act, h, dh, x, dy, dx = buffers.take(len(tile.token))
            gate_up, w = gate_up_P[tile.span], weight[tile.pair, None]
            _gate(shape, gate_up, act=act, out=h)
            torch.mm(torch.index_select(dy_TD, 0, tile.token, out=dy), down_weight, out=dh)
            dweight[tile.pair] = _row_products(dh, h, scratch=dgate_up)
            _ungate(shape, gate_up, act, dh.mul_(w), out=dgate_up)
            _product_into(ddown_weight, dy.mul_(w).T, h, add=not tile.first)
            _product_into(dgate_up_weight, dgate_up.T, torch.index_select(x_TD, 0, tile.token, out=x), add=not tile.first)
            dx_TD.index_add_(0, tile.token, torch.mm(dgate_up, gate_up_weight, out=dx))
        return dx_TD, dweight.view_as(weight_TK).to(weight_TK.dtype), dexperts_SC, None, None


class _LoraExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, context: _Adapted, *pairs: Tensor | None) -> Tensor:
        shape, tiles = context.shape, context.tiles
        a_in, a_down, b_down, *b_in = _converted(pairs, x_TD.dtype)
        weight = weight_TK.detach().flatten().to(x_TD.dtype)
        gate_up_P = x_TD.new_empty((_num_pairs(tiles), 2 * shape.ffn))
        y_TD = torch.zeros_like(x_TD)
        buffers, masks = _Buffers(shape, tiles, x_TD, double=0, wide=2, narrow=3), _Masks(context, x_TD)
        for tile in tiles:
            s = tile.slot
            gate_up_weight, down_weight = shape.matrices(context.frozen_S[s])
            h, h_dropped, x, x_dropped, y = buffers.take(len(tile.token))
            gate_up = torch.mm(torch.index_select(x_TD, 0, tile.token, out=x), gate_up_weight.T, out=gate_up_P[tile.span])
            if a_in is not None:
                low = _drop(x, masks.keep(tile, "in"), out=x_dropped) @ a_in[s].T
                for part, b in zip(context.inputs, b_in, strict=True):
                    gate_up[:, part.output].addmm_(low[:, part.low], b[s].T, alpha=part.scale)
            _gate(shape, gate_up, act=h, out=h)
            torch.mm(h, down_weight.T, out=y)
            if a_down is not None:
                low = _drop(h, masks.keep(tile, "down"), out=h_dropped) @ a_down[s].T
                y.addmm_(low, b_down[s].T, alpha=context.down_scale)
            y_TD.index_add_(0, tile.token, y.mul_(weight[tile.pair, None]))
        ctx.context = context
        ctx.save_for_backward(x_TD, weight_TK, gate_up_P, *pairs)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        context: _Adapted = ctx.context
        shape, tiles = context.shape, context.tiles
        x_TD, weight_TK, gate_up_P, *pairs = ctx.saved_tensors
        a_in, a_down, b_down, *b_in = _converted(pairs, x_TD.dtype)
        d_pairs: list[Any] = [None if p is None else torch.zeros_like(p) for p in pairs]
        da_in, da_down, db_down, *db_in = d_pairs
        dy_TD = grads[0].contiguous()
        weight, dweight = weight_TK.flatten().to(x_TD.dtype), _weight_gradient(weight_TK, x_TD)
        dx_TD = torch.zeros_like(x_TD)
        buffers, masks = _Buffers(shape, tiles, x_TD, double=1, wide=3, narrow=3), _Masks(context, x_TD)
        for tile in tiles:
            s = tile.slot
            gate_up_weight, down_weight = shape.matrices(context.frozen_S[s])
            dgate_up, act, h, dh, x, dy, dx = buffers.take(len(tile.token))
            gate_up, w = gate_up_P[tile.span], weight[tile.pair, None]
            scratch = dgate_up[:, : shape.ffn]
            _gate(shape, gate_up, act=act, out=h)
            torch.mm(torch.index_select(dy_TD, 0, tile.token, out=dy), down_weight, out=dh)
            if a_down is None:
                dweight[tile.pair] = _row_products(dh, h, scratch=dgate_up)
            else:
                keep = masks.keep(tile, "down")
                low_dy = (dy @ b_down[s]).mul_(context.down_scale)
                if keep is None:
                    dh.addmm_(low_dy, a_down[s])
                else:
                    dh.addcmul_(torch.mm(low_dy, a_down[s], out=scratch), keep)
                dweight[tile.pair] = _row_products(dh, h, scratch=dgate_up)
                h_dropped = _drop(h, keep, out=h)
                low_h = (h_dropped @ a_down[s].T).mul_(w).mul_(context.down_scale)
                _product_into(da_down[s], low_dy.mul_(w).T, h_dropped, add=True)
                _product_into(db_down[s], dy.T, low_h, add=True)
            _ungate(shape, gate_up, act, dh.mul_(w), out=dgate_up)
            torch.mm(dgate_up, gate_up_weight, out=dx)
            if a_in is not None:
                keep = masks.keep(tile, "in")
                x_dropped = _drop(torch.index_select(x_TD, 0, tile.token, out=x), keep, out=x)
                low_x = x_dropped @ a_in[s].T
                dlow = torch.empty_like(low_x)
                for part, b, db in zip(context.inputs, b_in, db_in, strict=True):
                    dout = dgate_up[:, part.output]
                    dlow[:, part.low] = torch.mm(dout, b[s]).mul_(part.scale)
                    _product_into(db[s], dout.T, low_x[:, part.low] * part.scale, add=True)
                _product_into(da_in[s], dlow.T, x_dropped, add=True)
                if keep is None:
                    dx.addmm_(dlow, a_in[s])
                else:
                    dx.addcmul_(torch.mm(dlow, a_in[s], out=dy), keep)
            dx_TD.index_add_(0, tile.token, dx)
        return dx_TD, dweight.view_as(weight_TK).to(weight_TK.dtype), None, *d_pairs


def _num_pairs(tiles: list[Tile]) -> int:
    return tiles[-1].span.stop if tiles else 0


def _weight_gradient(weight_TK: Tensor, x_TD: Tensor) -> Tensor:
    """Zeros [T·K]: choices elsewhere get none here."""
    dtype = torch.float32 if x_TD.dtype.itemsize < 4 else x_TD.dtype
    return torch.zeros(weight_TK.numel(), dtype=dtype, device=x_TD.device)


def _gate(shape: FfnShape, gate_up: Tensor, *, act: Tensor, out: Tensor) -> None:
    """act = act(gate), out = act · up; the two may be one."""
    gate, up = gate_up.split(shape.ffn, dim=1)
    torch.mul(activation_into(shape.activation, gate, act), up, out=out)


def _ungate(shape: FfnShape, gate_up: Tensor, act: Tensor, dh: Tensor, *, out: Tensor) -> None:
    """Gradients of gate and up from that of their gated product; `act` is lost."""
    gate, up = gate_up.split(shape.ffn, dim=1)
    dgate, dup = out.split(shape.ffn, dim=1)
    torch.mul(dh, act, out=dup)
    activation_backward_into(shape.activation, torch.mul(dh, up, out=act), gate, dgate)


def _row_products(left: Tensor, right: Tensor, *, scratch: Tensor) -> Tensor:
    """[m]: the dot products of rows, summed in float32 or wider."""
    dtype = torch.float32 if left.dtype.itemsize < 4 else left.dtype
    return torch.mul(left, right, out=scratch[:, : left.shape[1]]).sum(dim=1, dtype=dtype)


def _converted(pairs: Iterable[Tensor | None], dtype: torch.dtype) -> list[Any]:
    return [None if p is None else p.detach().to(dtype) for p in pairs]


def _drop(values: Tensor, keep: Tensor | None, out: Tensor) -> Tensor:
    return values if keep is None else torch.mul(values, keep, out=out)


def _product_into(out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """out = left @ right, or added to what is there; sums in out's type."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, beta=1 if add else 0)
    elif add:
        out += left @ right
    else:
        out.copy_(left @ right)
