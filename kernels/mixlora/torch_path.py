"""The MixLoRA feed-forward over a shared frozen FFN, in plain torch.

It makes two exact savings. The FFN's gate and up projections run once per token, not once per assignment. Its down projection is linear,
so it also runs once per token, after the weighted hidden states of the token's experts have been summed. All six large GEMMs have T rows.

The rest runs in tiles of assignments of one expert, small enough to stay in the cache. The backward pass recomputes it from G = x Wg',
U = x Wu' and the inputs multiplied by A, so a layer keeps x, G, U and r numbers per assignment and projection. The router's weights are
applied where tensors are narrow, or else while a token's assignments are summed.

Shapes: T tokens, D hidden, F ffn hidden, K assignments of a token, P assignments on this rank, S slots, r LoRA rank, m assignments of a
tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.kernels.common.assignments import RoutedTokens, Tile, assignment_tiles
from hecate.kernels.common.dropout import Dropout, DropoutMasks, FfnDropout, ffn_dropout, masked
from hecate.kernels.common.ffn import FfnBase, activation_backward_into, activation_into, product_into
from hecate.kernels.common.low_rank import LowRankPairs, ShrunkInput, shrunk_inputs

_TILE_BYTES = 1 << 20
"""the bytes of one [m, F] buffer of a tile, of which three to six are in use at a time"""


def mixlora_ffn(routed: RoutedTokens, base: FfnBase, pairs: dict[str, LowRankPairs], *, dropout: Dropout | None = None) -> Tensor:
    """Return the weighted sum of each token's experts, each of which is the base FFN plus its low-rank pairs.

    It computes in x's dtype; gradients of the pairs have their own dtype. It is differentiable in x, weights and pairs, but not in the
    base. On CUDA it reads the group sizes back to the host once per call.

    Args:
        pairs: the pairs by projection (`gate_proj`, `up_proj`, `down_proj`). A projection that is left out has no pair. At least one
            must be given.
        dropout: the dropout of the pairs' inputs; `routed` must then have `token_T` and `expert_S`. Gate and up have the same input.

    Returns:
        [tokens, hidden]; zero where no assignment of a token is computed on this rank. Source: MixLoRA (arXiv 2404.15159) §3.
    """
    assert pairs, "a MixLoRA layer without adapters is its base FFN"
    rows = max(16, _TILE_BYTES // (base.gate_FD.shape[0] * routed.x_TD.element_size()))
    tiles, order_P = assignment_tiles(routed.slot_TK, rows)
    of_rows = ffn_dropout(dropout, routed, order_P)
    grow = 1.0 if of_rows is None else of_rows.scale
    inputs = shrunk_inputs(pairs, base.gate_FD.shape[0], grow)
    down = pairs.get("down_proj")
    down_scale, place_TK = 0.0 if down is None else down.scale * grow, _places(order_P, routed.slot_TK)
    context = _MixloraContext(base, tuple(inputs.values()), down_scale, tiles, order_P, place_TK, of_rows)
    matrices = [(None, None, None) if down is None else down.matrices, *(pairs[name].matrices for name in inputs)]
    return _MixloraFfn.apply(routed.x_TD, routed.weight_TK, context, *itertools.chain(*matrices))


def _places(order_P: Tensor, slot_TK: Tensor) -> Tensor:
    """Return the index of each assignment in the order, int64 [T, K]; P if another rank computes it."""
    places = torch.arange(len(order_P), device=order_P.device)
    return torch.full_like(slot_TK, len(order_P)).view(-1).index_copy_(0, order_P, places).view_as(slot_TK)


@dataclass(frozen=True)
class _MixloraContext:
    """The values that both passes need, apart from the tensors that are differentiated."""

    base: FfnBase
    inputs: tuple[ShrunkInput, ...]
    down_scale: float
    tiles: list[Tile]
    order_P: Tensor
    """int64: the assignments that are computed on this rank, as indices into the flattened [T, K], in the order of the tiles"""
    place_TK: Tensor
    """int64: the index of each assignment in that order; P if another rank computes it"""
    dropout: FfnDropout | None
    """the dropout of each assignment, in the order of the tiles"""

    def per_assignment(self, like: Tensor, width: int) -> Tensor:
        """Return an unfilled tensor [P + 1, width] whose last row, for assignments that other ranks compute, is zero."""
        rows = like.new_empty((len(self.order_P) + 1, width))
        rows[-1].zero_()
        return rows

    def combine(self, value_PW: Tensor, weight_TK: Tensor) -> Tensor:
        """Return the weighted sums over each token's assignments, [T, width], of a tensor that `per_assignment` has returned.

        This takes one pass; weighting the rows, clearing the sums and adding would take four.
        """
        return F.embedding_bag(self.place_TK, value_PW, mode="sum", per_sample_weights=weight_TK)


class _MixloraBuffers:
    """The buffers of a tile, allocated once per call, because allocating memory costs more than the arithmetic on it."""

    def __init__(self, context: _MixloraContext, like_TD: Tensor, *, wide: int, narrow: int) -> None:
        rows = max((len(tile.token) for tile in context.tiles), default=0)
        ffn, hidden = context.base.gate_FD.shape
        self._gate_up = like_TD.new_empty((rows, 2 * ffn))
        self._wide = like_TD.new_empty((wide, rows, ffn))
        self._narrow = like_TD.new_empty((narrow, rows, hidden))
        self.masks = DropoutMasks(context.dropout, rows, hidden, ffn, like_TD)

    def take(self, rows: int) -> tuple[Tensor, ...]:
        """Return buffers of [rows, 2 F], of [rows, F] and of [rows, D], in this order."""
        return self._gate_up[:rows], *self._wide[:, :rows].unbind(), *self._narrow[:, :rows].unbind()


class _MixloraFfn(torch.autograd.Function):
    """Its last arguments are A, B and what stands for B in A's gradient (None: B), of down, and then of each pair of gate and up. Those of
    down are None if it has no pair."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, context: _MixloraContext, *matrices: Tensor | None) -> Tensor:
        base, dtype = context.base, x_TD.dtype
        a_in, (a_down, b_down, _), inputs = _converted(context, matrices, dtype)
        ffn, hidden = base.gate_FD.shape
        num_assignments = len(context.order_P)
        gate_up_TF = x_TD.new_empty((len(x_TD), 2 * ffn))
        torch.mm(x_TD, base.gate_FD.T, out=gate_up_TF[:, :ffn])
        torch.mm(x_TD, base.up_FD.T, out=gate_up_TF[:, ffn:])
        h_PF = context.per_assignment(x_TD, ffn)
        y_PD = context.per_assignment(x_TD, hidden) if a_down is not None else None
        low_in_Pr = x_TD.new_empty((num_assignments, a_in.shape[1])) if a_in is not None else None
        low_down_Pr = x_TD.new_empty((num_assignments, a_down.shape[1])) if a_down is not None else None
        work = _MixloraBuffers(context, x_TD, wide=1, narrow=1)
        for tile in context.tiles:
            s, rows, span = tile.slot, tile.token, tile.span
            gate_up, h_in, x = work.take(len(rows))
            torch.index_select(gate_up_TF, 0, rows, out=gate_up)
            if low_in_Pr is not None:
                torch.index_select(x_TD, 0, rows, out=x)
                torch.mm(masked(x, work.masks.gate_up(span), out=x), a_in[s].T, out=low_in_Pr[span])
                _expand(context, gate_up, low_in_Pr[span], inputs, s)
            h = activation_into(base.activation, gate_up[:, :ffn], h_PF[span]).mul_(gate_up[:, ffn:])
            if y_PD is not None and low_down_Pr is not None:
                torch.mm(masked(h, work.masks.down(span), out=h_in), a_down[s].T, out=low_down_Pr[span])
                torch.mm(low_down_Pr[span], b_down[s].T, out=y_PD[span])
        weight = weight_TK.detach().to(dtype)
        hidden_TF = context.combine(h_PF, weight)
        y_TD = hidden_TF @ base.down_DF.T if y_PD is None else context.combine(y_PD, weight).addmm_(hidden_TF, base.down_DF.T)
        ctx.context = context
        ctx.save_for_backward(x_TD, weight_TK, gate_up_TF, low_in_Pr, low_down_Pr, *matrices)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        context: _MixloraContext = ctx.context
        x_TD, weight_TK, gate_up_TF, low_in_Pr, low_down_Pr, *matrices = ctx.saved_tensors
        base, dtype = context.base, x_TD.dtype
        of_pairs = _PairGradients.of(context, matrices, dtype, ctx.needs_input_grad[3:])
        ffn, hidden = base.gate_FD.shape
        dy_TD = grads[0].contiguous()
        dhidden_TF = dy_TD @ base.down_DF
        dgate_up_PF = context.per_assignment(x_TD, 2 * ffn)
        dx_PD = context.per_assignment(x_TD, hidden) if low_in_Pr is not None else None
        dweight_P = torch.empty(len(context.order_P), dtype=torch.float32 if dtype.itemsize < 4 else dtype, device=dy_TD.device)
        weight = weight_TK.detach().to(dtype)
        weight_P1 = weight.flatten()[context.order_P, None]
        # Products with an assignment's weight are computed where tensors are narrow; `combine` applies the weight to wide ones.
        weighted_in_Pr, weighted_down_Pr = (None if low is None else low * weight_P1 for low in (low_in_Pr, low_down_Pr))
        work = _MixloraBuffers(context, x_TD, wide=4, narrow=2)
        for tile in context.tiles:
            rows, span = tile.token, tile.span
            gate_up, act, h, h_in, dh, x, dy = work.take(len(rows))
            gate, up = gate_up[:, :ffn], gate_up[:, ffn:]
            torch.index_select(gate_up_TF, 0, rows, out=gate_up)
            if low_in_Pr is not None:
                _expand(context, gate_up, low_in_Pr[span], of_pairs.inputs, tile.slot)
            activation_into(base.activation, gate, act)
            torch.mul(act, up, out=h)

            torch.index_select(dhidden_TF, 0, rows, out=dh)
            if weighted_down_Pr is not None:
                torch.index_select(dy_TD, 0, rows, out=dy)
                low = _Low(tile.slot, weighted_down_Pr[span], weight_P1[span], work.masks.down(span))
                of_pairs.add_down(low, dy, h, dh=dh, scratch=h_in)
            torch.sum(h.mul_(dh), dim=1, dtype=dweight_P.dtype, out=dweight_P[span])

            dgate, dup = dgate_up_PF[span, :ffn], dgate_up_PF[span, ffn:]
            torch.mul(act, dh, out=dup)
            activation_backward_into(base.activation, dh.mul_(up), gate, dgate)
            if weighted_in_Pr is not None and dx_PD is not None:
                torch.index_select(x_TD, 0, rows, out=x)
                low = _Low(tile.slot, weighted_in_Pr[span], weight_P1[span], work.masks.gate_up(span))
                of_pairs.add_inputs(low, dgate_up_PF[span], x, dx=dx_PD[span])
        dgate_TF, dup_TF = context.combine(dgate_up_PF, weight).split(ffn, dim=1)
        dx_TD = torch.zeros_like(x_TD) if dx_PD is None else context.combine(dx_PD, weight)
        dx_TD.addmm_(dgate_TF, base.gate_FD).addmm_(dup_TF, base.up_FD)
        dweight = torch.zeros(weight_TK.numel(), dtype=dweight_P.dtype, device=dy_TD.device).index_copy_(0, context.order_P, dweight_P)
        return dx_TD, dweight.view_as(weight_TK).to(weight_TK.dtype), None, *of_pairs.results()


