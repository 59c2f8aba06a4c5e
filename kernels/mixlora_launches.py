"""The launches of the MixLoRA passes, made from tensors and a configuration; outputs are among the tensors.

Apart from `hecate.kernels.passes`, which allocates outputs and runs these, so that tests can compile and tuners can time the very launches.

Shapes: T tokens, P pairs, S slots, F ffn hidden, C columns summed over, N other columns, R rank.
Matrices [S, N, R] are views of any strides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hecate.kernels.kernel_launch import Launch
from hecate.kernels.launch_config import LaunchConfig, Rule, choose, padded_rank
from hecate.kernels.mixlora_kernels import (
    expand_kernel,
    gated_backward_kernel,
    gated_kernel,
    outer_kernel,
    shrink_kernel,
    sum_chunks_kernel,
)
from hecate.kernels.pair_blocks import PairBlocks


@dataclass(frozen=True)
class Keep:
    """Dropout of one input of the pairs, without its scale."""

    row_P: Tensor
    """int32 [P], of `Dropout.rows`, in the order of the pairs"""
    dropped_levels: int


@dataclass(frozen=True)
class Adapter:
    """The shrunk input of a projection and the matrix that expands it."""

    low_PR: Tensor
    matrix_SNR: Tensor


def _rule(
    num_warps: int, num_stages: int, *, min_sm: int = 80, max_rank: int = 256, itemsizes: tuple[int, ...] = (2, 4), **blocks: int
) -> Rule:
    return Rule(LaunchConfig(blocks, num_warps, num_stages), min_sm=min_sm, max_rank=max_rank, itemsizes=itemsizes)


def _interpreter(**blocks: int) -> Rule:
    return Rule(LaunchConfig(blocks, 4, 1), min_sm=0)


# Products of float32 run on no tensor core and hold more in registers: smaller blocks.
_FP32 = (4,)
RULES: dict[str, tuple[Rule, ...]] = {
    # Rows of a tile and of a chunk, for all kernels of a layer: they share the maps.
    "mixlora_rows": (
        _rule(4, 1, max_rank=64, itemsizes=_FP32, ROWS=32, CHUNK_ROWS=1024),
        _rule(4, 1, itemsizes=_FP32, ROWS=16, CHUNK_ROWS=1024),
        _rule(4, 1, max_rank=128, ROWS=64, CHUNK_ROWS=1024),
        _rule(4, 1, ROWS=32, CHUNK_ROWS=1024),
        _interpreter(ROWS=16, CHUNK_ROWS=32),
    ),
    "mixlora_shrink": (
        _rule(4, 3, max_rank=64, itemsizes=_FP32, BC=32),
        _rule(8, 2, itemsizes=_FP32, BC=32),
        _rule(4, 3, max_rank=64, BC=64),
        _rule(8, 3, max_rank=128, BC=32),
        _rule(8, 2, BC=32),
        _interpreter(BC=32),
    ),
    "mixlora_expand": (
        _rule(4, 1, max_rank=16, itemsizes=_FP32, BN=64),
        _rule(8, 1, itemsizes=_FP32, BN=64),
        _rule(4, 1, max_rank=64, BN=128),
        _rule(8, 1, BN=64),
        _interpreter(BN=32),
    ),
    "mixlora_gated": (
        _rule(4, 2, itemsizes=_FP32, BN=32, STEPS=32),
        _rule(4, 2, max_rank=64, BN=64, STEPS=16),
        _rule(8, 1, max_rank=128, BN=32, STEPS=32),
        _rule(4, 2, BN=32, STEPS=32),
        _interpreter(BN=32, STEPS=2),
    ),
    "mixlora_gated_backward": (
        _rule(4, 1, max_rank=16, itemsizes=_FP32, BM=16, BN=32),
        _rule(8, 1, max_rank=32, itemsizes=_FP32, BM=32, BN=32),
        _rule(8, 1, itemsizes=_FP32, BM=16, BN=16),
        _rule(4, 2, min_sm=90, max_rank=32, BM=32, BN=64),
        _rule(8, 1, min_sm=90, max_rank=64, BM=32, BN=64),
        _rule(8, 1, max_rank=128, BM=32, BN=32),
        _rule(8, 1, BM=16, BN=16),
        _interpreter(BM=16, BN=32),
    ),
    "mixlora_outer": (
        _rule(4, 2, max_rank=16, itemsizes=_FP32, BM=32, BN=64),
        _rule(8, 2, max_rank=64, itemsizes=_FP32, BM=32, BN=32),
        _rule(8, 2, itemsizes=_FP32, BM=16, BN=32),
        _rule(4, 3, max_rank=64, BM=64, BN=64),
        _rule(8, 2, max_rank=128, BM=32, BN=64),
        _rule(8, 2, BM=32, BN=32),
        _interpreter(BM=16, BN=32),
    ),
    "mixlora_sum_chunks": (_rule(4, 1, max_rank=32, BN=128), _rule(4, 1, BN=16), _interpreter(BN=64)),
}
"""By kernel; the first that serves. Those of sm 0 are the interpreter's, small so that tests see several blocks."""


