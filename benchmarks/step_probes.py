"""Measure the single parts of a step outside any run, on all ranks at once. These times are all that a prediction may use.

The cost model counts work in FLOPs at the topology's rate, so work that runs below that rate is passed to it as more FLOPs.
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
from hecate.parallel.cluster.topology import Link, Topology
from hecate.parallel.comm.dispatch import combine, dispatch
from hecate.parallel.cost.cost_loops import DISPATCH_COLLECTIVES
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.planners import POLICIES
from hecate.parallel.transfer.transfer_plan import plan_tokens
from hecate.parallel.values.placement import contiguous_owners, everything_everywhere
from hecate.ranks.groups import ExpertGroups

Probe = Callable[[], object]
_MEGABYTE = 1 << 20


class Probes:
    """The parts of a step on this rank, each of which can be run repeatedly."""

    def __init__(self, shape: Shape, topology: Topology, groups: ExpertGroups, rank: int) -> None:
        self.actions: dict[str, Probe] = {
            "attention": _attention(shape),
            "experts": _experts(shape, shape.tokens, shape.top_k),
            "experts_half_assignments": _experts(shape, shape.tokens, shape.top_k // 2),
            "experts_quarter": _experts(shape, shape.tokens // 4, shape.top_k),
            "dispatch_nothing": _dispatch(shape, 0, groups, rank),
            "dispatch": _dispatch(shape, shape.tokens, groups, rank),
            "megabyte": _megabyte(groups),
            "empty_step": _empty_step(shape, topology, groups),
        }
        for action in self.actions.values():
            action()

    def run(self, clock: Clock) -> dict[str, Taken]:
        """Time every part once. Every rank must call it."""
        return {name: clock.time(action) for name, action in self.actions.items()}


def yardstick(shape: Shape) -> Probe:
    """Return the yardstick of `Clock`: attention and experts for a quarter of the tokens, without sending anything."""
    attend, compute = _attention(replace(shape, tokens=shape.tokens // 4)), _experts(shape, shape.tokens // 4, shape.top_k)

    def run() -> None:
        attend()
        compute()

    return run


def plain_cost(shape: Shape) -> LayerCost:
    """Return the cost that the engine's family gives, before anything is measured."""
    return MixLoraExperts.cost(make_experts(shape, 0), shape.top_k, shape.attention_flops)


@dataclass(frozen=True)
class Parts:
    """The seconds of single parts of a step, forward and backward."""

    attention: float
    """the seconds of a layer's attention"""
    row: float
    """the seconds of a distinct token that a rank computes"""
    assignment: float
    """the seconds of an assignment"""
    slot: float
    """the seconds of an expert with any tokens on a rank, whose tiles are launched separately"""
    exchange: float
    """the seconds of one of dispatch's collectives with nothing to send"""
    passed_row: float
    """the seconds of copying a token through dispatch and back, also if it stays on its rank"""
    byte: float
    """the seconds of a byte that is sent while another is received"""
    rest: float
    """the seconds of a step without tokens: planning, loads and the like"""


def parts(seconds: Mapping[str, float], shape: Shape) -> Parts:
    """Return the parts from the seconds of the probes."""
    tokens, k = shape.tokens, shape.top_k
    assignment = max(0.0, seconds["experts"] - seconds["experts_half_assignments"]) / (tokens * (k - k // 2))
    row = (seconds["experts"] - seconds["experts_quarter"]) / (tokens - tokens // 4) - k * assignment
    return Parts(
        attention=seconds["attention"],
        row=row,
        assignment=assignment,
        slot=max(0.0, seconds["experts"] - tokens * (row + k * assignment)) / shape.experts,
        exchange=seconds["dispatch_nothing"] / DISPATCH_COLLECTIVES,
        passed_row=max(0.0, seconds["dispatch"] - seconds["dispatch_nothing"]) / tokens,
        byte=max(0.0, seconds["megabyte"] - seconds["dispatch_nothing"] / DISPATCH_COLLECTIVES) / _MEGABYTE,
        rest=max(0.0, seconds["empty_step"] - shape.layers * seconds["dispatch_nothing"]),
    )


def measured_cost(found: Parts, shape: Shape, topology: Topology) -> LayerCost:
    """Return the layer's cost, with FLOPs that take the seconds of the parts at the topology's rate."""
    rate, cost = min(topology.flops), plain_cost(shape)
    return replace(
        cost,
        non_moe_flops=found.attention * rate / (1 + cost.non_moe_backward),
        row_flops=found.row * rate / (1 + cost.row_backward),
        assignment_flops=found.assignment * rate / (1 + cost.assignment_backward),
    )


def measured_topology(profiled: Sequence[Topology], found: Parts) -> Topology:
    """Return the first topology with the median bandwidths of all, and the latency of dispatch's collectives."""
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


def _experts(shape: Shape, tokens: int, assignments: int) -> Probe:
    """Return the probe of all experts on one rank with equal loads, and `assignments` assignments of each token."""
    family = make_experts(shape, 0)
    chunks_SC = torch.stack([family.init_chunk(expert) for expert in range(shape.experts)]).requires_grad_()
    x_TD, expert_TK, weight_TK = _rows(tokens, shape.hidden), _even_routing(shape, tokens), _rows(tokens, shape.top_k)
    slot_TK = torch.where(torch.arange(shape.top_k) < assignments, expert_TK, -1)

    def run() -> None:
        routed = RoutedTokens(x_TD, slot_TK, weight_TK, torch.arange(tokens), torch.arange(shape.experts))
        y_TD = family.compute(routed, ExpertReplicas(chunks_SC), step=0)
        y_TD.backward(torch.ones_like(y_TD))
        chunks_SC.grad = None

    return run


def _dispatch(shape: Shape, tokens: int, groups: ExpertGroups, rank: int) -> Probe:
    """Return the probe of dispatch and combine, forward and backward, of tokens that stay on their rank."""
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
    """Return the probe that sends a megabyte to the other ranks and receives as much, in equal parts."""
    world, rank = groups.tokens.size(), groups.tokens.rank()
    splits = [0 if peer == rank else _MEGABYTE // (world - 1) for peer in range(world)]
    send = torch.zeros(sum(splits), dtype=torch.uint8)
    receive = torch.empty_like(send)
    return lambda: dist.all_to_all_single(receive, send, splits, splits, group=groups.tokens)


def _empty_step(shape: Shape, topology: Topology, groups: ExpertGroups) -> Probe:
    """Return the probe of a step of expert parallelism without tokens and without attention."""
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
