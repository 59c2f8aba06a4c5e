"""The MixLoRA feed-forward in Triton against its reference in float64: output and every gradient, by name."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout
from hecate.kernels.common.ffn import FfnBase
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.mixlora.operators import mixlora_ffn_triton, mixlora_operator
from hecate.kernels.mixlora.reference import mixlora_ffn_reference
from tests.kernels.grouping import poisoned
from tests.kernels.mixlora.cases import CASES, Case, compare, results

__all__ = ["poisoned"]

pytestmark = pytest.mark.usefixtures("poisoned")
HARD = ("plain", "gelu_tanh", "slots with no assignments", "some assignments elsewhere", "dropout, assignments elsewhere", "no down")
RANKS = {
    "rank 16": Case(tokens=40, hidden=17, ffn=70, rank=16, slots=3),
    "rank 64, dropout": Case(tokens=12, hidden=9, ffn=20, rank=64, slots=2, dropout=0.2),
    "one hot slot": Case(tokens=60, slots=3, absent=(0, 2), k=1, ffn=33),
}


@pytest.mark.parametrize("name", [*CASES, *RANKS])
def test_fp32(name: str) -> None:
    case = dataclasses.replace((CASES | RANKS)[name], dtype=torch.float32)
    compare(results(mixlora_ffn_triton, case), results(mixlora_ffn_reference, case, compute_in=torch.float64), 1e-6)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)])
@pytest.mark.parametrize("name", HARD)
def test_16_bits_with_fp32_pairs(name: str, dtype: torch.dtype, unit: float) -> None:
    """A handful of roundings on the way of each element, as in torch's version."""
    case = dataclasses.replace(CASES[name], dtype=dtype, pair_dtype=torch.float32)
    got = results(mixlora_ffn_triton, case)
    assert got["y"].dtype == got["d x"].dtype == dtype
    assert {g.dtype for key, g in got.items() if key not in ("y", "d x")} == {torch.float32}
    compare(got, results(mixlora_ffn_reference, case, compute_in=torch.float64), 8 * unit)


def test_two_runs_are_equal_bit_for_bit() -> None:
    case = dataclasses.replace(CASES["dropout, assignments elsewhere"], dtype=torch.float32)
    first, second = results(mixlora_ffn_triton, case), results(mixlora_ffn_triton, case)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["dropout, assignments elsewhere", "no down"])
def test_torch_library_is_left_out_without_a_change(name: str) -> None:
    """It carries the operator under torch.compile only."""
    case = dataclasses.replace(CASES[name], dtype=torch.float32)
    direct, names = results(mixlora_ffn_triton, case), []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(op.name())
            return op(*args, **(kwargs or {}))

    with mock.patch("torch.compiler.is_compiling", return_value=True), Note():
        carried = results(mixlora_ffn_triton, case)
    assert {"hecate::mixlora_ffn", "hecate::mixlora_ffn_backward"} <= set(names)
    assert direct.keys() == carried.keys()
    assert all(torch.equal(direct[name], carried[name]) for name in direct)
    names.clear()
    with Note():
        results(mixlora_ffn_triton, case)
    assert not any(name.startswith("hecate::") for name in names)


def layer(ranks: tuple[int, ...], *, dropout: float = 0.0) -> tuple[RoutedTokens, FfnBase, dict[str, LowRankPairs], Dropout | None]:
    """Arguments of a layer whose slots have these ranks, in matrices of the largest."""
    random = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    hidden, ffn, tokens = 6, 9, 11
    loras = {}
    for name, inputs, outputs in (("gate_proj", hidden, ffn), ("up_proj", hidden, ffn), ("down_proj", ffn, hidden)):
        a, b = normal(len(ranks), max(ranks), inputs), normal(len(ranks), outputs, max(ranks))
        for slot, rank in enumerate(ranks):
            a[slot, rank:], b[slot, :, rank:] = 0.0, 0.0
        loras[name] = LowRankPairs(a.requires_grad_(), b.requires_grad_(), 0.5)
    base = FfnBase(normal(ffn, hidden), normal(ffn, hidden), normal(hidden, ffn), "silu")
    slot = torch.randint(len(ranks), (tokens, 2), generator=random)
    x, weight = normal(tokens, hidden).requires_grad_(), normal(tokens, 2).requires_grad_()
    routed = RoutedTokens(x, slot, weight, torch.arange(tokens), torch.arange(len(ranks)))
    return routed, base, loras, Dropout(dropout, key=3) if dropout else None


def own_pair(lora: LowRankPairs, slot: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [1, rank, inputs] and B [1, outputs, rank] of a slot."""
    return lora.a_SrI[slot : slot + 1, :rank], lora.b_SOr[slot : slot + 1, :, :rank]


def test_ranks_that_differ_by_slot() -> None:
    """Each slot's gradients are those of its own ranks, and the rest stays zero, so a step keeps the ranks."""
    ranks = (1, 3, 17)
    routed, base, loras, _ = layer(ranks)
    mixlora_ffn_triton(routed, base, loras).sum().backward()
    for name, lora in loras.items():
        own = {"A": [lora.a_SrI.grad[s, rank:] for s, rank in enumerate(ranks)]}
        own["B"] = [lora.b_SOr.grad[s, :, rank:] for s, rank in enumerate(ranks)]
        assert not any(part.any() for parts in own.values() for part in parts), name
        assert all(lora.a_SrI.grad[s, :rank].any() for s, rank in enumerate(ranks)), name
    found = {name: (lora.a_SrI.grad, lora.b_SOr.grad) for name, lora in loras.items()}
    again, base, loras, _ = layer(ranks)
    narrow = {
        s: {
            n: LowRankPairs(
                v.a_SrI[s : s + 1, :rank].detach().requires_grad_(), v.b_SOr[s : s + 1, :, :rank].detach().requires_grad_(), v.scale
            )
            for n, v in loras.items()
        }
        for s, rank in enumerate(ranks)
    }
    for s, rank in enumerate(ranks):
        mixlora_ffn_reference(dataclasses.replace(again, slot_TK=torch.where(again.slot_TK == s, 0, -1)), base, narrow[s]).sum().backward()
        for name, lora in narrow[s].items():
            torch.testing.assert_close(found[name][0][s, :rank], lora.a_SrI.grad[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[name][1][s, :, :rank], lora.b_SOr.grad[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_torch_library_agrees(dropout: float) -> None:
    """Schema, fake results against real ones, autograd's registration; results there and then under tracing."""
    calls: list[tuple[Any, ...]] = []
    with mock.patch("torch.compiler.is_compiling", return_value=True), mock.patch.object(mixlora_operator, "library", noting(calls)):
        routed, base, pairs, how = layer((3, 3), dropout=dropout)
        mixlora_ffn_triton(routed, base, pairs, dropout=how)
    torch.library.opcheck(mixlora_operator.library, calls[0])


def noting(calls: list[tuple[Any, ...]]) -> Any:
    """An operator's stand-in, which notes its arguments."""

    def note(*arguments: Any) -> tuple[torch.Tensor]:
        calls.append(arguments)
        return (arguments[0],)

    return note


def test_compiles_without_a_break() -> None:
    routed, base, loras, _ = layer((3, 3))

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return mixlora_ffn_triton(dataclasses.replace(routed, x_TD=x * 2, weight_TK=weight), base, loras).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = [routed.x_TD, routed.weight_TK]
    got, want = (torch.autograd.grad(function(*inputs), inputs) for function in (compiled, loss))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
