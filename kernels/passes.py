"""The passes of the MixLoRA feed-forward in Triton: each allocates what it returns and launches its kernels.

Between the passes lie GEMMs over tokens. Rows of pairs that are computed elsewhere are left unwritten.
`hecate.kernels.passes_reference` has the same functions in plain torch.

Shapes: T tokens, K choices, P pairs, S slots, F ffn hidden, C columns summed over, N other columns, R rank. Matrices [S, N, R] are views
of any strides; they are cast to the activations' type when they are loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hecate.kernels.mixlora_launches import (
    Adapter,
    Keep,
    config_for,
    expand_launch,
    gated_backward_launch,
    gated_launch,
    num_column_programs,
    outer_launch,
    partial_sums,
    rank_of,
    shrink_launch,
    sum_chunks_launch,
)
from hecate.kernels.pair_blocks import PairBlocks


def shrink(
    x: Tensor, blocks: PairBlocks, matrices: tuple[Tensor, ...], scales: tuple[float, ...], keep: Keep | None, *, gather: bool
) -> tuple[Tensor, ...]:
    """scale_j · drop(x) A_j for one or two matrices [S, C, R], in one read of x: each [P, R] in x's type.

    Args:
        x: [T, C], of which each pair reads its token's row (gather), or [P, C].
    """
    lows = tuple(x.new_empty((blocks.order.num_pairs, matrix.shape[2])) for matrix in matrices)
    config = config_for("mixlora_shrink", rank_of(*matrices), x)
    shrink_launch(x, blocks, matrices, scales, keep, lows, gather=gather, config=config).run()
    return lows


def expand(adapters: tuple[Adapter, ...], blocks: PairBlocks, keep: Keep | None) -> Tensor:
    """drop(sum_j low_j M_j'), [P, N], of one or two adapters; dropout without its scale."""
    low, matrix = adapters[0].low_PR, adapters[0].matrix_SNR
    out_PN = low.new_empty((blocks.order.num_pairs, matrix.shape[1]))
    expand_launch(adapters, blocks, keep, out_PN, config=config_for("mixlora_expand", rank_of(*adapters), low)).run()
    return out_PN


def gated(
    gate_TF: Tensor,
    up_TF: Tensor,
    blocks: PairBlocks,
    gate: Adapter | None,
    up: Adapter | None,
    a_down_SFR: Tensor | None,
    down_scale: float,
    keep: Keep | None,
    activation: str,
) -> tuple[Tensor, Tensor | None]:
    """h = act(G + low_gate B_gate') · (U + low_up B_up') of each pair, [P, F], and down_scale · drop(h) A_down, [P, R]."""
    pairs, ffn = blocks.order.num_pairs, gate_TF.shape[1]
    config = config_for("mixlora_gated", rank_of(gate, up, a_down_SFR), gate_TF)
    h_PF, partial = gate_TF.new_empty((pairs, ffn)), None
    if a_down_SFR is not None:
        partial = gate_TF.new_empty((num_column_programs(ffn, config), pairs, a_down_SFR.shape[2]), dtype=torch.float32)
    gated_launch(gate_TF, up_TF, blocks, gate, up, a_down_SFR, keep, activation, h_PF, partial, config=config).run()
    return h_PF, None if partial is None else partial.sum(0).mul_(down_scale).to(h_PF.dtype)


def gated_backward(
    gate_TF: Tensor,
    up_TF: Tensor,
    dhidden_TF: Tensor,
    weight_TK: Tensor,
    blocks: PairBlocks,
    gate: Adapter | None,
    up: Adapter | None,
    down: Adapter | None,
    keep: Keep | None,
    activation: str,
    pair_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The backward pass of `gated` and of the weighted sum after it.

    Args:
        dhidden_TF: the gradient of the tokens' weighted hidden states.
        down: down_scale · dy B_down of each pair, [P, R], with A_down [S, F, R].

    Returns:
        Gradients of each pair's gate and up outputs, [P, F], the pair's weight included; of the weights, float32 [T, K], zero for choices
        elsewhere; of B_gate, B_up [S, F, R] and A_down [S, R, F], in `pair_dtype`, None for a projection without adapter.
    """
    pairs, ffn = blocks.order.num_pairs, gate_TF.shape[1]
    config = config_for("mixlora_gated_backward", rank_of(gate, up, down), gate_TF)
    dgate_PF, dup_PF = gate_TF.new_empty((pairs, ffn)), gate_TF.new_empty((pairs, ffn))
    dweight = gate_TF.new_empty((-(-ffn // config.blocks["BN"]), pairs), dtype=torch.float32)
    part_gate, part_up, part_down = (
        None if adapter is None else partial_sums(blocks.chunks, ffn, adapter.low_PR.shape[1]) for adapter in (gate, up, down)
    )
    gated_backward_launch(
        gate_TF,
        up_TF,
        dhidden_TF,
        weight_TK,
        blocks,
        gate,
        up,
        down,
        keep,
        activation,
        dgate_PF,
        dup_PF,
        dweight,
        (part_gate, part_up, part_down),
        config=config,
    ).run()
    place_TK = blocks.order.place_TK
    dweight_TK = dweight.sum(0)[place_TK.clamp(min=0)].masked_fill(place_TK < 0, 0.0) if pairs else dweight.new_zeros(place_TK.shape)
    db_gate, db_up = (None if part is None else _summed(part, blocks, pair_dtype) for part in (part_gate, part_up))
    da_down = None if part_down is None else _summed(part_down, blocks, pair_dtype, transposed=True)
    return dgate_PF, dup_PF, dweight_TK, db_gate, db_up, da_down


def outer(
    x_TN: Tensor,
    blocks: PairBlocks,
    lows: tuple[Tensor, ...],
    weight_TK: Tensor | None,
    keep: Keep | None,
    pair_dtype: torch.dtype,
    *,
    transposed: bool,
) -> tuple[Tensor, ...]:
    """The sum over each slot's pairs of drop(x)[token] and weight · low_j: [S, N, R] in `pair_dtype`, or [S, R, N] if transposed.

    One or two lows; weights with one only.
    """
    rank = rank_of(*lows)
    partials = tuple(partial_sums(blocks.chunks, x_TN.shape[1], low.shape[1]) for low in lows)
    outer_launch(x_TN, blocks, lows, weight_TK, keep, partials, config=config_for("mixlora_outer", rank, x_TN)).run()
    return tuple(_summed(partial, blocks, pair_dtype, transposed=transposed) for partial in partials)


def _summed(partial_CNR: Tensor, blocks: PairBlocks, dtype: torch.dtype, *, transposed: bool = False) -> Tensor:
    """[S, N, R], or [S, R, N], the sums over each slot's chunks."""
    _, width, rank = partial_CNR.shape
    shape = (blocks.order.num_slots, rank, width) if transposed else (blocks.order.num_slots, width, rank)
    out = partial_CNR.new_empty(shape, dtype=dtype)
    view = out.transpose(1, 2) if transposed else out
    sum_chunks_launch(partial_CNR, blocks.first_chunk, view, config=config_for("mixlora_sum_chunks", rank, partial_CNR)).run()
    return out
