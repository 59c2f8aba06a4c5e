"""The passes of the MixLoRA feed-forward in Triton. Each function allocates its result and launches its kernel.

Between the passes run GEMMs over tokens. Rows of assignments that other ranks compute are not written. The gradients of all pairs lie in
one tensor: several passes write the parts of chunks of rows in it (`chunk_parts`), and one launch adds them up (`sum_chunks`).

Shapes: T tokens, K assignments of a token, P places of the sorted assignments, S slots, F ffn hidden, C columns summed over, N other
columns, R rank. Matrices [S, N, R] are views of any strides; they are cast to the activations' type when they are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hecate.kernels.common.assignments import AssignmentBlocks
from hecate.kernels.common.dropout import RowDropout
from hecate.kernels.common.kernel_launch import Launch
from hecate.kernels.common.launch_config import LaunchConfig, Rule, choose, num_blocks, padded_rank
from hecate.kernels.common.low_rank import MAX_RANK, LowRankPairs, LowRankTerm, split_like
from hecate.kernels.mixlora.triton_kernels import (
    expand_kernel,
    gated_backward_kernel,
    gated_kernel,
    outer_kernel,
    shrink_kernel,
    sum_chunks_kernel,
    sum_programs_kernel,
)


def _rule(
    num_warps: int, num_stages: int, *, min_sm: int = 80, max_rank: int = MAX_RANK, itemsizes: tuple[int, ...] = (2, 4), **blocks: int
) -> Rule:
    return Rule(LaunchConfig(blocks, num_warps, num_stages), min_sm=min_sm, max_rank=max_rank, itemsizes=itemsizes)


def _interpreter(**blocks: int) -> Rule:
    return Rule(LaunchConfig(blocks, 4, 1), min_sm=0)


# Products of float32 use no tensor cores and more registers, so their blocks are smaller.
_FP32 = (4,)
RULES: dict[str, tuple[Rule, ...]] = {
    # The rows of a tile and of a chunk are the same for all kernels of a layer, because they share the maps.
    "mixlora_rows": (
        _rule(4, 1, max_rank=64, itemsizes=_FP32, ROWS=32, CHUNK_ROWS=1024),
        _rule(4, 1, itemsizes=_FP32, ROWS=16, CHUNK_ROWS=1024),
        _rule(4, 1, max_rank=128, ROWS=64, CHUNK_ROWS=1024),
        _rule(4, 1, ROWS=32, CHUNK_ROWS=1024),
        _interpreter(ROWS=16, CHUNK_ROWS=32),
    ),
    "mixlora_shrink": (
        _rule(4, 3, max_rank=32, itemsizes=_FP32, BC=32),
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
        _rule(4, 1, max_rank=16, itemsizes=_FP32, BM=16, BN=16),  # wider blocks spill with triton 3.6
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
    "mixlora_sum_programs": (_rule(4, 1, max_rank=32, BM=32), _rule(4, 1, BM=8), _interpreter(BM=16)),
    "mixlora_sum_chunks": (_rule(4, 1, BN=1024), _interpreter(BN=64)),
}
"""the rules of each kernel, of which the first that matches counts. Those of sm 0 are for the interpreter: small, so that tests have
several blocks"""


def config_for(name: str, rank: int, like: Tensor) -> LaunchConfig:
    """Return the configuration of a kernel for the largest rank of its pairs, and the type and device of the activations `like`."""
    return choose(name, RULES[name], rank=padded_rank(rank), itemsize=like.element_size(), device=like.device)


def shrink(
    x: Tensor,
    blocks: AssignmentBlocks,
    matrices: tuple[Tensor, ...],
    scales: tuple[float, ...],
    dropout: RowDropout | None,
    *,
    gather: bool,
) -> tuple[Tensor, ...]:
    """Return scale_j · drop(x) A_j for one or two matrices [S, C, R], reading x once. Each result is [P, R] in x's type.

    Args:
        x: with `gather` [T, C], of which each assignment reads its token's row; otherwise [P, C].
    """
    lows = tuple(x.new_empty((blocks.order.num_assignments, matrix.shape[2])) for matrix in matrices)
    config = config_for("mixlora_shrink", _rank_of(*matrices), x)
    first, second = matrices[0], matrices[-1]
    Launch.configured(
        shrink_kernel,
        (blocks.tiles.shape[0],),
        {
            "p_x": x,
            "p_source": blocks.order.token_P,
            "p_tile": blocks.tiles,
            "p_keep": _words(dropout),
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
            "dropped_levels": _levels(dropout),
        },
        {
            "GATHER": gather,
            "DROPOUT": dropout is not None,
            "TWO": len(matrices) == 2,
            "BM": blocks.rows,
            "BR1": padded_rank(first.shape[2]),
            "BR2": padded_rank(second.shape[2]),
        },
        config,
    ).run()
    return lows


def expand(terms: tuple[LowRankTerm, ...], blocks: AssignmentBlocks, dropout: RowDropout | None) -> Tensor:
    """Return drop(sum_j low_j M_j'), [P, N], of one or two terms. Dropout is applied without its scale."""
    first, second = terms[0], terms[-1]
    out_PN = first.low_PR.new_empty((blocks.order.num_assignments, first.matrix_SNR.shape[1]))
    config = config_for("mixlora_expand", _rank_of(*terms), first.low_PR)
    Launch.configured(
        expand_kernel,
        (blocks.tiles.shape[0], num_blocks(out_PN.shape[1], config.blocks["BN"])),
        {
            "p_tile": blocks.tiles,
            "p_keep": _words(dropout),
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
            "dropped_levels": _levels(dropout),
        },
        {
            "DROPOUT": dropout is not None,
            "TWO": len(terms) == 2,
            "BM": blocks.rows,
            "BR1": padded_rank(first.low_PR.shape[1]),
            "BR2": padded_rank(second.low_PR.shape[1]),
        },
        config,
    ).run()
    return out_PN


@dataclass(frozen=True)
class GatedInputs:
    """The inputs of each assignment's gated hidden state h = act(G + low_gate B_gate') · (U + low_up B_up'), and of its product with A."""

    gate_TF: Tensor
    """G, the base's gate projection of each token"""
    up_TF: Tensor
    """U, the base's up projection of each token"""
    blocks: AssignmentBlocks
    gate: LowRankTerm | None
    """the low-rank term of gate; None if the projection has no pair"""
    up: LowRankTerm | None
    a_down_SFR: Tensor | None
    """A of the down projection's pairs, transposed"""
    dropout: RowDropout | None
    """the dropout of h as the input of the down projection's pairs"""
    activation: str

    @property
    def rank(self) -> int:
        """The largest rank of the pairs."""
        return _rank_of(self.gate, self.up, self.a_down_SFR)

    def pointers(self) -> dict[str, Tensor | None]:
        """Return the tensor arguments of both gated kernels."""
        return {
            "p_gate": self.gate_TF,
            "p_up": self.up_TF,
            "p_token": self.blocks.order.token_P,
            "p_keep": _words(self.dropout),
            "p_low_gate": None if self.gate is None else self.gate.low_PR,
            "p_low_up": None if self.up is None else self.up.low_PR,
            "p_b_gate": None if self.gate is None else self.gate.matrix_SNR,
            "p_b_up": None if self.up is None else self.up.matrix_SNR,
            "p_a_down": self.a_down_SFR,
        }

    def sizes(self) -> dict[str, int]:
        """Return the integer arguments of both gated kernels."""
        sizes = {"P": self.blocks.order.num_assignments, "F": self.gate_TF.shape[1], "dropped_levels": _levels(self.dropout)}
        for name, matrix in self._matrices().items():
            sizes[f"R_{name.upper()}"] = 0 if matrix is None else matrix.shape[2]
            for stride, value in zip(("s_slot", "s_n", "s_r"), (0, 0, 0) if matrix is None else matrix.stride(), strict=True):
                sizes[f"{stride}_{name}"] = value
        return sizes

    def constants(self) -> dict[str, object]:
        """Return the constants of both gated kernels."""
        ranks = {f"BR_{name.upper()}": 0 if matrix is None else padded_rank(matrix.shape[2]) for name, matrix in self._matrices().items()}
        return {"ACTIVATION": self.activation, "DROPOUT": self.dropout is not None and self.a_down_SFR is not None, **ranks}

    def _matrices(self) -> dict[str, Tensor | None]:
        gate, up = (None if term is None else term.matrix_SNR for term in (self.gate, self.up))
        return {"gate": gate, "up": up, "down": self.a_down_SFR}


def gated(inputs: GatedInputs, down_scale: float) -> tuple[Tensor, Tensor | None]:
    """Return h of each assignment, [P, F], and down_scale · drop(h) A_down, [P, R]."""
    rows, ffn = inputs.blocks.order.num_assignments, inputs.gate_TF.shape[1]
    config = config_for("mixlora_gated", inputs.rank, inputs.gate_TF)
    # This many programs share the columns of a tile, and each computes its own partial sum of drop(h) A_down.
    programs = num_blocks(ffn, config.blocks["BN"] * config.blocks["STEPS"])
    h_PF, partial = inputs.gate_TF.new_empty((rows, ffn)), None
    if inputs.a_down_SFR is not None:
        partial = h_PF.new_empty((programs, rows, inputs.a_down_SFR.shape[2]), dtype=torch.float32)
    Launch.configured(
        gated_kernel,
        (inputs.blocks.tiles.shape[0], programs),
        {**inputs.pointers(), "p_tile": inputs.blocks.tiles, "p_h": h_PF, "p_partial": partial, **inputs.sizes()},
        {
            **inputs.constants(),
            "BM": inputs.blocks.rows,
        },
        config,
    ).run()
    if partial is None:
        return h_PF, None
    return h_PF, _sum_programs(partial, h_PF.new_empty(partial.shape[1:]), down_scale, None)


class GatedGradients(NamedTuple):
    """The gradients of the tokens and weights from the backward pass of `gated` and of the weighted sum after it."""

    gate_PF: Tensor
    """the gradient of each assignment's gate output, times its weight"""
    up_PF: Tensor
    weight_TK: Tensor
    """the gradient of the router's weights, of their type; zero for assignments that other ranks compute"""


def gated_backward(
    inputs: GatedInputs, dhidden_TF: Tensor, weight_TK: Tensor, low_dy_PR: Tensor | None, parts: Mapping[str, LowRankPairs]
) -> GatedGradients:
    """Run the backward pass of `gated` and of the weighted sum after it.

    It also writes the parts of each chunk in the gradients of B of gate and up, and of A of down.

    Args:
        dhidden_TF: the gradient of the tokens' weighted hidden states.
        low_dy_PR: down_scale · dy B_down of each assignment; None if the down projection has no pair.
        parts: see `chunk_parts`.
    """
    blocks, ffn, rows = inputs.blocks, inputs.gate_TF.shape[1], inputs.blocks.order.num_assignments
    config = config_for("mixlora_gated_backward", inputs.rank, inputs.gate_TF)
    dgate_PF, dup_PF = inputs.gate_TF.new_empty((rows, ffn)), inputs.gate_TF.new_empty((rows, ffn))
    dweight = inputs.gate_TF.new_empty((num_blocks(ffn, config.blocks["BN"]), rows), dtype=torch.float32)
    part_gate, part_up = (
        None if term is None else parts[name].b_SOr for name, term in (("gate_proj", inputs.gate), ("up_proj", inputs.up))
    )
    part_down = None if low_dy_PR is None else parts["down_proj"].a_SrI
    Launch.configured(
        gated_backward_kernel,
        (blocks.chunks.shape[0], num_blocks(ffn, config.blocks["BN"])),
        {
            **inputs.pointers(),
            "p_dhidden": dhidden_TF,
            "p_order": blocks.order.order_P,
            "p_chunk": blocks.chunks,
            "p_weight": weight_TK,
            "p_low_dy": low_dy_PR,
            "p_dgate": dgate_PF,
            "p_dup": dup_PF,
            "p_dweight": dweight,
            "p_db_gate": part_gate,
            "p_db_up": part_up,
            "p_da_down": part_down,
            "s_chunk": next(iter(parts.values())).b_SOr.stride(0),
            **inputs.sizes(),
        },
        {
            **inputs.constants(),
        },
        config,
    ).run()
    dweight_TK = _sum_programs(dweight[:, :, None], torch.empty_like(weight_TK), 1.0, blocks.order.place_TK)
    return GatedGradients(dgate_PF, dup_PF, dweight_TK)


def outer(
    x_TN: Tensor,
    blocks: AssignmentBlocks,
    lows: tuple[Tensor, ...],
    weight_TK: Tensor | None,
    dropout: RowDropout | None,
    parts: tuple[Tensor, ...],
    *,
    transposed: bool,
) -> None:
    """Write the sums over each chunk's assignments of the outer products of drop(x)[token] and weight · low_j.

    Args:
        lows: one or two; weights only with one.
        parts: for each low [chunks, N, R], or [chunks, R, N] if transposed; see `chunk_parts`.
    """
    assert weight_TK is None or len(lows) == 1
    config = config_for("mixlora_outer", _rank_of(*lows), x_TN)
    Launch.configured(
        outer_kernel,
        (blocks.chunks.shape[0], num_blocks(x_TN.shape[1], config.blocks["BN"])),
        {
            "p_x": x_TN,
            "p_source": blocks.order.token_P,
            "p_order": blocks.order.order_P,
            "p_chunk": blocks.chunks,
            "p_weight": weight_TK,
            "p_keep": _words(dropout),
            "p_low1": lows[0],
            "p_low2": lows[-1],
            "p_out1": parts[0],
            "p_out2": parts[-1],
            "N": x_TN.shape[1],
            "R1": lows[0].shape[1],
            "R2": lows[-1].shape[1],
            "s_chunk": parts[0].stride(0),
            "dropped_levels": _levels(dropout),
        },
        {
            "WEIGHTED": weight_TK is not None,
            "DROPOUT": dropout is not None,
            "TRANSPOSED": transposed,
            "TWO": len(lows) == 2,
            "BR1": padded_rank(lows[0].shape[1]),
            "BR2": padded_rank(lows[-1].shape[1]),
        },
        config,
    ).run()


def chunk_parts(blocks: AssignmentBlocks, pairs: Mapping[str, LowRankPairs]) -> tuple[Tensor, dict[str, LowRankPairs]]:
    """Allocate the part of each chunk of rows in the gradients of all pairs, float32 [chunks, C]; C is the elements of a slot's pairs.

    Returns:
        All of it, for `sum_chunks`, and by projection views as the pairs are, A [chunks, R, inputs] and B [chunks, outputs, R].
    """
    matrices = [matrix for of in pairs.values() for matrix in (of.a_SrI, of.b_SOr)]
    numel = sum(math.prod(matrix.shape[1:]) for matrix in matrices)
    parts = torch.empty((blocks.chunks.shape[0], numel), dtype=torch.float32, device=blocks.chunks.device)
    views = iter(split_like(parts, matrices))
    return parts, {name: LowRankPairs(next(views), next(views), of.scale) for name, of in pairs.items()}


def sum_chunks(parts: Tensor, blocks: AssignmentBlocks, dtype: torch.dtype) -> Tensor:
    """Return the sums over each slot's chunks, in their order, [S, C]."""
    width, slots = parts.shape[1], blocks.order.num_slots
    out_SC = parts.new_empty((slots, width), dtype=dtype)
    config = config_for("mixlora_sum_chunks", 0, parts)
    Launch.configured(
        sum_chunks_kernel,
        (slots, num_blocks(width, config.blocks["BN"])),
        {"p_partial": parts, "p_first": blocks.first_chunk, "p_out": out_SC, "N": width},
        {},
        config,
    ).run()
    return out_SC


def _sum_programs(partial: Tensor, out: Tensor, scale: float, place: Tensor | None) -> Tensor:
    """Write scale · the sum of partial [programs, rows, R] over programs into `out`: of each row, or of the rows `place`, 0 for -1."""
    programs, rows, rank = partial.shape
    config = config_for("mixlora_sum_programs", rank, partial)
    count = out.numel() // rank
    Launch.configured(
        sum_programs_kernel,
        (num_blocks(count, config.blocks["BM"]),),
        {"p_partial": partial, "p_place": place, "p_out": out, "num_rows": rows, "num_out": count, "R": rank, "scale": scale},
        {
            "PROGRAMS": programs,
            "PLACED": place is not None,
            "BR": padded_rank(rank),
        },
        config,
    ).run()
    return out


def _rank_of(*matrices: Tensor | LowRankTerm | None) -> int:
    """Return the largest rank of the matrices [.., R] and terms."""
    return max((m.low_PR.shape[1] if isinstance(m, LowRankTerm) else m.shape[-1] for m in matrices if m is not None), default=0)


def _words(dropout: RowDropout | None) -> Tensor | None:
    return None if dropout is None else dropout.word_R


def _levels(dropout: RowDropout | None) -> int:
    return 0 if dropout is None else dropout.dropped_levels


def _strides(matrix: Tensor, *names: str) -> dict[str, int]:
    return dict(zip(names, matrix.stride(), strict=True))
