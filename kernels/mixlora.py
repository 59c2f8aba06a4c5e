"""The MixLoRA feed-forward over a shared frozen base, forward and backward.

Two exact savings: the base gate and up projections run once per token, not once per (token, choice); the base down projection is
linear, so it runs once per token, after the weighted hidden states of the token's experts have been summed. All six large GEMMs have
T rows. The rest runs in tiles of (token, choice) pairs of one expert, small enough to stay in the cache; the backward pass computes
them again from the saved G = x Wg' and U = x Wu', so what a layer keeps is x, G and U, whatever k is.

Shapes: T tokens, D hidden, F ffn hidden, K choices, S slots, r LoRA rank, m pairs of a tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hecate.kernels.activation import activation_backward_into, activation_into
from hecate.kernels.dropout import Dropout
from hecate.kernels.mixlora_inputs import PROJECTIONS, FfnBase, Lora, dropout_stream

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
    tiles, order_P = _tiles(slot_TK, base, x_TD.element_size())
    row_P = {}
    if dropout is not None:
        assert token_T is not None
        assert expert_S is not None
        token_P, expert_P = token_T[order_P // slot_TK.shape[1]], expert_S.to(slot_TK.device)[slot_TK.flatten()[order_P]]
        row_P = {
            "in": dropout.rows(token_P, dropout_stream(expert_P, "gate_proj")),
            "down": dropout.rows(token_P, dropout_stream(expert_P, "down_proj")),
        }
    ends = list(itertools.accumulate(loras[name].a_SrI.shape[1] for name in inputs))
    parts = tuple(
        _Input(PROJECTIONS.index(name), slice(start, end), loras[name].scale * grow)
        for name, start, end in zip(inputs, [0, *ends], ends, strict=False)
    )
    context = _Context(base, parts, down.scale * grow if down is not None else 0.0, tiles, dropout, row_P)
    return _MixloraFfn.apply(x_TD, weight_TK, context, a_down, b_down, *a_in, *b_in)


@dataclass(frozen=True)
class _Tile:
    """Pairs of one slot."""

    slot: int
    token: Tensor
    """int64 [m]"""
    pair: Tensor
    """int64 [m], index into the flattened [T, K]"""
    span: slice
    """where they lie in the order of all tiles' pairs"""


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
    tiles: list[_Tile]
    dropout: Dropout | None
    row_P: dict[str, Tensor]
    """what dropout needs of each pair, in the order of the tiles"""