def config_for(name: str, rank: int, like: Tensor) -> LaunchConfig:
    """The configuration of a kernel for this (largest) rank, and the type and device of the activations `like`."""
    return choose(name, RULES[name], rank=padded_rank(rank), itemsize=like.element_size(), device=like.device)


def shrink_launch(
    x: Tensor,
    blocks: PairBlocks,
    matrices: tuple[Tensor, ...],
    scales: tuple[float, ...],
    keep: Keep | None,
    lows: tuple[Tensor, ...],
    *,
    gather: bool,
    config: LaunchConfig,
) -> Launch:
    """low_j = scale_j · drop(x) A_j', for one or two matrices [S, C, R]; x is [T, C] to be gathered by token, or [P, C]."""
    first, second = matrices[0], matrices[-1]
    return Launch(
        shrink_kernel,
        (len(blocks.tiles),),
        {
            "p_x": x,
            "p_source": blocks.order.token_P,
            "p_tile": blocks.tiles,
            "p_keep": None if keep is None else keep.row_P,
            "p_a1": first,
            "p_a2": second,
            "p_low1": lows[0],
            "p_low2": lows[-1],
            "C": x.shape[1],
            "R1": first.shape[2],
            "R2": second.shape[2],
            **_strides(first, "s_slot1", "s_c1", "s_r1"),
            **_strides(second, "s_slot2", "s_c2", "s_r2"),
            "scale1": scales[0],
            "scale2": scales[-1],
            "dropped_levels": _levels(keep),
        },
        {
            "GATHER": gather,
            "DROPOUT": keep is not None,
            "TWO": len(matrices) == 2,
            "BM": blocks.rows,
            "BR1": padded_rank(first.shape[2]),
            "BR2": padded_rank(second.shape[2]),
            **config.blocks,
        },
        config.num_warps,
        config.num_stages,
    )


def expand_launch(adapters: tuple[Adapter, ...], blocks: PairBlocks, keep: Keep | None, out_PN: Tensor, *, config: LaunchConfig) -> Launch:
    """out = drop(sum_j low_j M_j'), of one or two adapters, dropout without its scale."""
    first, second = adapters[0], adapters[-1]
    return Launch(
        expand_kernel,
        (len(blocks.tiles), _blocks(out_PN.shape[1], config.blocks["BN"])),
        {
            "p_tile": blocks.tiles,
            "p_keep": None if keep is None else keep.row_P,
            "p_low1": first.low_PR,
            "p_low2": second.low_PR,
            "p_b1": first.matrix_SNR,
            "p_b2": second.matrix_SNR,
            "p_out": out_PN,
            "N": out_PN.shape[1],
            "R1": first.low_PR.shape[1],
            "R2": second.low_PR.shape[1],
            **_strides(first.matrix_SNR, "s_slot1", "s_n1", "s_r1"),
            **_strides(second.matrix_SNR, "s_slot2", "s_n2", "s_r2"),
            "dropped_levels": _levels(keep),
        },
        {
            "DROPOUT": keep is not None,
            "TWO": len(adapters) == 2,
            "BM": blocks.rows,
            "BR1": padded_rank(first.low_PR.shape[1]),
            "BR2": padded_rank(second.low_PR.shape[1]),
            **config.blocks,
        },
        config.num_warps,
        config.num_stages,
    )


