"""What a prediction may know: seconds of single parts of a step, measured apart from any run, all ranks at once.

Work is told to the cost model in FLOPs at the topology's rate, so work that runs below that rate counts as more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gloo_steps import Clock, Shape, Stack, Taken, attention, attention_weights, draw_routing, make_experts
from hecate.experts.family import ExpertReplicas
from hecate.experts.mixlora import MixLoraExperts
from hecate.kernels.common.assignments import RoutedTokens
from hecate.parallel.comm.dispatch import combine, dispatch
from hecate.parallel.cost_loops import DISPATCH_COLLECTIVES
from hecate.parallel.cost_model import LayerCost
from hecate.parallel.placement import contiguous_owners, everything_everywhere
from hecate.parallel.planners import POLICIES
from hecate.parallel.topology import Link, Topology
from hecate.parallel.transfer_plan import plan_tokens
from hecate.ranks.groups import ExpertGroups

Probe = Callable[[], object]
_MEGABYTE = 1 << 20


class Probes:
    """The parts of a step on this rank, each ready to be run once more."""

    def __init__(self, shape: Shape, topology: Topology, groups: ExpertGroups, rank: int) -> None:
        self.actions: dict[str, Probe] = {
            "attention": _attention(shape),
            "experts": _experts(shape, shape.tokens, shape.top_k),
            "experts_half_choices": _experts(shape, shape.tokens, shape.top_k // 2),
            "experts_quarter": _experts(shape, shape.tokens // 4, shape.top_k),
            "dispatch_nothing": _dispatch(shape, 0, groups, rank),
            "dispatch": _dispatch(shape, shape.tokens, groups, rank),
            "megabyte": _megabyte(groups),
            "empty_step": _empty_step(shape, topology, groups),
        }
        for action in self.actions.values():
            action()

    def run(self, clock: Clock) -> dict[str, Taken]:
        """Every rank must call it."""
        return {name: clock.time(action) for name, action in self.actions.items()}


def yardstick(shape: Shape) -> Probe:
    """Attention and experts of a quarter of the tokens, nothing sent."""
    attend, compute = _attention(replace(shape, tokens=shape.tokens // 4)), _experts(shape, shape.tokens // 4, shape.top_k)

    def run() -> None:
        attend()
        compute()

    return run


def plain_cost(shape: Shape) -> LayerCost:
    """As the engine's family states it, before anything is measured."""
    return MixLoraExperts.cost(make_experts(shape, 0), shape.top_k, shape.attention_flops)


@dataclass(frozen=True)
class Parts:
    """Seconds of single parts, forward and backward."""

    attention: float
    """of a layer"""
    row: float
    """of a distinct token that a rank computes,"""
    choice: float
    """of a (token, expert),"""
    slot: float
    """and of an expert that has any tokens on a rank: its tiles are launched apart from others'"""
    exchange: float
    """one of dispatch's collectives, with nothing to carry"""
    passed_row: float
    """copies of a row on its way through dispatch and back, also if it stays on its rank"""
    byte: float
    """sent and received at the same time"""
    rest: float
    """of a step: planning, loads, whatever else is the same with no token at all"""


