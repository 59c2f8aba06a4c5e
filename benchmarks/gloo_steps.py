"""Run whole steps of a stack of MixLoRA layers on gloo ranks, under given expert loads, with the engine's collectives and counted bytes.

A layer has four trained hidden x hidden projections, in place of attention, which overlap with its gather, and then its experts. The
projections compute the full number of tokens on every rank; experts compute only the routed ones, as a trainer's layers do with padding.

Shapes: T tokens of a rank, D hidden, E experts, K assignments of a token, W ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.engine.engine import Engine
from hecate.engine.step_plans import EngineConfig
from hecate.experts.family import Site
from hecate.experts.mixlora import MixLoraExperts
from hecate.experts.pairs.sources.plain import PlainPairs
from hecate.kernels.common.ffn import PROJECTIONS, FfnBase, FfnShape
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.planners import Planner
from hecate.parallel.values.expert_kinds import FfnSizes, LoraShape
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import ExpertGroups


@dataclass(frozen=True)
class Shape:
    layers: int = 2
    hidden: int = 512
    ffn: int = 1024
    rank: int = 16
    experts: int = 8
    top_k: int = 2
    tokens: int = 512
    """the tokens of each rank"""

    @property
    def attention_flops(self) -> float:
        """The forward FLOPs of the projections of one layer on one rank."""
        return 8.0 * self.hidden**2 * self.tokens


def draw_routing(load_E: np.ndarray, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """Draw K different experts for each token, int64 [T, K], such that expert e is drawn exactly `load_E[e]` times.

    Args:
        load_E: int64 [experts], none above T, with the sum K · T.
    """
    tokens = int(load_E.sum()) // top_k
    assert load_E.sum() == tokens * top_k, load_E
    assert load_E.max(initial=0) <= tokens, load_E
    # Dealing the assignments round gives a token the same expert twice only if the expert has more assignments than there are tokens.
    expert_TK = np.repeat(np.arange(len(load_E)), load_E).reshape(top_k, tokens).T.copy()
    for _ in range(64):  # then pairs of tokens swap an expert where neither would get one twice: a symmetric random walk
        first, second = rng.permutation(tokens)[: tokens - tokens % 2].reshape(2, -1)
        mine, theirs = rng.integers(top_k, size=(2, len(first)))
        given, taken = expert_TK[first, mine], expert_TK[second, theirs]
        swap = ~((expert_TK[first] == taken[:, None]).any(1) | (expert_TK[second] == given[:, None]).any(1))
        expert_TK[first[swap], mine[swap]], expert_TK[second[swap], theirs[swap]] = taken[swap], given[swap]
    return expert_TK


class MeasuredExperts(MixLoraExperts):
    """MixLoRA experts with a measured cost, so that planners use the same numbers as the prediction."""

    measured: LayerCost

    def cost(self, top_k: int, non_moe_flops: float) -> LayerCost:
        return self.measured


def make_experts(shape: Shape, layer: int) -> MeasuredExperts:
    random = torch.Generator().manual_seed(layer)
    base = FfnBase(
        torch.randn(shape.ffn, shape.hidden, generator=random) / shape.hidden**0.5,
        torch.randn(shape.ffn, shape.hidden, generator=random) / shape.hidden**0.5,
        torch.randn(shape.hidden, shape.ffn, generator=random) / shape.ffn**0.5,
        "silu",
    )
    pairs = PlainPairs(LoraShape(shape.rank, 2.0, 0.0), PROJECTIONS, FfnSizes(shape.hidden, shape.ffn))
    ffn, cpu = FfnShape(shape.hidden, shape.ffn, "silu"), torch.device("cpu")
    return MeasuredExperts(Site(Unit(layer), shape.experts, ffn, 0, torch.float32, torch.float32, cpu), base, pairs)


class Stack:
    """The layers of one policy on this rank, with their optimizer."""

    def __init__(self, shape: Shape, planner: Planner, topology: Topology, cost: LayerCost, groups: ExpertGroups) -> None:
        families = {Unit(layer): make_experts(shape, layer) for layer in range(shape.layers)}
        for family in families.values():
            family.measured = cost
        self.shape = shape
        self.engine = Engine(dict(families), EngineConfig(planner, topology, top_k=shape.top_k), groups)
        self.projections = [attention_weights(shape) for _ in range(shape.layers)]
        self.adamw = torch.optim.AdamW(list(self.engine.shards.named_parameters().values()), lr=1e-4)

    def forget_loads(self) -> None:
        """Clear the history, as at the start of a training run."""
        self.engine.shards.history.restore([])

    def step(self, number: int, x_TD: Tensor, routing: list[tuple[Tensor, Tensor]]) -> None:
        """Run a step: plan, forward and backward pass, finish, and the owners' AdamW.

        Args:
            x_TD: [tokens of a full rank, hidden], of which the first ones are routed.
            routing: for each layer its (experts, weights), both [T, K].
        """
        engine = self.engine
        step = engine.begin_step(number)
        micro = step.begin_micro_step()
        hidden = x_TD
        for layer, (expert_TK, weight_TK) in enumerate(routing):
            micro.prefetch(Unit(layer))
            hidden = attention(hidden, self.projections[layer])
            real = len(expert_TK)
            y_TD = micro.experts(Unit(layer), hidden[:real], expert_TK, weight_TK, torch.arange(real))
            hidden = hidden + (y_TD if real == len(hidden) else torch.cat([y_TD, hidden[real:]]))
        micro.backward(hidden, torch.ones_like(hidden))
        step.finish()
        self.adamw.step()
        for weights in self.projections:
            for weight in weights:
                weight.grad = None


def attention_weights(shape: Shape) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    size = (shape.hidden, shape.hidden)
    return [(torch.randn(size, generator=random) / shape.hidden**0.5).requires_grad_() for _ in range(4)]


def attention(x_TD: Tensor, weights: list[Tensor]) -> Tensor:
    """Compute as much as the projections of an attention layer do."""
    for weight in weights:
        x_TD = x_TD @ weight
    return x_TD


class Wire:
    """A counter of the bytes that this rank passes to `all_to_all_single` and to `isend` in batches, for each other rank of the world."""

    def __init__(self, world: int, rank: int) -> None:
        self.bytes_to = [0] * world
        self._rank = rank

    @contextmanager
    def counting(self) -> Iterator[None]:
        original, original_batch = dist.all_to_all_single, dist.batch_isend_irecv

        def counted(output: Tensor, input: Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None, **rest: Any) -> Any:
            world = len(self.bytes_to)
            rows = input_split_sizes or [len(input) // world] * world
            row_bytes = input[:1].numel() * input.element_size() if len(input) else 0
            for peer, count in enumerate(rows):
                self.bytes_to[peer] += count * row_bytes if peer != self._rank else 0
            return original(output, input, output_split_sizes, input_split_sizes, **rest)

        def counted_batch(p2p_op_list: list[dist.P2POp]) -> list[dist.Work]:
            for operation in p2p_op_list:
                if operation.op is dist.isend:
                    self.bytes_to[operation.peer] += operation.tensor.numel() * operation.tensor.element_size()
            return original_batch(p2p_op_list)

        dist.all_to_all_single = counted
        dist.batch_isend_irecv = counted_batch
        try:
            yield
        finally:
            dist.all_to_all_single, dist.batch_isend_irecv = original, original_batch


@dataclass(frozen=True)
class Taken:
    """The time that an action took."""

    seconds: float
    """the seconds until the slowest rank was done"""
    busy: float
    """the CPU seconds of all threads of this rank, which do not depend on other programs on the machine"""


class Clock:
    """A clock that times actions relative to a yardstick, which is work of fixed size, timed before and after each action.

    On a shared machine, other programs slow down the yardstick and the action alike, so their ratio stays the same. It is converted to
    seconds by the yardstick's time when the clock was made. On a quiet machine this changes nothing.
    """

    def __init__(self, yardstick: Callable[[], object]) -> None:
        self._yardstick = yardstick
        yardstick()
        self.unit = median(_time(yardstick).seconds for _ in range(5))
        self._before = self.unit

    def time(self, action: Callable[[], object]) -> Taken:
        """Time an action. Every rank must call it, and all ranks start together."""
        taken = _time(action)
        after = _time(self._yardstick).seconds
        before, self._before = self._before, after
        return Taken(taken.seconds * self.unit / ((before + after) / 2), taken.busy)


def _time(action: Callable[[], object]) -> Taken:
    dist.barrier()
    start, start_busy = time.perf_counter(), time.process_time()
    action()
    busy = time.process_time() - start_busy
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return Taken(seconds.item(), busy)