def _tiles(slot_TK: Tensor, base: FfnBase, element_size: int) -> tuple[list[_Tile], Tensor]:
    """The tiles, and the pairs (indices into the flattened [T, K]) in their order."""
    rows = max(16, _TILE_BYTES // (base.gate_FD.shape[0] * element_size))
    slot = slot_TK.flatten()
    elsewhere, *sizes = torch.bincount(slot + 1, minlength=1).tolist()
    order_P = torch.argsort(slot, stable=True)[elsewhere:]
    tiles, start = [], 0
    for index, size in enumerate(sizes):
        for pair in order_P[start : start + size].split(rows) if size else ():
            span = slice(start, start + len(pair))
            tiles.append(_Tile(index, pair // slot_TK.shape[1], pair, span))
            start = span.stop
    return tiles, order_P


class _Workspace:
    """The buffers of a tile, allocated once a call: fresh memory costs more than the arithmetic on it."""

    def __init__(self, context: _Context, like_TD: Tensor, *, wide: int, narrow: int) -> None:
        rows = max((len(tile.token) for tile in context.tiles), default=0)
        ffn, hidden = context.base.gate_FD.shape
        self._wide = like_TD.new_empty((wide, rows, ffn))
        self._narrow = like_TD.new_empty((narrow, rows, hidden))
        masked = rows if context.dropout is not None else 0
        self._keep = {"in": like_TD.new_empty((masked, hidden)), "down": like_TD.new_empty((masked, ffn))}
        self._scratch = Dropout.scratch(max(self._keep.values(), key=Tensor.numel))

    def take(self, rows: int) -> tuple[Tensor, ...]:
        """Buffers [rows, F] and [rows, D]."""
        return *self._wide[:, :rows].unbind(), *self._narrow[:, :rows].unbind()

    def keep(self, context: _Context, tile: _Tile, side: str) -> Tensor | None:
        """1 where dropout keeps an element and 0 where it drops it; None without dropout."""
        if context.dropout is None:
            return None
        row = context.row_P[side][tile.span]
        return context.dropout.keep_into(row, self._scratch, self._keep[side][: len(row)])


class _MixloraFfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, context: _Context, *pairs: Tensor | None) -> Tensor:
        base, dtype = context.base, x_TD.dtype
        a_in, a_down, b_down, b_in = _matrices(pairs, dtype)
        gate_TF, up_TF = x_TD @ base.gate_FD.T, x_TD @ base.up_FD.T
        hidden_TF = torch.zeros_like(gate_TF)
        y_TD = torch.zeros_like(x_TD)
        weight = weight_TK.detach().flatten().to(dtype)
        work = _Workspace(context, x_TD, wide=4, narrow=2)
        for tile in context.tiles:
            s, rows = tile.slot, tile.token
            g, u, h, h_in, x, y = work.take(len(rows))
            torch.index_select(gate_TF, 0, rows, out=g)
            torch.index_select(up_TF, 0, rows, out=u)
            if a_in is not None:
                torch.index_select(x_TD, 0, rows, out=x)
                x_in = _drop(x, work.keep(context, tile, "in"), out=x)
                _expand(context, (g, u), x_in @ a_in[s].T, b_in, s)
            activation_into(base.activation, g, h)
            h.mul_(u).mul_(weight[tile.pair, None])
            hidden_TF.index_add_(0, rows, h)
            if a_down is not None and b_down is not None:
                low = _drop(h, work.keep(context, tile, "down"), out=h_in) @ a_down[s].T
                y_TD.index_add_(0, rows, torch.mm(low, b_down[s].T, out=y), alpha=context.down_scale)
        y_TD.addmm_(hidden_TF, base.down_DF.T)
        ctx.context = context
        ctx.save_for_backward(x_TD, weight_TK, gate_TF, up_TF, *pairs)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        context: _Context = ctx.context
        x_TD, weight_TK, gate_TF, up_TF, *pairs = ctx.saved_tensors
        base, dtype = context.base, x_TD.dtype
        a_in, a_down, b_down, b_in = _matrices(pairs, dtype)
        d_pairs: list[Any] = [None if p is None else torch.zeros_like(p) for p in pairs[:2]]
        da_down, db_down = d_pairs
        da_in: Any = None if a_in is None else torch.zeros_like(a_in, dtype=pairs[2].dtype)
        db_in = [torch.zeros_like(b) for b in pairs[2 + len(b_in) :]]
        dy_TD = grads[0].contiguous()
        dhidden_TF = dy_TD @ base.down_DF
        dgate_TF, dup_TF = torch.zeros_like(gate_TF), torch.zeros_like(up_TF)
        dx_TD = torch.zeros_like(x_TD)
        dweight = torch.zeros(weight_TK.numel(), dtype=torch.float32 if dtype.itemsize < 4 else dtype, device=dy_TD.device)
        weight = weight_TK.flatten().to(dtype)
        work = _Workspace(context, x_TD, wide=7, narrow=3)
        for tile in context.tiles:
            s, rows = tile.slot, tile.token
            g, u, h, dh, dg, du, h_in, x, dy, dx = work.take(len(rows))
            w = weight[tile.pair, None]
            torch.index_select(gate_TF, 0, rows, out=g)
            torch.index_select(up_TF, 0, rows, out=u)
            if a_in is not None:
                torch.index_select(x_TD, 0, rows, out=x)
                keep_x = work.keep(context, tile, "in")
                x_in = _drop(x, keep_x, out=x)
                low_x = x_in @ a_in[s].T
                _expand(context, (g, u), low_x, b_in, s)
            activation_into(base.activation, g, du)  # du holds act(g) until the end of the tile
            torch.mul(du, u, out=h)

            torch.index_select(dhidden_TF, 0, rows, out=dh)
            if a_down is not None and b_down is not None:
                torch.index_select(dy_TD, 0, rows, out=dy)
                keep = work.keep(context, tile, "down")
                h_dropped = _drop(h, keep, out=h_in)
                low_h = h_dropped @ a_down[s].T
                low_dy = (dy @ b_down[s]).mul_(context.down_scale)
                if keep is None:
                    dh.addmm_(low_dy, a_down[s])
                else:
                    dh.addcmul_(torch.mm(low_dy, a_down[s], out=dg), keep)
                _add_product(da_down[s], low_dy.mul_(w).T, h_dropped)
                _add_product(db_down[s], dy.T, low_h.mul_(w).mul_(context.down_scale))
            torch.mul(dh, h, out=dg)
            dweight[tile.pair] = dg.sum(dim=1, dtype=dweight.dtype)

            dh.mul_(w)
            torch.mul(dh, u, out=u)
            activation_backward_into(base.activation, u, g, dg)
            du.mul_(dh)
            dgate_TF.index_add_(0, rows, dg)
            dup_TF.index_add_(0, rows, du)
            if a_in is not None:
                dlow = torch.empty_like(low_x)
                for part, b, db in zip(context.inputs, b_in, db_in, strict=True):
                    dout = (dg, du)[part.output]
                    dlow[:, part.columns] = torch.mm(dout, b[s]).mul_(part.scale)
                    _add_product(db[s], dout.T, low_x[:, part.columns] * part.scale)
                _add_product(da_in[s], dlow.T, x_in)
                dx_TD.index_add_(0, rows, _drop(torch.mm(dlow, a_in[s], out=dx), keep_x, out=dx))
        dx_TD.addmm_(dgate_TF, base.gate_FD).addmm_(dup_TF, base.up_FD)
        d_pairs += [] if da_in is None else [da_in[:, part.columns] for part in context.inputs]
        return dx_TD, dweight.view_as(weight_TK).to(weight_TK.dtype), None, *d_pairs, *db_in


def _matrices(pairs: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Any, Any, Any, list[Any]]:
    """A of gate and up side by side, A and B of down, and the B of gate and up, in `dtype`.

    Gate and up share their input, so one GEMM shrinks it for both. Their copy is made anew in the backward pass: what is saved for that
    are views of the replicas, so that the engine can free them between the passes.
    """
    converted: list[Any] = [None if p is None else p.detach().to(dtype) for p in pairs]
    a_down, b_down, *rest = converted
    inputs = len(rest) // 2
    return torch.cat(rest[:inputs], dim=1) if rest else None, a_down, b_down, rest[inputs:]


def _drop(values: Tensor, keep: Tensor | None, out: Tensor) -> Tensor:
    return values if keep is None else torch.mul(values, keep, out=out)


def _expand(context: _Context, gate_up: tuple[Tensor, Tensor], low: Tensor, b_in: list[Tensor], slot: int) -> None:
    for part, b in zip(context.inputs, b_in, strict=True):
        gate_up[part.output].addmm_(low[:, part.columns], b[slot].T, alpha=part.scale)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, summed over tiles in out's type."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out += left @ right