def gated_launch(
    gate_TF: Tensor,
    up_TF: Tensor,
    blocks: PairBlocks,
    gate: Adapter | None,
    up: Adapter | None,
    a_down_SFR: Tensor | None,
    keep: Keep | None,
    activation: str,
    h_PF: Tensor,
    partial_BPR: Tensor | None,
    *,
    config: LaunchConfig,
) -> Launch:
    """h = act(G + low_gate B_gate') · (U + low_up B_up') by pair, and shares of drop(h) A_down'; see `num_column_programs`."""
    return Launch(
        gated_kernel,
        (len(blocks.tiles), num_column_programs(gate_TF.shape[1], config)),
        {
            "p_gate": gate_TF,
            "p_up": up_TF,
            "p_token": blocks.order.token_P,
            "p_tile": blocks.tiles,
            "p_keep": None if keep is None else keep.row_P,
            "p_low_gate": None if gate is None else gate.low_PR,
            "p_low_up": None if up is None else up.low_PR,
            "p_b_gate": None if gate is None else gate.matrix_SNR,
            "p_b_up": None if up is None else up.matrix_SNR,
            "p_a_down": a_down_SFR,
            "p_h": h_PF,
            "p_partial": partial_BPR,
            **_gated_sizes(h_PF, gate, up, a_down_SFR, keep),
        },
        {
            **_gated_constants(gate, up, a_down_SFR, keep, activation),
            "BM": blocks.rows,
            **config.blocks,
        },
        config.num_warps,
        config.num_stages,
    )


def gated_backward_launch(
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
    dgate_PF: Tensor,
    dup_PF: Tensor,
    dweight_BP: Tensor,
    partials: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    config: LaunchConfig,
) -> Launch:
    """Everything that the backward pass computes of columns of F; `down` is low_dy with A_down [S, F, R]; partials are [chunks, F, R]."""
    return Launch(
        gated_backward_kernel,
        (len(blocks.chunks), _blocks(gate_TF.shape[1], config.blocks["BN"])),
        {
            "p_gate": gate_TF,
            "p_up": up_TF,
            "p_dhidden": dhidden_TF,
            "p_order": blocks.order.order_P,
            "p_token": blocks.order.token_P,
            "p_chunk": blocks.chunks,
            "p_weight": weight_TK,
            "p_keep": None if keep is None else keep.row_P,
            "p_low_gate": None if gate is None else gate.low_PR,
            "p_low_up": None if up is None else up.low_PR,
            "p_low_dy": None if down is None else down.low_PR,
            "p_b_gate": None if gate is None else gate.matrix_SNR,
            "p_b_up": None if up is None else up.matrix_SNR,
            "p_a_down": None if down is None else down.matrix_SNR,
            "p_dgate": dgate_PF,
            "p_dup": dup_PF,
            "p_dweight": dweight_BP,
            "p_db_gate": partials[0],
            "p_db_up": partials[1],
            "p_da_down": partials[2],
            **_gated_sizes(dgate_PF, gate, up, None if down is None else down.matrix_SNR, keep),
        },
        {**_gated_constants(gate, up, None if down is None else down.matrix_SNR, keep, activation), **config.blocks},
        config.num_warps,
        config.num_stages,
    )


