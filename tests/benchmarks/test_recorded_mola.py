"""Experts over a linear compute what MoE-PEFT's mola has computed, as `benchmarks.peers.record_mola` has written down."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from benchmarks.peers.record_mola import RECORD
from benchmarks.peers.wheels import PINNED
from hecate.engine.engine import Engine
from hecate.engine.step_plans import EngineConfig
from hecate.experts.family import Site
from hecate.experts.linear import LinearExperts, MoeLinear
from hecate.experts.pairs.sources.plain import PlainPairs
from hecate.experts.routers.by_input.token import TopKRouter
from hecate.experts.routers.router import RouterSite
from hecate.kernels.backend import Backend
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import ONLY_PROJECTION, LinearSizes, LoraShape
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import expert_groups
from tests.hecate.conftest import one_rank

__all__ = ["one_rank"]

UNIT, CPU = Unit(0, "self_attn.q_proj"), torch.device("cpu")


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, and what the file says of them."""
    with safe_open(RECORD, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - it is no mapping


def results(given: dict[str, Tensor], facts: dict[str, str], kernels: Backend) -> dict[str, Tensor]:
    """The output and the gradients of a linear with experts, on one rank."""
    (outputs, inputs), (experts, rank, _) = given["weight"].shape, given["A"].shape
    sizes, top_k = LinearSizes(inputs, outputs), int(facts["top_k"])
    site = Site(UNIT, experts, sizes, 0, torch.float32, torch.float32, CPU, kernels)
    family = LinearExperts(site, PlainPairs(LoraShape(rank, float(facts["alpha"]) / rank, 0.0), (ONLY_PROJECTION,), sizes))
    config = EngineConfig(POLICIES["full"], local_topology(1, cuda=False), top_k=top_k)
    engine = Engine({UNIT: family}, config, expert_groups(make_mesh(1)))
    chunks = {expert: chunk for (_, expert), chunk in engine.shards.named_parameters().items()}
    for expert, chunk in chunks.items():
        chunk.data.copy_(torch.cat([given["A"][expert].flatten(), given["B"][expert].flatten()]))
    router = TopKRouter(RouterSite(unit=UNIT, hidden=inputs, num_experts=experts, top_k=top_k, seed=0, dtype=torch.float32, device=CPU))
    router.weight.data.copy_(given["router"])
    linear = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
    linear.weight.copy_(given["weight"])
    module, x = MoeLinear(UNIT, router, engine.current, linear), given["x"].clone().requires_grad_()

    step = engine.begin_step(0)
    micro = step.begin_micro_step()
    y = module(x)
    micro.backward(y, given["dy"])
    step.finish()
    of_pairs = torch.stack([chunk.grad for chunk in chunks.values() if chunk.grad is not None])
    of_a, of_b = of_pairs.split([rank * inputs, outputs * rank], dim=1)
    assert x.grad is not None
    assert router.weight.grad is not None
    gradients = {"x": x.grad, "router": router.weight.grad, "A": of_a.view_as(given["A"]), "B": of_b.view_as(given["B"])}
    return {"y": y.detach(), **{f"gradient of {name}": gradient for name, gradient in gradients.items()}}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kernels", ["torch", "reference", "triton"])
def test_a_linear_with_experts_is_moe_pefts_mola(recorded: tuple[dict[str, Tensor], dict[str, str]], kernels: Backend) -> None:
    """The output, and the gradients of the input, the router and every pair; Triton's kernels are interpreted."""
    given, facts = recorded
    for name, found in results(given, facts, kernels).items():
        error = float((found - given[name]).abs().max() / given[name].abs().max())
        assert error < 1e-6, f"{name}: off by {error:.2e}"


def test_the_record_is_of_the_version_that_is_measured_against(recorded: tuple[dict[str, Tensor], dict[str, str]]) -> None:
    """And each of its experts has tokens, so that no gradient is trivial."""
    given, facts = recorded
    assert facts["made by"] == PINNED["moe_peft"]
    assert given["gradient of B"].abs().amax((1, 2)).min() > 0.1
