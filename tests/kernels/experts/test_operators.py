"""The FFN on grouped kernels against the reference in float64: output and every gradient, by name. Unwritten memory is NaN."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_map_only

from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.ffn import PROJECTIONS, FfnShape
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.kernels.experts.full_operators import full_ffn_triton
from hecate.kernels.experts.moe_lora_operators import moe_lora_ffn_triton
from hecate.kernels.experts.reference import full_ffn_reference, moe_lora_ffn_reference
from tests.kernels.conftest import INTERPRETED
from tests.kernels.experts.cases import CASES, LORA_CASES, Case, Inputs, full, lora
from tests.kernels.grouping import poisoned
from tests.kernels.mixlora.cases import compare

__all__ = ["poisoned"]

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU, test_on_gpu_gemm runs the FFN instead: these inputs are on the CPU")

KINDS: dict[str, tuple[Callable[..., dict[str, torch.Tensor]], Any, Any]] = {
    "full": (full, full_ffn_triton, full_ffn_reference),
    "lora": (lora, moe_lora_ffn_triton, moe_lora_ffn_reference),
}
WIDE = Case(tokens=29, hidden=40, ffn=72, slots=3, rank=8, elsewhere=0.2)
"""more than a tile in every direction"""
RANKS = {f"rank {rank}": Case(rank=rank, tokens=9, spread=0.5) for rank in (1, 8, 16, 64)}


def single(case: Case) -> Case:
    return dataclasses.replace(case, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*CASES, "wide", "k 4"])
def test_float32(name: str, kind: str, poisoned: None) -> None:
    case = single({**CASES, "wide": WIDE, "k 4": Case(k=4, tokens=9, slots=5)}[name])
    run, fast, reference = KINDS[kind]
    compare(run(fast, case, None), run(reference, case, torch.float64), 1e-6)


@pytest.mark.parametrize("name", [*LORA_CASES, *RANKS])
def test_adapters_on_some_projections_dropout_and_ranks(name: str, poisoned: None) -> None:
    case = single({**LORA_CASES, **RANKS}[name])
    compare(lora(moe_lora_ffn_triton, case, None), lora(moe_lora_ffn_reference, case, torch.float64), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_with_float32_masters(kind: str, dtype: torch.dtype, poisoned: None) -> None:
    """A handful of roundings on the way of each element, of 2^-9 in bfloat16 and 2^-12 in float16."""
    run, fast, reference = KINDS[kind]
    case = dataclasses.replace(WIDE, dtype=dtype, master_dtype=torch.float32, dropout=0.2, spread=0.3)
    got = run(fast, case, None)
    assert got["y"].dtype == got["d x"].dtype == dtype
    assert {gradient.dtype for name, gradient in got.items() if name not in ("y", "d x")} == {torch.float32}
    compare(got, run(reference, case, torch.float64), 8 * (2**-9 if dtype == torch.bfloat16 else 2**-12))


def test_gradients_of_rounded_experts_are_those_of_their_masters(poisoned: None) -> None:
    given = Inputs(dataclasses.replace(WIDE, dtype=torch.bfloat16), None)
    masters = given.normal(3, given.shape.numel, dtype=torch.float32)
    rounded = masters.detach().bfloat16().requires_grad_()
    rounded.grad_dtype = torch.float32
    outputs = [full_ffn_triton(given.routed(), experts, given.shape) for experts in (masters, rounded)]
    for y in outputs:
        y.square().sum().backward()
    assert torch.equal(*outputs)
    assert masters.grad is not None
    assert rounded.grad is not None
    assert (rounded.grad.dtype, rounded.grad.any()) == (torch.float32, True)
    assert torch.equal(rounded.grad, masters.grad)


def test_ranks_of_gate_up_and_down_may_differ(poisoned: None) -> None:
    def run(function: Any, compute_in: torch.dtype | None) -> dict[str, torch.Tensor]:
        given = Inputs(single(Case(tokens=9, slots=2)), compute_in)
        frozen = [given.normal(given.shape.numel, grad=False) for _ in range(2)]
        loras = {}
        for name, rank, wide, narrow in zip(PROJECTIONS, (3, 17, 1), (6, 6, 10), (10, 10, 6), strict=True):
            a = given.named[f"{name}.A"] = given.normal(2, rank, wide)
            b = given.named[f"{name}.B"] = given.normal(2, narrow, rank)
            loras[name] = LowRankPairs(a, b, 0.7)
        return given.results(function(given.routed(), frozen, loras, given.shape))

    compare(run(moe_lora_ffn_triton, None), run(moe_lora_ffn_reference, torch.float64), 1e-6)


def test_no_slots_at_all() -> None:
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    slot, shape = torch.full((5, 2), -1), FfnShape(6, 10, "silu")
    experts = torch.empty(0, shape.numel, requires_grad=True)
    pair = torch.empty(0, 3, 6, requires_grad=True), torch.empty(0, 10, 3, requires_grad=True)
    outputs = {
        "full": (full_ffn_triton(RoutedTokens(x, slot, weight), experts, shape), (experts,)),
        "lora": (moe_lora_ffn_triton(RoutedTokens(x, slot, weight), [], {"gate_proj": LowRankPairs(*pair, 1.0)}, shape), pair),
    }
    for name, (y, trained) in outputs.items():
        assert not y.any(), name
        dx, dweight, *rest = torch.autograd.grad(y.sum(), (x, weight, *trained))
        assert not dx.any(), name
        assert not dweight.any(), name
        assert [d.shape for d in rest] == [t.shape for t in trained], name


def test_what_is_kept_of_trained_weights_are_views(poisoned: None) -> None:
    """The engine frees the replicas' storage after the forward pass, and fills it again before the backward pass."""
    case = single(Case(tokens=9))
    for run, fast, _ in KINDS.values():
        want = run(fast, case, None)

        def freed(*args: Any, fast: Any = fast, **kwargs: Any) -> torch.Tensor:
            trained = args[1] if isinstance(args[1], torch.Tensor) else args[2]["gate_proj"].a_SrI
            copy, size = trained.detach().clone(), trained.untyped_storage().size()
            y = fast(*args, **kwargs)
            trained.untyped_storage().resize_(0)
            trained.untyped_storage().resize_(size)
            trained.data.copy_(copy)
            return y

        for name, value in run(freed, case, None).items():
            assert torch.equal(value, want[name]), name


