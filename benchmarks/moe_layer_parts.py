"""The parts of the `moe_layer` benchmark: three kinds of experts, the routings, one step, and the check against the formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.engine.engine import Engine
from hecate.engine.step_plans import EngineConfig
from hecate.experts.families import make_experts
from hecate.experts.family import ExpertChoices, ExpertFamily, FfnExperts, FfnSource, Site
from hecate.experts.mixlora import MixLoraExperts
from hecate.experts.moe_lora import MoeLoraExperts
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.ffn import PROJECTIONS, FfnBase, FfnShape
from hecate.kernels.experts.reference import full_ffn_reference, moe_lora_ffn_reference
from hecate.kernels.mixlora.reference import mixlora_ffn_reference
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import KINDS, Family, LoraShape
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import ExpertGroups

FFN_KINDS = tuple(name for name, kind in KINDS.items() if not kind.over_linears)
ROUTINGS = ("zipf(1.2)", "balanced", "hot", "rotating")
ROTATION = 2
"""the steps between two changes of the rotating hot expert, fewer than the history from which a plan is made"""
_HOT_SHARE = 0.5


@dataclass(frozen=True)
class Shape:
    hidden: int = 512
    ffn: int = 1408
    rank: int = 16
    experts: int = 8
    top_k: int = 2
    tokens: int = 2048
    """the tokens of each rank"""

    @property
    def expert(self) -> FfnShape:
        return FfnShape(self.hidden, self.ffn, "silu")

    @property
    def attention_flops(self) -> float:
        """The forward FLOPs of `Projections`."""
        return 8.0 * self.hidden**2 * self.tokens


class Projections(nn.Module):
    """Four hidden x hidden matrices before the experts, the GEMMs of attention, which a step can overlap with transfers."""

    def __init__(self, shape: Shape, *, trained: bool) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        size = (shape.hidden, shape.hidden)
        weights = [torch.randn(size, generator=random) / shape.hidden**0.5 for _ in range(4)]
        self.weights = nn.ParameterList([nn.Parameter(weight, requires_grad=trained) for weight in weights])

    def forward(self, x_TD: Tensor) -> Tensor:
        for weight in self.weights:
            x_TD = x_TD @ weight.T
        return x_TD


def route(routing: str, shape: Shape, seed: int, step: int = 0) -> tuple[Tensor, Tensor]:
    """Draw k different experts and their weights for each token, anew for each seed and step.

    balanced: all experts have equal odds. zipf(1.2): Zipf odds, with expert 0 the hottest. hot: one expert is the first of half of the
    tokens, and all others are equal. rotating: as hot, but the hot expert changes every `ROTATION` steps, alternating between the ranks.
    """
    rng = np.random.default_rng([seed, step])
    odds = np.arange(1, shape.experts + 1, dtype=np.float64) ** (-1.2 if routing.startswith("zipf") else 0.0)
    # Exponential races draw without replacement with the given odds.
    arrival = rng.exponential(size=(shape.tokens, shape.experts)) / odds
    if routing in ("hot", "rotating"):
        turn = step // ROTATION if routing == "rotating" else 0
        hot = (turn * (shape.experts // 2 + 1)) % shape.experts
        arrival[rng.random(shape.tokens) < (_HOT_SHARE * shape.experts - 1) / (shape.experts - 1), hot] = 0.0
    expert = np.argsort(arrival, axis=1)[:, : shape.top_k]
    weight = rng.random((shape.tokens, shape.top_k)) + 0.5
    return torch.from_numpy(expert), torch.from_numpy(weight / weight.sum(1, keepdims=True)).float()


def make_family(kind: Family, shape: Shape) -> ExpertFamily:
    """Return a family with random chunks, B included, which are made once for all engines."""
    family = _family(kind, shape)
    numel = family.layout().trainable_numel
    chunks = [torch.randn(numel, generator=torch.Generator().manual_seed(expert)) * 0.02 for expert in range(shape.experts)]
    family.init_chunk = chunks.__getitem__  # type: ignore[method-assign]
    return family


def _family(kind: Family, shape: Shape) -> FfnExperts:
    cpu = torch.device("cpu")
    site = Site(Unit(0), shape.experts, shape.expert, 0, torch.float32, torch.float32, cpu)
    gate_up, down = shape.expert.matrices(weights(shape, 0))
    gate, up = gate_up.chunk(2)
    frozen = [weights(shape, expert) for expert in range(shape.experts)] if KINDS[kind].of_moe_base else []
    lora = LoraShape(shape.rank, 2.0, 0.0) if KINDS[kind].has_pairs else None
    # Of experts of an MoE base gate and up get a pair each, other than in a model, so that all kinds compute alike.
    choices = ExpertChoices(lora, PROJECTIONS)
    return make_experts(KINDS[kind], site, FfnSource(FfnBase(gate, up, down, "silu"), frozen.__getitem__), choices)


def weights(shape: Shape, expert: int) -> Tensor:
    """Return the weights of a gated FFN as a flat tensor."""
    random = torch.Generator().manual_seed(1000 + expert)
    sizes = (shape.hidden, shape.hidden, shape.ffn)
    return torch.cat([torch.randn(shape.hidden * shape.ffn, generator=random) / size**0.5 for size in sizes])


def make_engine(
    policy: str, shape: Shape, groups: ExpertGroups, topology: Topology, family: ExpertFamily | None = None, **options: Any
) -> Engine:
    """Return an engine with one layer. `options` are fields of `EngineConfig`."""
    family = family or make_family("mixlora", shape)
    config = EngineConfig(POLICIES[policy], topology, top_k=shape.top_k, non_moe_flops=shape.attention_flops, **options)
    return Engine({Unit(0): family}, config, groups)


def one_step(
    engine: Engine,
    step: int,
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    *,
    per_choice: bool = False,
    before: Projections | None = None,
) -> tuple[Tensor, dict[int, np.ndarray]]:
    """Run a forward and a backward pass.

    Args:
        per_choice: whether each assignment is treated as a token of its own.
        before: the projections that run while experts are gathered.
    """
    this_step = engine.begin_step(step)
    micro = this_step.begin_micro_step()
    micro.prefetch(Unit(0))
    if before is not None:
        x = before(x)
    if per_choice:
        tokens, k = expert.shape
        token = torch.arange(tokens).repeat_interleave(k)
        y = micro.experts(Unit(0), x.repeat_interleave(k, 0), expert.reshape(-1, 1), weight.reshape(-1, 1), token)
        y = y.view(tokens, k, -1).sum(1)
    else:
        y = micro.experts(Unit(0), x, expert, weight, torch.arange(len(x)))
    micro.backward(y, torch.ones_like(y))
    return y, this_step.finish()


class Formula:
    """The output for this rank's tokens and the gradients, by the plain formula over the experts of all ranks.

    Every rank must construct one.
    """

    def __init__(self, family: ExpertFamily, rank: int, shape: Shape, expert: Tensor, weight: Tensor) -> None:
        self.x = torch.randn(shape.tokens, shape.hidden, generator=torch.Generator().manual_seed(9 + rank)).requires_grad_()
        self.routed = expert, weight
        chunks = torch.stack([family.init_chunk(e) for e in range(shape.experts)]).requires_grad_()
        self.y = _formula(family, shape, self.x, expert, weight, chunks)
        self.dx, self.dchunks = torch.autograd.grad(self.y, (self.x, chunks), torch.ones_like(self.y))
        dist.all_reduce(self.dchunks)

    def check(self, engine: Engine, *, per_choice: bool = False) -> None:
        """Raise AssertionError if the engine's first step has another result."""
        x = self.x.detach().clone().requires_grad_()
        y, _ = one_step(engine, 0, x, *self.routed, per_choice=per_choice)
        torch.testing.assert_close(y, self.y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.grad, self.dx, rtol=1e-3, atol=1e-3)
        for (_, number), parameter in engine.shards.named_parameters().items():
            assert parameter.grad is not None
            error = float((parameter.grad - self.dchunks[number]).norm() / self.dchunks[number].norm())
            assert error < 1e-5, f"gradient of expert {number} is off by {error:.1e}"


def check(engine: Engine, rank: int, shape: Shape, expert: Tensor, weight: Tensor, *, per_choice: bool) -> None:
    """Compare the layer's output and gradients with the plain formula. Every rank must call it. Raises AssertionError if they differ."""
    Formula(engine.shards.families[Unit(0)], rank, shape, expert, weight).check(engine, per_choice=per_choice)


def _formula(family: ExpertFamily, shape: Shape, x: Tensor, expert: Tensor, weight: Tensor, chunks: Tensor) -> Tensor:
    routed = RoutedTokens(x, expert, weight)
    if isinstance(family, MixLoraExperts):
        return mixlora_ffn_reference(routed, family.base, family.pair_source.stacked(chunks, torch.arange(shape.experts)))
    if isinstance(family, MoeLoraExperts):
        frozen = [weights(shape, e) for e in range(shape.experts)]
        return moe_lora_ffn_reference(routed, frozen, family.pair_source.stacked(chunks, torch.arange(shape.experts)), shape.expert)
    return full_ffn_reference(routed, chunks, shape.expert)