def outer_launch(
    x_TN: Tensor,
    blocks: PairBlocks,
    lows: tuple[Tensor, ...],
    weight_TK: Tensor | None,
    keep: Keep | None,
    partials: tuple[Tensor, ...],
    *,
    config: LaunchConfig,
) -> Launch:
    """partial_j[chunk] = drop(x)' (weight · low_j) over each chunk's pairs, [chunks, N, R], for one or two lows; weights with one only."""
    assert weight_TK is None or len(lows) == 1
    return Launch(
        outer_kernel,
        (len(blocks.chunks), _blocks(x_TN.shape[1], config.blocks["BN"])),
        {
            "p_x": x_TN,
            "p_source": blocks.order.token_P,
            "p_order": blocks.order.order_P,
            "p_chunk": blocks.chunks,
            "p_weight": weight_TK,
            "p_keep": None if keep is None else keep.row_P,
            "p_low1": lows[0],
            "p_low2": lows[-1],
            "p_out1": partials[0],
            "p_out2": partials[-1],
            "N": x_TN.shape[1],
            "R1": lows[0].shape[1],
            "R2": lows[-1].shape[1],
            "dropped_levels": _levels(keep),
        },
        {
            "WEIGHTED": weight_TK is not None,
            "DROPOUT": keep is not None,
            "TWO": len(lows) == 2,
            "BR1": padded_rank(lows[0].shape[1]),
            "BR2": padded_rank(lows[-1].shape[1]),
            **config.blocks,
        },
        config.num_warps,
        config.num_stages,
    )


def sum_chunks_launch(partial_CNR: Tensor, first_chunk: Tensor, out_SNR: Tensor, *, config: LaunchConfig) -> Launch:
    """out[s] = sum over the slot's chunks, in turn; `out` is a view of any strides."""
    num_slots, width, rank = out_SNR.shape
    return Launch(
        sum_chunks_kernel,
        (num_slots, _blocks(width, config.blocks["BN"])),
        {
            "p_partial": partial_CNR,
            "p_first": first_chunk,
            "p_out": out_SNR,
            "N": width,
            "R": rank,
            "s_n": out_SNR.stride(1),
            "s_r": out_SNR.stride(2),
        },
        {"BR": padded_rank(rank), **config.blocks},
        config.num_warps,
        config.num_stages,
    )


def num_column_programs(width: int, config: LaunchConfig) -> int:
    """Programs of the gated kernel that share the columns of a tile."""
    return _blocks(width, config.blocks["BN"] * config.blocks["STEPS"])


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _levels(keep: Keep | None) -> int:
    return 0 if keep is None else keep.dropped_levels


def _strides(matrix: Tensor, *names: str) -> dict[str, int]:
    return dict(zip(names, matrix.stride(), strict=True))


def _gated_sizes(like_PF: Tensor, gate: Adapter | None, up: Adapter | None, a_down_SFR: Tensor | None, keep: Keep | None) -> dict[str, int]:
    matrices = {"gate": None if gate is None else gate.matrix_SNR, "up": None if up is None else up.matrix_SNR, "down": a_down_SFR}
    sizes = {"P": like_PF.shape[0], "F": like_PF.shape[1], "dropped_levels": _levels(keep)}
    for name, matrix in matrices.items():
        sizes[f"R_{name.upper()}"] = 0 if matrix is None else matrix.shape[2]
        for stride, value in zip(("s_slot", "s_n", "s_r"), (0, 0, 0) if matrix is None else matrix.stride(), strict=True):
            sizes[f"{stride}_{name}"] = value
    return sizes


def _gated_constants(
    gate: Adapter | None, up: Adapter | None, a_down_SFR: Tensor | None, keep: Keep | None, activation: str
) -> dict[str, object]:
    return {
        "ACTIVATION": activation,
        "DROPOUT": keep is not None and a_down_SFR is not None,
        "BR_GATE": 0 if gate is None else padded_rank(gate.low_PR.shape[1]),
        "BR_UP": 0 if up is None else padded_rank(up.low_PR.shape[1]),
        "BR_DOWN": 0 if a_down_SFR is None else padded_rank(a_down_SFR.shape[2]),
    }


def rank_of(*matrices: Tensor | Adapter | None) -> int:
    """The largest rank, of matrices [.., R] and adapters."""
    return max((m.low_PR.shape[1] if isinstance(m, Adapter) else m.shape[-1] for m in matrices if m is not None), default=0)


def partial_sums(chunks: Tensor, width: int, rank: int) -> Tensor:
    """float32 [chunks, width, rank], to be written by a kernel."""
    return torch.empty((len(chunks), width, rank), dtype=torch.float32, device=chunks.device)
