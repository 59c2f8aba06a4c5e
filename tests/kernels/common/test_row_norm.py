"""The gradient rule row_norm, and pairs whose A does not train, in every implementation, against formulas that are written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.experts.pairs.gradient_rules import ruled_pairs
from hecate.experts.pairs.rules.row_norm import row_factors, row_norm
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.ffn import FfnBase, FfnShape
from hecate.kernels.common.lora_linear import lora_linear_triton
from hecate.kernels.common.low_rank import LowRankPairs, lora_linear
from hecate.kernels.experts.masked_pairs import masked_pairs
from hecate.kernels.experts.moe_lora_operators import moe_lora_ffn_triton
from hecate.kernels.experts.reference import moe_lora_ffn_reference, routed_pairs_reference
from hecate.kernels.experts.routed_pairs import routed_pairs, sorted_pairs
from hecate.kernels.experts.routed_pairs_triton import routed_pairs_triton
from hecate.kernels.experts.torch_path import moe_lora_ffn
from hecate.kernels.mixlora.operators import mixlora_ffn_triton
from hecate.kernels.mixlora.reference import mixlora_ffn_reference
from hecate.kernels.mixlora.torch_path import mixlora_ffn
from hecate.parallel.values.expert_kinds import LoraShape
from tests.plain_allora import row_norm_product

HIDDEN, FFN, SLOTS, TOKENS, RANK = 5, 7, 2, 9, 3
WIDTHS = {"gate_proj": (HIDDEN, FFN), "up_proj": (HIDDEN, FFN), "down_proj": (FFN, HIDDEN)}
SHAPE = FfnShape(HIDDEN, FFN, "silu")


def normal(seed: int, *shape: int) -> Tensor:
    """float64, of numbers that float32 holds, too."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@dataclass(frozen=True)
class Layer:
    """A layer of experts: A and B by projection in float64, and what is done with them."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    eta: float | None = None
    trains_a: bool = True


def pairs_of(b_scale: float = 1.0, projections: tuple[str, ...] = tuple(WIDTHS)) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for index, name in enumerate(projections):
        wide, narrow = WIDTHS[name]
        found[name] = normal(10 + index, SLOTS, RANK, wide), (b_scale * normal(20 + index, SLOTS, narrow, RANK)).float().double()
    return found


def of_mixlora(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def layer(routed: RoutedTokens, base: FfnBase, pairs: dict[str, LowRankPairs]) -> Tensor:
        return function(routed, base, pairs)

    return layer


def of_moe_lora(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def layer(routed: RoutedTokens, base: FfnBase, pairs: dict[str, LowRankPairs]) -> Tensor:
        flat = torch.cat([base.gate_FD.flatten(), base.up_FD.flatten(), base.down_DF.flatten()])
        return function(routed, [flat.clone() for _ in range(SLOTS)], pairs, SHAPE)

    return layer


def of_linear(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A linear layer with the first slot's pair of the down projection, on x padded to its width."""

    def layer(routed: RoutedTokens, base: FfnBase, pairs: dict[str, LowRankPairs]) -> Tensor:
        down, x = pairs["down_proj"], F.pad(routed.x_TD, (0, FFN - HIDDEN), value=0.5)
        return function(x, base.down_DF, None, down.of_slot(0, x.dtype))

    return layer