@dataclass(frozen=True)
class _Low:
    """What the backward pass of a pair takes of a tile besides its inputs and outputs."""

    slot: int
    weighted_mr: Tensor
    """the pair's input multiplied by A, times the assignments' weights"""
    weight_m1: Tensor
    keep: Tensor | None
    """1 where dropout keeps an element of the pair's input; None: everywhere"""


@dataclass(frozen=True)
class _PairGradients:
    """The matrices of all pairs in the type of the computation, and their gradients, to which each tile adds its part."""

    context: _MixloraContext
    a_in: Any
    """A of gate and up side by side, scaled"""
    down: _Matrices
    inputs: list[_Matrices]
    da_in: Tensor | None
    """the gradient of the scaled A of gate and up, as `da_down` is that of down's, until `results`; None: A does not train"""
    da_down: Tensor | None
    db_down: Any
    db_in: list[Tensor]

    @staticmethod
    def of(context: _MixloraContext, matrices: Sequence[Tensor | None], dtype: torch.dtype, needed: Sequence[bool]) -> _PairGradients:
        a_in, down, inputs = _converted(context, matrices, dtype)
        da_down = torch.zeros_like(matrices[0]) if matrices[0] is not None and needed[0] else None
        da_in = torch.zeros_like(a_in, dtype=matrices[3].dtype) if any(needed[3::3]) and matrices[3] is not None else None
        db_down, *db_in = (None if matrix is None else torch.zeros_like(matrix) for matrix in matrices[1::3])
        return _PairGradients(context, a_in, down, inputs, da_in, da_down, db_down, db_in)  # type: ignore[arg-type]

    def add_down(self, low: _Low, dy: Tensor, h: Tensor, *, dh: Tensor, scratch: Tensor) -> None:
        """Add a tile's part of the gradients of down's pair, and to `dh` the gradient that goes through it."""
        (a, b, b_for_a), s = self.down, low.slot
        low_dy = dy @ b[s]
        if low.keep is None:
            dh.addmm_(low_dy, a[s])
        else:
            dh.addcmul_(torch.mm(low_dy, a[s], out=scratch), low.keep)
        if self.da_down is not None:
            of_a = low_dy if b_for_a is None else dy @ b_for_a[s]
            product_into(self.da_down[s], of_a.mul_(low.weight_m1).T, masked(h, low.keep, out=scratch), add=True)
        product_into(self.db_down[s], dy.T, low.weighted_mr, add=True)

    def add_inputs(self, low: _Low, dgate_up: Tensor, x: Tensor, *, dx: Tensor) -> None:
        """Add a tile's part of the gradients of the pairs of gate and up, and write the gradient that goes through them to x. `x` is
        overwritten."""
        s, parts = low.slot, self.context.inputs
        dlow = torch.empty_like(low.weighted_mr)
        for part, (_, b, _), db in zip(parts, self.inputs, self.db_in, strict=True):
            dout = dgate_up[:, part.output]
            torch.mm(dout, b[s], out=dlow[:, part.low])
            product_into(db[s], dout.T, low.weighted_mr[:, part.low], add=True)
        masked(torch.mm(dlow, self.a_in[s], out=dx), low.keep, out=dx)
        if self.da_in is None:
            return
        for part, (_, _, b_for_a) in zip(parts, self.inputs, strict=True):
            if b_for_a is not None:
                torch.mm(dgate_up[:, part.output], b_for_a[s], out=dlow[:, part.low])
        product_into(self.da_in[s], dlow.mul_(low.weight_m1).T, masked(x, low.keep, out=x), add=True)

    def results(self) -> list[Tensor | None]:
        """The gradients in the order of `_MixloraFfn`'s arguments."""
        da_down = None if self.da_down is None else self.da_down.mul_(self.context.down_scale)
        found = [da_down, self.db_down, None]
        for part, db in zip(self.context.inputs, self.db_in, strict=True):
            found += [None if self.da_in is None else self.da_in[:, part.low].mul_(part.scale), db, None]
        return found


