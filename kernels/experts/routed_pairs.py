"""The weighted sum of each token's low-rank pairs, in plain torch: what experts over a linear layer add to its output.

Assignments are sorted by expert and computed in tiles of one expert; pairs whose ranks are few in all are multiplied densely instead
(`masked_pairs`). A layer keeps x and each assignment's A x for its backward pass.

Shapes: T tokens, K assignments of a token, P assignments on this rank, S slots, r rank, I inputs and O outputs, m assignments of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hecate.kernels.common.assignments import RoutedTokens, Tile, assignment_tiles
from hecate.kernels.common.dropout import Dropout, RowDropout, ffn_dropout
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.experts.masked_pairs import masked_pairs, masking_pays

_TILE_ROWS = 512
"""the assignments of a tile: enough rows for GEMMs at full speed, and few enough for small temporaries"""


def routed_pairs(routed: RoutedTokens, pairs: LowRankPairs, *, dropout: Dropout | None = None) -> Tensor:
    """Return y = sum_k w_k s B A dropout(x), [tokens, outputs], the pair being that of the assignment's expert.

    It computes in x's dtype; gradients of the pairs have their own dtype. It is differentiable in x, weights and pairs. Zero where no
    assignment of a token is computed on this rank.

    Args:
        dropout: the dropout of the pairs' inputs; `routed` must then have `token_T` and `expert_S`.
    """
    if dropout is None and masking_pays(routed, pairs):
        return masked_pairs(routed, pairs)
    return sorted_pairs(routed, pairs, dropout=dropout)


def sorted_pairs(routed: RoutedTokens, pairs: LowRankPairs, *, dropout: Dropout | None = None) -> Tensor:
    """As `routed_pairs`, on sorted assignments whatever the sizes."""
    tiles, order_P = assignment_tiles(routed.slot_TK, _TILE_ROWS)
    of_rows = ffn_dropout(dropout, routed, order_P)
    rows = None if of_rows is None else of_rows.gate_up
    scale = pairs.scale * (1.0 if rows is None else rows.scale)
    return _RoutedPairs.apply(routed.x_TD, routed.weight_TK, scale, tiles, rows, *pairs.matrices)


class _RoutedPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_TK: Tensor, scale: float, tiles: list[Tile], dropout: RowDropout | None, *pairs: Any
    ) -> Tensor:
        a_SrI, b_SOr, _ = pairs
        a, b = a_SrI.to(x_TI.dtype), b_SOr.to(x_TI.dtype)
        weight = weight_TK.detach().flatten().to(x_TI.dtype)
        low_Pr = x_TI.new_empty((tiles[-1].span.stop if tiles else 0, a.shape[1]))
        y_TO = x_TI.new_zeros((len(x_TI), b.shape[1]))
        for tile in tiles:
            low = torch.mm(_dropped(x_TI[tile.token], dropout, tile), a[tile.slot].T, out=low_Pr[tile.span])
            y_TO.index_add_(0, tile.token, (low * (weight[tile.assignment, None] * scale)) @ b[tile.slot].T)
        ctx.scale, ctx.tiles = scale, tiles
        ctx.dropped_levels = None if dropout is None else dropout.dropped_levels
        ctx.save_for_backward(x_TI, weight_TK, low_Pr, None if dropout is None else dropout.word_R, *pairs)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = grads
        x_TI, weight_TK, low_Pr, word_P, a_SrI, b_SOr, b_for_a_SOr = ctx.saved_tensors
        dropout = None if word_P is None else RowDropout(word_P, ctx.dropped_levels)
        a, b = a_SrI.to(x_TI.dtype), b_SOr.to(x_TI.dtype)
        sums = torch.promote_types(x_TI.dtype, torch.float32)
        weight = weight_TK.flatten().to(x_TI.dtype)
        dweight = torch.zeros(weight.shape, dtype=sums, device=x_TI.device)
        b_for_a = None if b_for_a_SOr is None else b_for_a_SOr.to(x_TI.dtype)
        da_SrI, db_SOr = torch.zeros_like(a_SrI) if ctx.needs_input_grad[5] else None, torch.zeros_like(b_SOr)
        dx_TI = torch.zeros_like(x_TI) if ctx.needs_input_grad[0] else None
        for tile in ctx.tiles:
            slot, low, w = tile.slot, low_Pr[tile.span], weight[tile.assignment, None]
            dy = dy_TO[tile.token]
            dlow = (dy @ b[slot]).mul_(ctx.scale)
            dweight[tile.assignment] = (dlow * low).sum(1, dtype=sums)
            dlow.mul_(w)
            db_SOr[slot] += dy.T @ (low * (w * ctx.scale))
            if da_SrI is not None:
                of_a = dlow if b_for_a is None else (dy @ b_for_a[slot]).mul_(w * ctx.scale)
                da_SrI[slot] += of_a.T @ _dropped(x_TI[tile.token], dropout, tile)
            if dx_TI is not None:
                dx_TI.index_add_(0, tile.token, _dropped(dlow @ a[slot], dropout, tile))
        return dx_TI, dweight.view_as(weight_TK).to(weight_TK.dtype), None, None, None, da_SrI, db_SOr, None


def _dropped(row_mI: Tensor, dropout: RowDropout | None, tile: Tile) -> Tensor:
    """The rows of a tile after dropout, without its scale; a tensor that nothing else uses is overwritten."""
    return row_mI if dropout is None else row_mI.mul_(dropout.of(tile.span).keep(row_mI.shape[1], row_mI.dtype))