def of_routed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The pairs of the down projection alone, on x padded to their width."""

    def layer(routed: RoutedTokens, base: FfnBase, pairs: dict[str, LowRankPairs]) -> Tensor:
        return function(replace(routed, x_TD=F.pad(routed.x_TD, (0, FFN - HIDDEN), value=0.5)), pairs["down_proj"])

    return layer


FAST: dict[str, tuple[Callable[..., Tensor], torch.dtype]] = {
    "mixlora torch": (of_mixlora(mixlora_ffn), torch.float64),
    "mixlora triton": (of_mixlora(mixlora_ffn_triton), torch.float32),
    "mixlora reference": (of_mixlora(mixlora_ffn_reference), torch.float64),
    "moe_lora torch": (of_moe_lora(moe_lora_ffn), torch.float64),
    "moe_lora triton": (of_moe_lora(moe_lora_ffn_triton), torch.float32),
    "moe_lora reference": (of_moe_lora(moe_lora_ffn_reference), torch.float64),
    "routed torch": (of_routed(routed_pairs), torch.float64),
    "routed sorted": (of_routed(sorted_pairs), torch.float64),
    "routed masked": (of_routed(masked_pairs), torch.float64),
    "routed triton": (of_routed(routed_pairs_triton), torch.float32),
    "routed reference": (of_routed(routed_pairs_reference), torch.float64),
    "linear torch": (of_linear(lora_linear), torch.float64),
    "linear triton": (of_linear(lora_linear_triton), torch.float32),
}
every = pytest.mark.parametrize("name", FAST)
interpreted_are_slow = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "triton" in name else ()) for name in FAST]
)


def plain(name: str, eta: float | None) -> Callable[..., Tensor]:
    """The same layer in formulas, in float64."""

    def experts(routed: RoutedTokens, base: FfnBase, pairs: dict[str, LowRankPairs]) -> Tensor:
        y = torch.zeros_like(routed.x_TD)
        for slot in range(SLOTS):

            def linear(name: str, weight: Tensor, x: Tensor, slot: int = slot) -> Tensor:
                of = pairs[name]
                if eta is None:
                    return x @ weight.T + of.scale * x @ (of.b_SOr[slot] @ of.a_SrI[slot]).T
                return x @ weight.T + of.scale * row_norm_product(x, of.a_SrI[slot], of.b_SOr[slot], eta)

            h = F.silu(linear("gate_proj", base.gate_FD, routed.x_TD)) * linear("up_proj", base.up_FD, routed.x_TD)
            share = (routed.weight_TK * (routed.slot_TK == slot)).sum(1, keepdim=True)
            y = y + share * linear("down_proj", base.down_DF, h)
        return y

    def one_linear(routed: RoutedTokens, base: FfnBase, pairs: dict[str, LowRankPairs]) -> Tensor:
        down, x = pairs["down_proj"], F.pad(routed.x_TD, (0, FFN - HIDDEN), value=0.5)
        assert eta is not None
        return x @ base.down_DF.T + down.scale * row_norm_product(x, down.a_SrI[0], down.b_SOr[0], eta)

    def routed_pair(routed: RoutedTokens, base: FfnBase, pairs: dict[str, LowRankPairs]) -> Tensor:
        down, x = pairs["down_proj"], F.pad(routed.x_TD, (0, FFN - HIDDEN), value=0.5)
        assert eta is not None
        shares = [(routed.weight_TK * (routed.slot_TK == slot)).sum(1, keepdim=True) for slot in range(SLOTS)]
        parts = [row_norm_product(x, a, b, eta) for a, b in zip(down.a_SrI, down.b_SOr, strict=True)]
        return sum((down.scale * share * part for share, part in zip(shares, parts, strict=True)), torch.zeros(()))

    if name.startswith("routed"):
        return routed_pair
    return one_linear if name.startswith("linear") else experts


def results(function: Callable[..., Tensor], layer: Layer, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The output and all gradients by name."""
    leaves = {"x": leaf(normal(4, TOKENS, HIDDEN), dtype), "weight": leaf(normal(5, TOKENS, 2), dtype)}
    pairs = {}
    for name, (a, b) in layer.pairs.items():
        leaves[f"{name}.A"] = leaf(a, dtype).requires_grad_(layer.trains_a)
        leaves[f"{name}.B"] = leaf(b, dtype)
        pairs[name] = LowRankPairs(leaves[f"{name}.A"], leaves[f"{name}.B"], 1.0)
    if layer.eta is not None:
        pairs = {name: row_norm(of, layer.eta) for name, of in pairs.items()}
    gate, up, down = (normal(seed, *shape).to(dtype) for seed, shape in ((1, (FFN, HIDDEN)), (2, (FFN, HIDDEN)), (3, (HIDDEN, FFN))))
    slot_TK = torch.arange(2 * TOKENS).view(-1, 2) * 7 % 3 % SLOTS
    y = function(RoutedTokens(leaves["x"], slot_TK, leaves["weight"]), FfnBase(gate, up, down, "silu"), pairs)
    y.backward(normal(6, TOKENS, HIDDEN).to(dtype))
    return {"y": y.detach(), **{f"d {name}": tensor.grad for name, tensor in leaves.items()}}


def leaf(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).clone().requires_grad_()