def parts(seconds: Mapping[str, float], shape: Shape) -> Parts:
    """From the seconds of the probes."""
    tokens, k = shape.tokens, shape.top_k
    choice = (seconds["experts"] - seconds["experts_half_choices"]) / (tokens * (k - k // 2))
    row = (seconds["experts"] - seconds["experts_quarter"]) / (tokens - tokens // 4) - k * choice
    return Parts(
        attention=seconds["attention"],
        row=row,
        choice=choice,
        slot=max(0.0, seconds["experts"] - tokens * (row + k * choice)) / shape.experts,
        exchange=seconds["dispatch_nothing"] / DISPATCH_COLLECTIVES,
        passed_row=max(0.0, seconds["dispatch"] - seconds["dispatch_nothing"]) / tokens,
        byte=max(0.0, seconds["megabyte"] - seconds["dispatch_nothing"] / DISPATCH_COLLECTIVES) / _MEGABYTE,
        rest=max(0.0, seconds["empty_step"] - shape.layers * seconds["dispatch_nothing"]),
    )


def measured_cost(found: Parts, shape: Shape, topology: Topology) -> LayerCost:
    """The layer's cost, its work such that the topology's rate gives the seconds of the parts."""
    rate, cost = min(topology.flops), plain_cost(shape)
    return replace(
        cost,
        non_moe_flops=found.attention / 3 * rate,
        row_flops=found.row * rate / (1 + cost.row_backward),
        assignment_flops=found.choice * rate / (1 + cost.assignment_backward),
    )


def measured_topology(profiled: Sequence[Topology], found: Parts) -> Topology:
    """The first of the topologies with the median bandwidths of all, and the latency of dispatch's collectives."""
    first = profiled[0]
    latency = found.exchange
    return replace(
        first,
        intra_node=Link(median(one.intra_node.bandwidth for one in profiled), latency),
        inter_node=Link(median(one.inter_node.bandwidth for one in profiled), latency),
        port_bandwidth=_medians([one.port_bandwidth for one in profiled]),
        memory_bandwidth=_medians([one.memory_bandwidth for one in profiled]),
        overlap_slowdown=median(one.overlap_slowdown for one in profiled),
    )


def _medians(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(median(column) for column in zip(*rows, strict=True))


def _attention(shape: Shape) -> Probe:
    weights, x_TD = attention_weights(shape), _rows(shape.tokens, shape.hidden)

    def run() -> None:
        y_TD = attention(x_TD, weights)
        y_TD.backward(torch.ones_like(y_TD))
        for weight in weights:
            weight.grad = None

    return run


def _experts(shape: Shape, tokens: int, choices: int) -> Probe:
    """All experts here, alike in load, and all tokens' `choices`."""
    family = make_experts(shape, 0)
    chunks_SC = torch.stack([family.init_chunk(expert) for expert in range(shape.experts)]).requires_grad_()
    x_TD, expert_TK, weight_TK = _rows(tokens, shape.hidden), _even_routing(shape, tokens), _rows(tokens, shape.top_k)
    slot_TK = torch.where(torch.arange(shape.top_k) < choices, expert_TK, -1)

    def run() -> None:
        routed = RoutedTokens(x_TD, slot_TK, weight_TK, torch.arange(tokens), torch.arange(shape.experts))
        y_TD = family.compute(routed, ExpertReplicas(chunks_SC), step=0)
        y_TD.backward(torch.ones_like(y_TD))
        chunks_SC.grad = None

    return run


def _dispatch(shape: Shape, tokens: int, groups: ExpertGroups, rank: int) -> Probe:
    """There and back, forward and backward, of rows that stay on their rank."""
    world = groups.tokens.size()
    placement = everything_everywhere(contiguous_owners(shape.experts, world), world)
    plan = plan_tokens(placement, np.tile(np.arange(world) == rank, (shape.experts, 1)).astype(np.float64))
    x_TD, expert_TK, weight_TK = _rows(tokens, shape.hidden), _even_routing(shape, tokens), _rows(tokens, shape.top_k)

    def run() -> None:
        here = dispatch(x_TD, expert_TK, weight_TK, torch.arange(tokens), plan, groups.tokens)
        y_TD = combine(here.x_RD + 0 * here.weight_RK.sum(), here, groups.tokens)
        y_TD.backward(torch.ones_like(y_TD))

    return run


def _megabyte(groups: ExpertGroups) -> Probe:
    """To other ranks and from them, in equal parts."""
    world, rank = groups.tokens.size(), groups.tokens.rank()
    splits = [0 if peer == rank else _MEGABYTE // (world - 1) for peer in range(world)]
    send = torch.zeros(sum(splits), dtype=torch.uint8)
    receive = torch.empty_like(send)
    return lambda: dist.all_to_all_single(receive, send, splits, splits, group=groups.tokens)


def _empty_step(shape: Shape, topology: Topology, groups: ExpertGroups) -> Probe:
    """A step of expert parallelism without a token, and without attention."""
    stack = Stack(shape, POLICIES["static_ep"], topology, plain_cost(shape), groups)
    stack.projections = [[] for _ in range(shape.layers)]
    none = [(_even_routing(shape, 0), _rows(0, shape.top_k)) for _ in range(shape.layers)]
    x_TD = _rows(0, shape.hidden)
    return lambda: stack.step(0, x_TD, none)


def _even_routing(shape: Shape, tokens: int) -> Tensor:
    place_E = np.arange(shape.experts)
    each, extra = divmod(tokens * shape.top_k, shape.experts)
    return torch.from_numpy(draw_routing(each + (place_E < extra), shape.top_k, np.random.default_rng(0)))


def _rows(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).requires_grad_()