def inputs_of(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """A function of differentiable tensors, and such tensors."""
    given = Inputs(dataclasses.replace(Case(tokens=7, slots=3), dtype=dtype), None)
    x, weight = given.named["x"], given.named["weight"]
    if kind == "full":
        experts = given.normal(3, given.shape.numel)
        return lambda x, w, e: full_ffn_triton(RoutedTokens(x, given.slot, w), e, given.shape), [x, weight, experts]
    frozen = [given.normal(given.shape.numel, grad=False) for _ in range(3)]
    sizes = {"gate_proj": (6, 10), "down_proj": (10, 6)}
    pairs = [t for wide, narrow in sizes.values() for t in (given.normal(3, 2, wide), given.normal(3, narrow, 2))]

    def of(x: torch.Tensor, weight: torch.Tensor, *pairs: torch.Tensor) -> torch.Tensor:
        loras = {name: LowRankPairs(*pairs[2 * i : 2 * i + 2], 0.7) for i, name in enumerate(sizes)}
        return moe_lora_ffn_triton(RoutedTokens(x, given.slot, weight), frozen, loras, given.shape)

    return of, [x, weight, *pairs]


@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile_without_a_break(kind: str) -> None:
    function, inputs = inputs_of(kind)
    want = function(*inputs)
    got = torch.compile(lambda *args: function(*args) * 1.0, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_registration(kind: str) -> None:
    """opcheck of the operators with the arguments that the public functions give them. It compares what is kept, and rows of
    assignments elsewhere are not written: there are none."""
    function, inputs = inputs_of(kind)
    forward = {"full": torch.ops.hecate.full_ffn, "lora": torch.ops.hecate.moe_lora_ffn}[kind].default
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.namespace == "hecate":
                calls.append((op, args))
            return op(*args, **(kwargs or {}))

    with Record(), mock.patch("torch.compiler.is_compiling", return_value=True):
        function(*inputs).sum().backward()
    assert [op.name().removesuffix("_backward") for op, _ in calls] == [forward.name()] * 2
    for op, args in calls:
        torch.library.opcheck(op, tree_map_only(torch.Tensor, functools.partial(leaf, differentiable=op is forward), args))


def leaf(tensor: torch.Tensor, *, differentiable: bool) -> torch.Tensor:
    return tensor.detach().requires_grad_(differentiable and tensor.is_floating_point())