def close(got: dict[str, Tensor | None], wanted: dict[str, Tensor | None], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        other = wanted[name]
        assert (value is None) == (other is None), name
        if value is not None and other is not None:
            torch.testing.assert_close(value.double(), other, rtol=tolerance, atol=tolerance * float(other.abs().max()), msg=name)


@every
def test_gradients_are_those_of_the_written_out_formula(name: str) -> None:
    function, dtype = FAST[name]
    pairs = pairs_of(0.3)
    wanted = results(plain(name, 1.5), Layer(pairs), torch.float64)
    close(results(function, Layer(pairs, eta=1.5), dtype), wanted, 1e-12 if dtype == torch.float64 else 2e-6)


@every
def test_nothing_but_the_gradients_of_pairs_changes(name: str) -> None:
    """The output and the gradients of x and of the router's weights, to the bit."""
    function, dtype = FAST[name]
    with_rule, without = (results(function, Layer(pairs_of(), eta), dtype) for eta in (1.5, None))
    for key in ("y", "d x", "d weight"):
        assert (with_rule[key] is None and without[key] is None) or torch.equal(with_rule[key], without[key]), key  # type: ignore[arg-type]
    assert not torch.equal(with_rule["d down_proj.A"], without["d down_proj.A"])  # type: ignore[arg-type]


@interpreted_are_slow
def test_where_b_is_zero_its_gradient_is_eta_times_that_of_plain_lora(name: str) -> None:
    function, dtype = FAST[name]
    with_rule, without = (results(function, Layer(pairs_of(0.0), eta), dtype) for eta in (2.0, None))
    for key in without:
        if key.endswith(".B") and without[key] is not None:
            assert torch.equal(with_rule[key], 2.0 * without[key]), key  # type: ignore[arg-type,operator]
    assert float(with_rule["d down_proj.B"].abs().max()) > 0  # type: ignore[union-attr]


@interpreted_are_slow
def test_a_large_eta_and_rows_of_length_one_are_plain_lora(name: str) -> None:
    """Rows of A are orthonormal and rows of B have length one, so rows of B A have it, too."""
    function, dtype = FAST[name]
    pairs = {key: (torch.linalg.qr(a.mT)[0].mT.contiguous(), F.normalize(b, dim=-1)) for key, (a, b) in pairs_of().items()}
    with_rule, without = (results(function, Layer(pairs, eta), dtype) for eta in (1e6, None))
    close(with_rule, {key: value if value is None else value.double() for key, value in without.items()}, 1e-6)


@interpreted_are_slow
@pytest.mark.parametrize("eta", [None, 1.5])
def test_where_a_does_not_train_all_else_is_the_same_to_the_bit(name: str, eta: float | None) -> None:
    function, dtype = FAST[name]
    layer = Layer(pairs_of(), eta)
    fixed, trained = (results(function, replace(layer, trains_a=trains_a), dtype) for trains_a in (False, True))
    for key, value in fixed.items():
        if key.endswith(".A"):
            assert value is None
        else:
            assert value is trained[key] or torch.equal(value, trained[key]), key  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["moe_lora torch", "moe_lora triton"])
def test_a_pair_of_gate_and_up_together(name: str) -> None:
    """Its rows have a factor each, and its A the sum of what comes from both halves."""
    function, dtype = FAST[name]
    pairs = pairs_of(0.3)
    (a, b_gate), (_, b_up) = pairs["gate_proj"], pairs["up_proj"]
    got = results(function, Layer({"gate_up_proj": (a, torch.cat([b_gate, b_up], dim=1)), "down_proj": pairs["down_proj"]}, 1.5), dtype)
    wanted: dict[str, Any] = results(plain(name, 1.5), Layer({**pairs, "up_proj": (a, b_up)}), torch.float64)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    together = {
        "d gate_up_proj.A": wanted["d gate_proj.A"] + wanted["d up_proj.A"],
        "d gate_up_proj.B": torch.cat([wanted["d gate_proj.B"], wanted["d up_proj.B"]], dim=1),
    }
    close({key: got[key] for key in together}, together, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_row_norms_by_the_gram_matrix_are_those_of_the_product(dtype: torch.dtype, tolerance: float) -> None:
    a, b = normal(1, SLOTS, 4, 30).to(dtype), normal(2, SLOTS, 11, 4).to(dtype)
    b[0, 3] = 0
    norms = (b.double() @ a.double()).norm(dim=-1)
    got = row_factors(a, b, 0.5)
    torch.testing.assert_close(got.double(), (norms + 4).rsqrt(), rtol=tolerance, atol=0)
    assert got[0, 3] == 0.5


def test_without_a_rule_or_gradients_nothing_is_computed() -> None:
    a, b = normal(1, SLOTS, 4, 30).requires_grad_(), normal(2, SLOTS, 11, 4).requires_grad_()
    plain, ruled = LoraShape(4, 0.5, 0.0), LoraShape(4, 0.5, 0.0, gradient_rule="row_norm", eta=2.0)
    with torch.no_grad():
        unseen = ruled_pairs(ruled, a, b)
    for pairs in (ruled_pairs(plain, a, b), unseen):
        assert (pairs.a_SrI, pairs.b_SOr, pairs.scale, pairs.b_for_a_SOr) == (a, b, 0.5, None)
    assert ruled_pairs(ruled, a, b).b_for_a_SOr is not None
    assert ruled_pairs(ruled, a.detach(), b).b_for_a_SOr is None, "an A that does not train has no gradient to change"
