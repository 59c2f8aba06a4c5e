"""The passes of a step whose result must not depend on the ranks (`deterministic`).

A micro-batch is then one group of sequences, which has a position in its micro-step. Gradients, losses and norms of positions, parameters
and experts are kept apart until they are added in an order that depends on no rank (`hecate.parallel.values.summation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate.config import Config
from hecate.data.batches import Batch, sequence_ranges
from hecate.engine.engine import Engine
from hecate.engine.ordered_step import begin_ordered_step
from hecate.engine.shards import ExpertShards
from hecate.errors import UserError
from hecate.parallel.comm.ordered_sums import sum_in_order
from hecate.parallel.values.summation import PositionSums, SumOrder
from hecate.parallel.values.units import Unit
from hecate.train.steps.passes import PassesByRank, StepSums, StepWork


@dataclass(frozen=True)
class PassesInOrder:
    """A pass for each group of sequences, whose losses and gradients are added in one order: a `StepSums`."""

    order: SumOrder

    @property
    def positions(self) -> int:
        return self.order.size

    def micro_steps(self, passes: int) -> int:
        return passes // self.order.passes

    def names(self, shards: ExpertShards) -> Sequence[str]:
        return shards.expert_names

    def run(self, work: StepWork, step: int, batches: Sequence[Batch]) -> dict[Unit, np.ndarray]:
        engine, optimizer, order = work.moe.engine, work.optimizer, self.order
        assert isinstance(engine, Engine), "only hecate's own engine sums in an order"
        world = engine.shards.groups.world
        replicated: PositionSums[Tensor] = PositionSums(order.size)
        this_step = begin_ordered_step(engine, step, work.micro_steps, order)
        positions = order.ranges[dist.get_rank(world)]
        work.at("planned")
        for first in range(0, len(batches), order.passes):
            of_micro_step = batches[first : first + order.passes]
            passes = this_step.begin_passes([work.tokens(batch) for batch in of_micro_step], positions)
            sums = []
            for micro, batch in zip(passes, of_micro_step, strict=True):
                with engine.current.set_to(micro):
                    sums.append(work.forward(batch))
            # The share of tokens in the aux loss is that of the whole micro-step. All ranks exchange it before the first backward pass, so
            # that none waits for another between two of them.
            counts = {unit: torch.stack([micro.stats[unit].count_KE for micro in passes]).sum(0) for unit in passes[0].stats}
            shares = []
            for micro, loss_sum in zip(passes, sums, strict=True):
                stats = {unit: replace(of_unit, count_KE=counts[unit]) for unit, of_unit in micro.stats.items()}
                shares.append(work.share(loss_sum, stats, micro.position or 0))
            last = first + order.passes == len(batches)
            for micro, batch, share in zip(passes, of_micro_step, shares, strict=True):
                work.backward(micro, batch, share)
                replicated.add(micro.position, optimizer.take_replicated(), last=last)
        loads = this_step.finish()
        work.at("reduce", loads)
        optimizer.give_replicated(sum_in_order(replicated.sums, order, optimizer.take_replicated(), world))
        work.at("reduced")
        return loads


def sequences_of_a_group(config: Config) -> int:
    """How many neighbouring sequences of a micro-step always stay on one rank."""
    return config.deterministic_group


def step_sums(config: Config, shares: Sequence[int]) -> StepSums:
    """In which order the steps of a run are summed. `shares`: sequences of each micro-step, by rank."""
    if not config.deterministic:
        return PassesByRank()
    groups = [share // config.deterministic_group for share in shares]
    return PassesInOrder(SumOrder(tuple(sequence_ranges(sum(groups), groups))))


def sequences_of_a_pass(config: Config) -> int | None:
    """How many sequences are computed together; None: all of a micro-step that a rank has."""
    return config.deterministic_group if config.deterministic else None


def prepare_for_order(config: Config, device: torch.device) -> None:
    """Make this process compute alike whatever machine it runs on, if the configuration asks for it.

    Raises:
        UserError: the device is none on which equal inputs of equal shapes always give equal bits.
    """
    if not config.deterministic:
        return
    if device.type != "cpu":
        raise UserError(
            "deterministic: holds on CPUs only; on a GPU the backward pass of attention adds up in an order that differs from run to run\n"
            "  leave deterministic out, or train on CPUs: set CUDA_VISIBLE_DEVICES to nothing"
        )
    torch.set_num_threads(1)  # how sums are cut depends on the number of threads
