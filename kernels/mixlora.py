"""The MixLoRA feed-forward over a shared frozen base, forward and backward.

Two exact savings: the base gate and up projections run once per token, not once per (token, choice); the base down projection is
linear, so it runs once per token, after the weighted hidden states of the token's experts have been summed. All six large GEMMs have
T rows. The rest runs in tiles of (token, choice) pairs of one expert, small enough to stay in the cache; the backward pass computes
them again from the saved G = x Wg' and U = x Wu', so what a layer keeps is x, G and U, whatever k is.

Shapes: T tokens, D hidden, F ffn hidden, K choices, S slots, r LoRA rank, m pairs of a tile.
"""

from __future__ import annotations

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
            experts in the slots).

    Returns:
        [tokens, hidden]; zero where no choice of a token is here. Source: MixLoRA (arXiv 2404.15159) §3.
    """
    assert loras, "a MixLoRA layer without adapters is its base FFN"
    pairs = [getattr(loras.get(name), part, None) for name in PROJECTIONS for part in ("a_SrI", "b_SOr")]
    scales = [loras[name].scale if name in loras else 0.0 for name in PROJECTIONS]
    context = _Context(base, scales, _tiles(slot_TK, base, x_TD.element_size()), dropout, token_T, expert_S)
    return _MixloraFfn.apply(x_TD, weight_TK, context, *pairs)


@dataclass(frozen=True)
class _Tile:
    """Pairs of one slot."""

    slot: int
    token: Tensor
    """int64 [m]"""
    pair: Tensor
    """int64 [m], index into the flattened [T, K]"""


@dataclass(frozen=True)
class _Context:
    base: FfnBase
    scales: list[float]
    tiles: list[_Tile]
    dropout: Dropout | None
    token_T: Tensor | None
    expert_S: Tensor | None

    def mask(self, tile: _Tile, projection: str, width: int, dtype: torch.dtype) -> Tensor | None:
        if self.dropout is None:
            return None
        assert self.token_T is not None
        assert self.expert_S is not None
        stream = dropout_stream(int(self.expert_S[tile.slot]), projection)
        return self.dropout.mask(self.token_T[tile.token], stream, width, dtype)


def _tiles(slot_TK: Tensor, base: FfnBase, element_size: int) -> list[_Tile]:
    rows = max(16, _TILE_BYTES // (base.gate_FD.shape[0] * element_size))
    slot = slot_TK.flatten()
    order = torch.argsort(slot, stable=True)
    sizes = torch.bincount(slot + 1).tolist()
    tiles, start = [], 0
    for index, size in enumerate(sizes):
        if index > 0:
            for pair in order[start : start + size].split(rows) if size else ():
                tiles.append(_Tile(index - 1, pair // slot_TK.shape[1], pair))
        start += size
    return tiles


class _Workspace:
    """The [m, F] buffers of a tile, allocated once a call: fresh memory costs more than the arithmetic on it."""

    def __init__(self, context: _Context, like: Tensor, count: int) -> None:
        rows = max((len(tile.token) for tile in context.tiles), default=0)
        self._buffers = like.new_empty((count, rows, context.base.gate_FD.shape[0]))

    def take(self, rows: int) -> list[Tensor]:
        return [buffer[:rows] for buffer in self._buffers]


def _shrink(inputs: Tensor, a_rI: Tensor, mask: Tensor | None) -> Tensor:
    return (inputs if mask is None else inputs * mask) @ a_rI.T


class _MixloraFfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, context: _Context, *pairs: Tensor | None) -> Tensor:
        base, dtype = context.base, x_TD.dtype
        scale_g, scale_u, scale_d = context.scales
        a_g, b_g, a_u, b_u, a_d, b_d = (None if p is None else p.detach().to(dtype) for p in pairs)
        gate_TF, up_TF = x_TD @ base.gate_FD.T, x_TD @ base.up_FD.T
        hidden_TF = torch.zeros_like(gate_TF)
        y_TD = torch.zeros_like(x_TD)
        weight = weight_TK.detach().flatten().to(dtype)
        workspace = _Workspace(context, gate_TF, 3)
        for tile in context.tiles:
            s, rows = tile.slot, tile.token
            g, u, h = workspace.take(len(rows))
            x = x_TD[rows]
            torch.index_select(gate_TF, 0, rows, out=g)
            torch.index_select(up_TF, 0, rows, out=u)
            if a_g is not None and b_g is not None:
                g.addmm_(_shrink(x, a_g[s], context.mask(tile, "gate_proj", x.shape[1], dtype)), b_g[s].T, alpha=scale_g)
            if a_u is not None and b_u is not None:
                u.addmm_(_shrink(x, a_u[s], context.mask(tile, "up_proj", x.shape[1], dtype)), b_u[s].T, alpha=scale_u)
            activation_into(base.activation, g, h)
            h.mul_(u).mul_(weight[tile.pair, None])
            hidden_TF.index_add_(0, rows, h)
            if a_d is not None and b_d is not None:
                low = _shrink(h, a_d[s], context.mask(tile, "down_proj", h.shape[1], dtype))
                y_TD.index_add_(0, rows, low @ b_d[s].T, alpha=scale_d)
        y_TD.addmm_(hidden_TF, base.down_DF.T)
        ctx.context = context
        ctx.save_for_backward(x_TD, weight_TK, gate_TF, up_TF, *pairs)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TD,) = grads
        context: _Context = ctx.context
        x_TD, weight_TK, gate_TF, up_TF, *pairs = ctx.saved_tensors
        base, dtype = context.base, x_TD.dtype
        scale_g, scale_u, scale_d = context.scales
        a_g, b_g, a_u, b_u, a_d, b_d = (None if p is None else p.to(dtype) for p in pairs)
        da_g, db_g, da_u, db_u, da_d, db_d = d_pairs = [None if p is None else torch.zeros_like(p) for p in pairs]
        dy_TD = dy_TD.contiguous()
        dhidden_TF = dy_TD @ base.down_DF
        dgate_TF, dup_TF = torch.zeros_like(gate_TF), torch.zeros_like(up_TF)
        dx_TD = torch.zeros_like(x_TD)
        dweight = torch.zeros(weight_TK.numel(), dtype=torch.float32 if dtype.itemsize < 4 else dtype, device=dy_TD.device)
        weight = weight_TK.flatten().to(dtype)
        workspace = _Workspace(context, gate_TF, 6)
        for tile in context.tiles:
            s, rows = tile.slot, tile.token
            g, u, h, dh, dg, du = workspace.take(len(rows))
            x, dy, w = x_TD[rows], dy_TD[rows], weight[tile.pair, None]

            torch.index_select(gate_TF, 0, rows, out=g)
            torch.index_select(up_TF, 0, rows, out=u)
            if a_g is not None and b_g is not None:
                mask_g = context.mask(tile, "gate_proj", x.shape[1], dtype)
                low_g = _shrink(x, a_g[s], mask_g)
                g.addmm_(low_g, b_g[s].T, alpha=scale_g)
            if a_u is not None and b_u is not None:
                mask_u = context.mask(tile, "up_proj", x.shape[1], dtype)
                low_u = _shrink(x, a_u[s], mask_u)
                u.addmm_(low_u, b_u[s].T, alpha=scale_u)
            activation_into(base.activation, g, du)  # du holds act(g) until the end of the tile
            torch.mul(du, u, out=h)

            torch.index_select(dhidden_TF, 0, rows, out=dh)
            if a_d is not None and b_d is not None and da_d is not None and db_d is not None:
                mask_d = context.mask(tile, "down_proj", h.shape[1], dtype)
                low_h = _shrink(h, a_d[s], mask_d)
                low_dy = (dy @ b_d[s]).mul_(scale_d)
                if mask_d is None:
                    dh.addmm_(low_dy, a_d[s])
                else:
                    dh.addcmul_(low_dy @ a_d[s], mask_d)
                low_dy.mul_(w)
                da_d[s] += low_dy.T @ (h if mask_d is None else h * mask_d)
                db_d[s] += scale_d * (dy.T @ (low_h * w))
            torch.mul(dh, h, out=dg)
            dweight[tile.pair] = dg.sum(dim=1, dtype=dweight.dtype)

            dh.mul_(w)
            torch.mul(dh, u, out=u)
            activation_backward_into(base.activation, u, g, dg)
            du.mul_(dh)
            dgate_TF.index_add_(0, rows, dg)
            dup_TF.index_add_(0, rows, du)
            if a_g is not None and b_g is not None and da_g is not None and db_g is not None:
                dx = _expand_backward(dg, x, low_g, a_g[s], b_g[s], mask_g, scale_g, da_g[s], db_g[s])
                dx_TD.index_add_(0, rows, dx)
            if a_u is not None and b_u is not None and da_u is not None and db_u is not None:
                dx = _expand_backward(du, x, low_u, a_u[s], b_u[s], mask_u, scale_u, da_u[s], db_u[s])
                dx_TD.index_add_(0, rows, dx)
        dx_TD.addmm_(dgate_TF, base.gate_FD).addmm_(dup_TF, base.up_FD)
        return dx_TD, dweight.view_as(weight_TK).to(weight_TK.dtype), None, *d_pairs


def _expand_backward(
    dout: Tensor,
    x: Tensor,
    low: Tensor,
    a_rI: Tensor,
    b_Or: Tensor,
    mask: Tensor | None,
    scale: float,
    da: Tensor,
    db: Tensor,
) -> Tensor:
    """Adds one tile's gradients of A and B to `da` and `db`; returns the gradient of x through the pair."""
    dlow = (dout @ b_Or).mul_(scale)
    db += scale * (dout.T @ low)
    da += dlow.T @ (x if mask is None else x * mask)
    dx = dlow @ a_rI
    return dx if mask is None else dx.mul_(mask)