_Matrices = tuple[Any, Any, Any]
"""A, B, and what stands for B in A's gradient (None: B)"""


def _converted(context: _MixloraContext, matrices: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Any, _Matrices, list[_Matrices]]:
    """Return A of gate and up side by side, then the matrices of down, and those of gate and up, in `dtype`.

    Gate and up share their input, so one GEMM computes A x for both. A is multiplied by the scale, because it is the smallest operand. The
    backward pass makes these copies again: only views of the replicas are saved for it, so the engine can free replicas between passes.
    """
    converted: list[Any] = [None if matrix is None else matrix.detach().to(dtype) for matrix in matrices]
    (a_down, *of_down), *inputs = (tuple(converted[first : first + 3]) for first in range(0, len(converted), 3))
    a_in = torch.cat([a * part.scale for (a, *_), part in zip(inputs, context.inputs, strict=True)], dim=1) if inputs else None
    return a_in, (None if a_down is None else a_down * context.down_scale, *of_down), inputs


def _expand(context: _MixloraContext, gate_up: Tensor, low: Tensor, inputs: list[_Matrices], slot: int) -> None:
    for part, (_, b, _) in zip(context.inputs, inputs, strict=True):
        gate_up[:, part.output].addmm_(low[:, part.low], b[slot].T)
