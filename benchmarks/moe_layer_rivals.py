"""Compare one layer of full experts with Megatron's MoELayer and with torch's FSDP2.

beside_megatron: expert parallelism by Megatron's alltoall dispatcher, with 8 experts. beside_fsdp2: all 64 experts are gathered before
each pass, and each rank computes its own tokens with our kernel. Both sides get the same routing, each in its own form. There is no
attention before the layer. Both sides start from the same weights, and their results are checked against the plain formula before they
are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.moe_layer_parts import Formula, Shape, make_family, one_step, route
from benchmarks.moe_layer_ratios import FSDP2, MEGATRON, compared, side_by_side
from benchmarks.ratios import Budget
from benchmarks.slowest_rank import SlowestRank, take_turns
from hecate.engine.engine import Engine
from hecate.engine.step_plans import EngineConfig
from hecate.experts.family import ExpertFamily
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.experts.torch_path import full_ffn
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import ExpertGroups

RIVAL_KINDS = ("beside_megatron", "beside_fsdp2")
OURS = ("auto", "hecate_paper", "static_ep", "full")
ROUTINGS = ("balanced", "zipf(1.2)")


def rival_shape(kind: str, *, quick: bool) -> Shape:
    experts = 8 if kind == "beside_megatron" else 64
    if quick:
        return Shape(hidden=256, ffn=512, experts=min(experts, 16), tokens=512)
    return Shape(hidden=512, ffn=1024, experts=experts, tokens=4096)


class Layer(Protocol):
    """A layer under test: its forward and backward pass, and the reduction of its gradients."""

    def step(self, number: int, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor: ...

    def gradients(self) -> dict[int, Tensor]:
        """Return the flat gradients of some experts. Those of all ranks together cover all experts."""
        ...


class Ours:
    def __init__(self, policy: str, shape: Shape, groups: ExpertGroups, topology: Topology, family: ExpertFamily) -> None:
        self.engine = Engine({Unit(0): family}, EngineConfig(POLICIES[policy], topology, top_k=shape.top_k), groups)

    def step(self, number: int, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        return one_step(self.engine, number, x, expert, weight)[0]

    def gradients(self) -> dict[int, Tensor]:
        return {expert: p.grad for (_, expert), p in self.engine.shards.named_parameters().items() if p.grad is not None}


class Megatron:
    """Megatron's MoELayer with a router that returns the given routing."""

    def __init__(self, shape: Shape, group: dist.ProcessGroup, family: ExpertFamily) -> None:
        from hecate.apps.megatron.imports import quietly
        from hecate.config.gpt_shape import GptShape

        with quietly():
            from hecate.apps.megatron.expert_parallel import build_layer, expert_parallel_config
            from hecate.apps.megatron.gpt import process_groups
            from testing.megatron_experts import flat_expert, set_expert

            sizes = GptShape(1, shape.hidden, 1, 1, shape.hidden, shape.ffn, shape.experts, shape.top_k, shape.tokens)
            config = expert_parallel_config(sizes, torch.float32, dist.get_world_size(group))
            self._layer = build_layer(config, process_groups(ExpertGroups(group, group)), 0)
        self._flat = flat_expert
        self._num_experts = shape.experts
        for expert in range(shape.experts):
            set_expert(self._layer, expert, family.init_chunk(expert))
        self._told = _Told()
        self._layer.router = self._told

    def step(self, number: int, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        empty_TE = x.new_zeros((len(x), self._num_experts))
        self._told.answer = empty_TE.scatter(1, expert, weight), empty_TE.bool().scatter(1, expert, True)
        self._layer.zero_grad(set_to_none=True)
        y = self._layer(x[:, None])[0].squeeze(1)
        y.backward(torch.ones_like(y))
        return y

    def gradients(self) -> dict[int, Tensor]:
        return {expert: self._flat(self._layer, expert, grad=True) for expert in self._layer.local_expert_indices}


class _Told(nn.Module):
    answer: tuple[Tensor, Tensor]

    def forward(self, *_: Any) -> tuple[Tensor, Tensor]:
        return self.answer


class Fsdp2:
    """All experts as one parameter, of which each rank holds a part, by torch's FSDP2."""

    def __init__(self, shape: Shape, family: ExpertFamily) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self._module: Any = _AllExperts(shape, torch.stack([family.init_chunk(expert) for expert in range(shape.experts)]))
        fully_shard(self._module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self._module.set_gradient_divide_factor(1.0)
        self._module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale as it sums

    def step(self, number: int, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        self._module.zero_grad(set_to_none=True)
        y = self._module(x, expert, weight)
        y.backward(torch.ones_like(y))
        return y

    def gradients(self) -> dict[int, Tensor]:
        mine = self._module.experts_EC.grad.to_local()
        first = dist.get_rank() * len(mine)
        return {first + index: grad for index, grad in enumerate(mine)}


class _AllExperts(nn.Module):
    def __init__(self, shape: Shape, experts_EC: Tensor) -> None:
        super().__init__()
        self._shape = shape.expert
        self.experts_EC = nn.Parameter(experts_EC)

    def forward(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        return full_ffn(RoutedTokens(x, expert, weight), self.experts_EC, self._shape)


def bench_kind(
    rank: int, kind: str, shape: Shape, budget: Budget, table: Budget, groups: ExpertGroups, topology: Topology
) -> list[dict[str, Any]]:
    """Time all layers of a kind, which take turns. A sample is the slowest rank's time."""
    family = make_family("full", shape)
    makers: dict[str, Callable[[], Layer]] = {
        policy: lambda policy=policy: Ours(policy, shape, groups, topology, family)  # type: ignore[misc]
        for policy in OURS
    }
    if kind == "beside_megatron":
        makers[MEGATRON] = lambda: Megatron(shape, groups.tokens, family)
    else:
        makers[FSDP2] = lambda: Fsdp2(shape, family)
    _check(rank, shape, family, makers)
    rows = []
    for routing in ROUTINGS:
        pairs = compared(kind, routing)
        x = torch.randn(shape.tokens, shape.hidden, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        clocks = {name: SlowestRank(_steps(make(), x, partial(route, routing, shape, rank))) for name, make in makers.items()}
        take_turns(clocks, side_by_side(pairs), pairs, budget)
        take_turns(clocks, OURS[1:], [], table)
        rows += [{"policy": name, "routing": routing, "ms_all": one.ms, "cpu_ms_all": one.cpu_ms} for name, one in clocks.items()]
    return rows


def _steps(layer: Layer, x: Tensor, routed: Callable[[int], tuple[Tensor, Tensor]]) -> Callable[[int], Callable[[], object]]:
    def prepare(step: int) -> Callable[[], object]:
        expert, weight = routed(step)
        x.grad = None
        return partial(layer.step, step, x, expert, weight.requires_grad_())

    return prepare


def _check(rank: int, shape: Shape, family: ExpertFamily, makers: dict[str, Callable[[], Layer]]) -> None:
    """Raise AssertionError if a layer's results differ from the plain formula's."""
    expert, weight = route(ROUTINGS[1], shape, seed=rank)
    formula = Formula(family, rank, shape, expert, weight)
    for name, make in makers.items():
        layer, x = make(), formula.x.detach().clone().requires_grad_()
        y = layer.step(0, x, expert, weight.clone().requires_grad_())
        torch.testing.assert_close(y, formula.y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.grad, formula.dx, rtol=1e-3, atol=1e-3)
        found = layer.gradients()
        assert found, name
        for number, grad in found.items():
            error = float((grad - formula.dchunks[number]).norm() / formula.dchunks[number].norm().clamp(min=1e-12))
            assert error < 1e-5, f"{name}: gradient of expert {number} is off by {error:.1e}"
