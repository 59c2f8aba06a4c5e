"""The MixLoRA feed-forward over a shared frozen base, forward and backward.

Two exact savings: the base gate and up projections run once per token, not once per (token, choice); the base down projection is
linear, so it runs once per token, after the weighted hidden states of the token's experts have been summed. All six large GEMMs have
T rows. The rest runs in tiles of (token, choice) pairs of one expert, small enough to stay in the cache; the backward pass computes
them again from the saved G = x Wg' and U = x Wu' and the shrunk inputs, so what a layer keeps is x, G, U and r numbers a pair and
projection. The router's weights are applied where tensors are narrow, and else while a token's pairs are summed.

Shapes: T tokens, D hidden, F ffn hidden, K choices, S slots, r LoRA rank, m pairs of a tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.kernels.activation import activation_backward_into, activation_into
from hecate.kernels.dropout import Dropout
from hecate.kernels.mixlora_inputs import PROJECTIONS, FfnBase, Lora, dropout_rows
from hecate.kernels.pair_tiles import Tile, pair_tiles

_TILE_BYTES = 1 << 20
"""bytes of one [m, F] buffer of a tile; three to six of them are in use at a time"""


def mixlora_ffn(
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
    """The weighted sum of each token's experts, each being the base FFN plus its low-rank pairs.

    Works in x's dtype; gradients of the pairs come in their own dtype. Differentiable in x, weights and pairs, not in the base.
    On CUDA it reads the group sizes back to the host once a call.

    Args:
        x_TD: [tokens, hidden].
        slot_TK: int64 [tokens, k], the slot of each choice; -1: that choice is computed elsewhere and adds nothing here.
        weight_TK: [tokens, k], the router's weights.
        loras: by projection (`gate_proj`, `up_proj`, `down_proj`); a projection left out has no adapter. At least one.
        dropout: on the adapters' inputs; needs `token_T` (int64 [tokens], global token numbers) and `expert_S` (int64 [slots], the
            experts in the slots). Gate and up see the same dropped input.

    Returns:
        [tokens, hidden]; zero where no choice of a token is here. Source: MixLoRA (arXiv 2404.15159) §3.
    """
    assert loras, "a MixLoRA layer without adapters is its base FFN"
    grow = 1.0 if dropout is None else dropout.scale
    inputs = [name for name in ("gate_proj", "up_proj") if name in loras]
    a_in = [loras[name].a_SrI for name in inputs]
    b_in = [loras[name].b_SOr for name in inputs]
    down = loras.get("down_proj")
    a_down, b_down = (down.a_SrI, down.b_SOr) if down is not None else (None, None)
    rows = max(16, _TILE_BYTES // (base.gate_FD.shape[0] * x_TD.element_size()))
    tiles, order_P = pair_tiles(slot_TK, rows)
    row_P = {} if dropout is None else dropout_rows(dropout, order_P, slot_TK, token_T, expert_S)
    ends = list(itertools.accumulate(loras[name].a_SrI.shape[1] for name in inputs))
    parts = tuple(
        _Input(PROJECTIONS.index(name), slice(start, end), loras[name].scale * grow)
        for name, start, end in zip(inputs, [0, *ends], ends, strict=False)
    )
    place_TK = torch.full_like(slot_TK, len(order_P)).view(-1).index_copy_(0, order_P, torch.arange(len(order_P), device=order_P.device))
    context = _Context(base, parts, 0.0 if down is None else down.scale * grow, tiles, order_P, place_TK.view_as(slot_TK), dropout, row_P)
    return _MixloraFfn.apply(x_TD, weight_TK, context, a_down, b_down, *a_in, *b_in)


@dataclass(frozen=True)
class _Input:
    """The adapter of gate or up."""

    output: int
    """0: gate, 1: up"""
    columns: slice
    """its part of the shrunk input"""
    scale: float


@dataclass(frozen=True)
class _Context:
    base: FfnBase
    inputs: tuple[_Input, ...]
    down_scale: float
    tiles: list[Tile]
    order_P: Tensor
    """int64: the pairs that are here, as indices into the flattened [T, K], in the order of the tiles"""
    place_TK: Tensor
    """int64: where a choice lies in that order; P if it is computed elsewhere"""
    dropout: Dropout | None
    row_P: dict[str, Tensor]
    """what dropout needs of each pair, in the order of the tiles"""

    def per_pair(self, like: Tensor, width: int) -> Tensor:
        """[P + 1, width] to be filled, but for the last row, which is zero: the choices that are computed elsewhere."""
        rows = like.new_empty((len(self.order_P) + 1, width))
        rows[-1].zero_()
        return rows

    def combine(self, value_PW: Tensor, weight_TK: Tensor) -> Tensor:
        """The weighted sums over each token's pairs, [T, width], of what `per_pair` gave.

        One pass; weighting the pairs, clearing the sums and adding would be four.
        """
        return F.embedding_bag(self.place_TK, value_PW, mode="sum", per_sample_weights=weight_TK)


class _Workspace:
    """The buffers of a tile, allocated once a call: fresh memory costs more than the arithmetic on it."""

    def __init__(self, context: _Context, like_TD: Tensor, *, wide: int, narrow: int) -> None:
        rows = max((len(tile.token) for tile in context.tiles), default=0)
        ffn, hidden = context.base.gate_FD.shape
        self._gate_up = like_TD.new_empty((rows, 2 * ffn))
        self._wide = like_TD.new_empty((wide, rows, ffn))
        self._narrow = like_TD.new_empty((narrow, rows, hidden))
        masked = rows if context.dropout is not None else 0
        self._keep = {"in": like_TD.new_empty((masked, hidden)), "down": like_TD.new_empty((masked, ffn))}
        self._scratch = Dropout.scratch(max(self._keep.values(), key=Tensor.numel))

    def take(self, rows: int) -> tuple[Tensor, ...]:
        """Buffers [rows, 2 F], [rows, F] and [rows, D]."""
        return self._gate_up[:rows], *self._wide[:, :rows].unbind(), *self._narrow[:, :rows].unbind()

    def keep(self, context: _Context, tile: Tile, side: str) -> Tensor | None:
        """1 where dropout keeps an element and 0 where it drops it; None without dropout."""
        if context.dropout is None:
            return None
        row = context.row_P[side][tile.span]
        return context.dropout.keep_into(row, self._scratch, self._keep[side][: len(row)])


class _MixloraFfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, context: _Context, *pairs: Tensor | None) -> Tensor:
        base, dtype = context.base, x_TD.dtype
        a_in, a_down, b_down, b_in = _matrices(context, pairs, dtype)
        ffn, hidden = base.gate_FD.shape
        num_pairs = len(context.order_P)
        gate_up_TF = x_TD.new_empty((len(x_TD), 2 * ffn))
        torch.mm(x_TD, base.gate_FD.T, out=gate_up_TF[:, :ffn])
        torch.mm(x_TD, base.up_FD.T, out=gate_up_TF[:, ffn:])
        h_PF = context.per_pair(x_TD, ffn)
        y_PD = context.per_pair(x_TD, hidden) if a_down is not None else None
        low_in_Pr = x_TD.new_empty((num_pairs, a_in.shape[1])) if a_in is not None else None
        low_down_Pr = x_TD.new_empty((num_pairs, a_down.shape[1])) if a_down is not None else None
        work = _Workspace(context, x_TD, wide=1, narrow=1)
        for tile in context.tiles:
            s, rows, span = tile.slot, tile.token, tile.span
            gate_up, h_in, x = work.take(len(rows))
            torch.index_select(gate_up_TF, 0, rows, out=gate_up)
            if low_in_Pr is not None:
                torch.index_select(x_TD, 0, rows, out=x)
                torch.mm(_drop(x, work.keep(context, tile, "in"), out=x), a_in[s].T, out=low_in_Pr[span])
                _expand(context, gate_up, low_in_Pr[span], b_in, s)
            h = activation_into(base.activation, gate_up[:, :ffn], h_PF[span]).mul_(gate_up[:, ffn:])
            if y_PD is not None and low_down_Pr is not None:
                torch.mm(_drop(h, work.keep(context, tile, "down"), out=h_in), a_down[s].T, out=low_down_Pr[span])
                torch.mm(low_down_Pr[span], b_down[s].T, out=y_PD[span])
        weight = weight_TK.detach().to(dtype)
        hidden_TF = context.combine(h_PF, weight)
        y_TD = hidden_TF @ base.down_DF.T if y_PD is None else context.combine(y_PD, weight).addmm_(hidden_TF, base.down_DF.T)
        ctx.context = context
        ctx.save_for_backward(x_TD, weight_TK, gate_up_TF, low_in_Pr, low_down_Pr, *pairs)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        context: _Context = ctx.context
        x_TD, weight_TK, gate_up_TF, low_in_Pr, low_down_Pr, *pairs = ctx.saved_tensors
        base, dtype = context.base, x_TD.dtype
        a_in, a_down, b_down, b_in = _matrices(context, pairs, dtype)
        d_down: list[Any] = [None if p is None else torch.zeros_like(p) for p in pairs[:2]]
        da_down, db_down = d_down
        da_in: Any = None if a_in is None else torch.zeros_like(a_in, dtype=pairs[2].dtype)
        db_in = [torch.zeros_like(b) for b in pairs[2 + len(b_in) :]]
        ffn, hidden = base.gate_FD.shape
        dy_TD = grads[0].contiguous()
        dhidden_TF = dy_TD @ base.down_DF
        dgate_up_PF = context.per_pair(x_TD, 2 * ffn)
        dx_PD = context.per_pair(x_TD, hidden) if a_in is not None else None
        dweight_P = torch.empty(len(context.order_P), dtype=torch.float32 if dtype.itemsize < 4 else dtype, device=dy_TD.device)
        weight = weight_TK.detach().to(dtype)
        weight_P1 = weight.flatten()[context.order_P, None]
        # Every product with a pair's weight is taken where it is narrow; the wide ones are left to `combine`.
        weighted_in_Pr, weighted_down_Pr = (None if low is None else low * weight_P1 for low in (low_in_Pr, low_down_Pr))
        work = _Workspace(context, x_TD, wide=4, narrow=2)
        for tile in context.tiles:
            s, rows, span = tile.slot, tile.token, tile.span
            gate_up, act, h, h_in, dh, x, dy = work.take(len(rows))
            gate, up = gate_up[:, :ffn], gate_up[:, ffn:]
            torch.index_select(gate_up_TF, 0, rows, out=gate_up)
            if low_in_Pr is not None:
                _expand(context, gate_up, low_in_Pr[span], b_in, s)
            activation_into(base.activation, gate, act)
            torch.mul(act, up, out=h)

            torch.index_select(dhidden_TF, 0, rows, out=dh)
            if weighted_down_Pr is not None:
                torch.index_select(dy_TD, 0, rows, out=dy)
                keep = work.keep(context, tile, "down")
                low_dy = dy @ b_down[s]
                if keep is None:
                    dh.addmm_(low_dy, a_down[s])
                else:
                    dh.addcmul_(torch.mm(low_dy, a_down[s], out=h_in), keep)
                _add_product(da_down[s], low_dy.mul_(weight_P1[span]).T, _drop(h, keep, out=h_in))
                _add_product(db_down[s], dy.T, weighted_down_Pr[span])
            torch.sum(h.mul_(dh), dim=1, dtype=dweight_P.dtype, out=dweight_P[span])

            dgate, dup = dgate_up_PF[span, :ffn], dgate_up_PF[span, ffn:]
            torch.mul(act, dh, out=dup)
            activation_backward_into(base.activation, dh.mul_(up), gate, dgate)
            if weighted_in_Pr is not None and dx_PD is not None:
                dlow = torch.empty_like(weighted_in_Pr[span])
                for part, b, db in zip(context.inputs, b_in, db_in, strict=True):
                    dout = (dgate, dup)[part.output]
                    torch.mm(dout, b[s], out=dlow[:, part.columns])
                    _add_product(db[s], dout.T, weighted_in_Pr[span, part.columns])
                torch.index_select(x_TD, 0, rows, out=x)
                keep = work.keep(context, tile, "in")
                _drop(torch.mm(dlow, a_in[s], out=dx_PD[span]), keep, out=dx_PD[span])
                _add_product(da_in[s], dlow.mul_(weight_P1[span]).T, _drop(x, keep, out=x))
        dgate_up_TF = context.combine(dgate_up_PF, weight)
        dx_TD = torch.zeros_like(x_TD) if dx_PD is None else context.combine(dx_PD, weight)
        dx_TD.addmm_(dgate_up_TF[:, :ffn], base.gate_FD).addmm_(dgate_up_TF[:, ffn:], base.up_FD)
        dweight = torch.zeros(weight_TK.numel(), dtype=dweight_P.dtype, device=dy_TD.device).index_copy_(0, context.order_P, dweight_P)
        # Of the scaled A, so far.
        da_down = None if da_down is None else da_down.mul_(context.down_scale)
        da_each = [] if da_in is None else [da_in[:, part.columns].mul_(part.scale) for part in context.inputs]
        return dx_TD, dweight.view_as(weight_TK).to(weight_TK.dtype), None, da_down, db_down, *da_each, *db_in


def _matrices(context: _Context, pairs: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Any, Any, Any, list[Any]]:
    """A of gate and up side by side, A and B of down, and the B of gate and up, in `dtype`.

    Gate and up share their input, so one GEMM shrinks it for both. A takes the scale: nothing else is as small. These copies are made anew
    in the backward pass: what is saved for that are views of the replicas, so that the engine can free them between the passes.
    """
    converted: list[Any] = [None if p is None else p.detach().to(dtype) for p in pairs]
    a_down, b_down, *rest = converted
    a_each, b_in = rest[: len(context.inputs)], rest[len(context.inputs) :]
    a_in = torch.cat([a * part.scale for a, part in zip(a_each, context.inputs, strict=True)], dim=1) if a_each else None
    return a_in, None if a_down is None else a_down * context.down_scale, b_down, b_in


def _drop(values: Tensor, keep: Tensor | None, out: Tensor) -> Tensor:
    return values if keep is None else torch.mul(values, keep, out=out)


def _expand(context: _Context, gate_up: Tensor, low: Tensor, b_in: list[Tensor], slot: int) -> None:
    for part, b in zip(context.inputs, b_in, strict=True):
        gate_up.chunk(2, dim=1)[part.output].addmm_(low[:, part.columns], b[slot].T)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, summed over tiles in out's type."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out += left @ right
