"""The reference equals its formula, which is written out token by token."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.ffn import ACTIVATIONS, FfnBase, activation
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.mixlora.reference import mixlora_ffn_reference

BY_HAND: dict[str, Callable[[float], float]] = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
}


def test_one_number_each_by_hand() -> None:
    """x = 2; gate 0.5 and scale 2 · (0.25 · 1): 1 + 1 = 2; up 3, no adapter: 6; h = silu(2) · 6 = 10.5695645;
    down 4 and 2 · (-0.5 · 1) = -1: 3 h = 31.7086935; router weight 0.25: 7.9271734. The first assignment is elsewhere.
    """

    def one(value: float) -> torch.Tensor:
        return torch.tensor([[value]], dtype=torch.float64)

    base = FfnBase(one(0.5), one(3.0), one(4.0), "silu")
    loras = {
        "gate_proj": LowRankPairs(one(1.0)[None], one(0.25)[None], 2.0),
        "down_proj": LowRankPairs(one(1.0)[None], one(-0.5)[None], 2.0),
    }
    weight_TK = torch.tensor([[0.75, 0.25]], dtype=torch.float64)
    y = mixlora_ffn_reference(RoutedTokens(one(2.0), torch.tensor([[-1, 0]]), weight_TK), base, loras)
    assert y.item() == pytest.approx(7.9271734, rel=1e-7)


def test_the_activations_are_all_known() -> None:
    assert set(BY_HAND) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_hand(name: str) -> None:
    points = [-3.0, -0.5, 0.0, 0.7, 4.0]
    got = activation(name, torch.tensor(points, dtype=torch.float64)).tolist()
    assert got == pytest.approx([BY_HAND[name](v) for v in points], rel=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_formula_token_by_token(name: str) -> None:
    tokens, hidden, ffn, rank, slots, scale = 4, 3, 5, 2, 3, 0.7
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    x, weight = normal(tokens, hidden), normal(tokens, 2).abs()
    slot = torch.tensor([[0, 2], [2, -1], [-1, -1], [1, 0]])
    base = FfnBase(normal(ffn, hidden), normal(ffn, hidden), normal(hidden, ffn), name)
    up = LowRankPairs(normal(slots, rank, hidden), normal(slots, ffn, rank), scale)
    down = LowRankPairs(normal(slots, rank, ffn), normal(slots, hidden, rank), scale)
    got = mixlora_ffn_reference(RoutedTokens(x, slot, weight), base, {"up_proj": up, "down_proj": down})

    def times(matrix: torch.Tensor, vector: list[float]) -> list[float]:
        return [sum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix.tolist()]

    for t in range(tokens):
        expected = [0.0] * hidden
        for k in range(2):
            s = int(slot[t, k])
            if s < 0:
                continue
            inputs = x[t].tolist()
            gate = times(base.gate_FD, inputs)
            delta = times(up.b_SOr[s], times(up.a_SrI[s], inputs))
            lifted = [u + scale * d for u, d in zip(times(base.up_FD, inputs), delta, strict=True)]
            h = [BY_HAND[name](g) * u for g, u in zip(gate, lifted, strict=True)]
            delta = times(down.b_SOr[s], times(down.a_SrI[s], h))
            y = [d + scale * e for d, e in zip(times(base.down_DF, h), delta, strict=True)]
            expected = [e + float(weight[t, k]) * v for e, v in zip(expected, y, strict=True)]
        assert got[t].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12), f"token {t}"
