"""One optimizer step over all ranks.

    begin           plan
    per micro-step  forward; aux loss over all ranks; backward (the last one, or every one, also reduces the experts' gradients)
    finish          experts' gradients onto their owners, and on to their backups; the replicated gradients; one global norm; skip or step

The loss is the sum over label tokens divided by their number in the whole step, all ranks and micro-steps together, plus the mean over
the micro-steps of the aux loss. Each rank computes its share; gradients are summed, never averaged.

Where each expert is an adapter of its own (`Router.separates`), it is trained by the mean over its own label tokens, so that the others'
numbers do not matter to it; the loss that is reported is the mean over the experts that have label tokens. With `StepRules.privacy` it is
trained by the mean over its samples of their own means (`hecate.train.steps.privacy`).

With `StepRules.order` a micro-batch is one group of sequences, which has a position in its micro-step. Gradients, losses and norms of
positions, parameters and experts are kept apart until they are added in an order that depends on no rank
(`hecate.parallel.values.summation`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hecate import faults
from hecate.data.batches import Batch
from hecate.elastic.backups import send_gradients
from hecate.engine.engine import Engine
from hecate.engine.protocol import TrainingPass
from hecate.experts.forward_pass import PassTokens
from hecate.experts.pass_routing import PassRouting
from hecate.experts.pass_samples import PassSamples
from hecate.experts.pass_users import users_of_packed
from hecate.experts.routers.router import RouterStats
from hecate.model.causal_head import CausalHead
from hecate.model.moe_model import MoeModel
from hecate.optim.optimizer import ExpertOptimizer
from hecate.parallel.comm.device_tables import copy_to
from hecate.parallel.comm.ordered_sums import sum_in_order
from hecate.parallel.values.summation import PositionSums, SumOrder
from hecate.parallel.values.units import Unit
from hecate.ranks.peak_memory import peak_bytes
from hecate.report.events import DenseWork, StepResult
from hecate.train.steps.privacy import Privacy, SampleShares, add_noise
from hecate.train.steps.step_clock import StepClock
from hecate.train.steps.step_totals import exchange_totals


@dataclass(frozen=True, kw_only=True)
class StepRules:
    """What is the same in every step of a run."""

    aux_coef: float
    """weight of the load-balancing loss in the training loss"""
    max_grad_norm: float | None
    """to which the global norm of all gradients is clipped; None: no clipping"""
    redundancy: int = 0
    """how many backups of each expert the optimizers step, too (`hecate.elastic.backups`)"""
    privacy: Privacy | None = None
    """None: samples are not hidden; else each micro-batch is one sample at most"""
    replay: Literal["force", "check"] | None = None
    """what layers do with the routing that the batches' samples bring; None: nothing"""
    order: SumOrder | None = None
    """in which sums are made that must not depend on the ranks; None: by rank"""


def pass_tokens(head: CausalHead, batch: Batch, samples: float | None = None, features_UF: Tensor | None = None) -> PassTokens:
    """The tokens that the layers of this rank see in a forward pass of the batch. The host does not wait for the batch's device.

    Args:
        samples: see `PassSamples.expected`; None: nothing is to be known of the samples.
        features_UF: the vectors of all users, on the batch's device; None: nothing depends on users.
    """
    own = head.own_positions(batch.segment_ids.shape[1])
    is_token = batch.layout.is_token[:, own].flatten()
    valid = None if bool(is_token.all()) else copy_to(is_token.nonzero().squeeze(1), batch.token_ids.device)
    of_samples = None if samples is None else PassSamples(batch.segment_ids[:, own], batch.layout.most_samples, samples)
    of_users = None
    if features_UF is not None:
        assert batch.user is not None or not bool(is_token.any()), "the batch does not say its samples' users"
        segment_ids, token_ids = batch.segment_ids[:, own], batch.token_ids[:, own]
        user = torch.full_like(segment_ids, -1) if batch.user is None else batch.user[:, own]
        of_users = users_of_packed(features_UF, user, segment_ids, token_ids, batch.layout.most_samples)
    return PassTokens(valid, batch.token_ids[:, own].flatten(), of_samples, batch.task[:, own].flatten(), of_users)


def with_routing(tokens: PassTokens, moe: MoeModel, batch: Batch, *, forced: bool) -> PassTokens:
    """The tokens of a batch with the routing that its samples bring."""
    units = sorted(moe.layers)
    routed_NUK = batch.routed
    if routed_NUK is None:
        assert not bool(batch.layout.is_token.any()), "the batch does not bring its samples' routing"
        routed_NUK = batch.task.new_zeros((batch.task.numel(), len(units), moe.engine.shards.config.top_k), dtype=torch.int16)
    else:
        routed_NUK = routed_NUK.flatten(0, 1)
    return replace(tokens, routing=PassRouting.of_tokens(routed_NUK, tokens.valid, units, forced=forced))


def forward_loss(head: CausalHead, batch: Batch, weight_of_source: Tensor | None = None) -> Tensor:
    """Summed cross-entropy of this rank's label tokens in one micro-batch; of a tensor group's ranks each has a share of the sum.

    The model must be in a forward pass of the batch's tokens (`pass_tokens`). The host does not wait for the batch's device, unless the
    model makes it.

    Args:
        weight_of_source: [sources], of a token in the sum, by its source, on the batch's device; None: 1.
    """
    labelled = batch.layout.labelled
    # No name for all hidden states: nothing needs them beside the logits.
    hidden_ND = head.hidden(batch.input_ids, batch.layout.samples, batch.position_ids).flatten(0, 1)[labelled]
    weight_N = None if weight_of_source is None else weight_of_source[batch.task.flatten()[labelled]]
    return head.loss_sum(hidden_ND, batch.targets.flatten()[labelled], weight_N)


def train_step(
    moe: MoeModel,
    head: CausalHead,
    optimizer: ExpertOptimizer,
    micro_batches: Sequence[Batch],
    *,
    num_labels: int,
    num_samples: int | None = None,
    labels_of_source: Sequence[int] = (),
    samples_of_source: Sequence[int] = (),
    features_UF: Tensor | None = None,
    step: int,
    rules: StepRules,
    norm_limit: float = math.inf,
    requests: Callable[[], Sequence[bool]] = tuple,
    check_copies: Callable[[], None] | None = None,
    work_before: DenseWork | None = None,
    clock: StepClock | None = None,
) -> StepResult:
    """Forward, backward, reduce, clip, step. Every rank must call it with as many micro-batches, whose rows may be all padding.

    Args:
        micro_batches: one for each micro-step; with `StepRules.order` one for each pass of each micro-step.
        num_labels: label tokens of the whole step, all ranks and micro-batches together.
        num_samples: samples of the whole step, likewise; None: no loss of the model is a mean over samples.
        labels_of_source: label tokens of the whole step by source; needed where each expert has a mean loss of its own.
        samples_of_source: samples of the whole step by source; needed with `StepRules.privacy`.
        features_UF: the vectors of all users, [users, width], on the batches' device; None: no router decides by users.
        step: its number, from 0.
        norm_limit: the step is skipped if its gradient norm is larger.
        requests: returns this rank's requests to all ranks (`StepResult.asked`), equally many on every rank. It is called once.
        check_copies: called when all gradients are complete and nothing has changed; it may send messages, and end the step with an error.
        work_before: this rank's in the step before, which all ranks are to know; None: there was none.
        clock: times the parts plan, forward, backward, gradients and waiting of this step; None: nobody asks.
    """
    group, engine, device, order = moe.engine.shards.groups.world, moe.engine, micro_batches[0].input_ids.device, rules.order
    sent, sent_far = engine.shards.bytes_sent, engine.shards.bytes_between_nodes
    clock = clock or StepClock(device)
    clock.begin()
    faults.at("step", step)
    micro_steps = len(micro_batches) // (1 if order is None else order.passes)
    work = _StepWork(
        moe,
        head,
        rules,
        clock,
        micro_steps,
        _means_of_sources(moe, labels_of_source, device) or LossMean(max(num_labels, 1), max(num_labels, 1)),
        None if rules.privacy is None else SampleShares.of(rules.privacy, samples_of_source, device),
        None if num_samples is None else num_samples / micro_steps,
        features_UF,
        torch.zeros(2 + (rules.replay == "check"), 1 if order is None else order.size, dtype=torch.float64, device=device),
    )
    replicated: PositionSums[Tensor] | None = None
    if order is None:
        loads = _run(work, step, micro_batches)
    else:
        replicated = PositionSums(order.size)
        loads = _run_in_order(work, step, micro_batches, order, optimizer, replicated)
    if rules.privacy is not None:
        add_noise(engine.shards, rules.privacy, samples_of_source, step)
    faults.at("reduce")
    on_its_way = send_gradients(engine, optimizer, loads, rules.redundancy) if rules.redundancy else None
    if order is None or replicated is None:
        optimizer.reduce_replicated(group)
    else:
        optimizer.give_replicated(sum_in_order(replicated.sums, order, optimizer.take_replicated(), group))
    if on_its_way:
        on_its_way.wait()
    faults.at("gradients", optimizer)
    if check_copies:
        check_copies()
    names = () if order is None else engine.shards.expert_names
    squares = optimizer.squares(counts_owned=engine.shards.in_first_group, names=names)
    clock.ended("gradients")
    before = work_before or DenseWork()
    figures = (engine.shards.bytes_between_nodes - sent_far, peak_bytes(device), before.tokens, before.seconds)
    sent = engine.shards.bytes_sent - sent
    faults.at("norm")
    totals = exchange_totals(work.losses, squares, sent, requests(), group, figures, partial(optimizer.together, names=names))
    clock.host_waited("waiting")
    faults.at("optimizer")
    grad_norm = totals.grad_norm
    if not moe.separate_experts and not (math.isfinite(totals.loss) and math.isfinite(totals.aux_loss)):
        grad_norm = math.nan  # router logits that are not finite are in the aux loss even where no gradient depends on them
    if totals.unlike:
        grad_norm = math.nan  # ranks that took the step would no longer have the same parameters
    taken = optimizer.step(grad_norm, rules.max_grad_norm, loads, totals.grad_norms, norm_limit)
    faults.at("stepped")
    return StepResult(
        totals.loss,
        totals.aux_loss,
        grad_norm,
        not taken,
        loads,
        totals.bytes_sent,
        totals.asked,
        bytes_between_nodes=sum(int(far) for far, *_ in totals.figures),
        peak_bytes=tuple(int(peak) for _, peak, *_ in totals.figures),
        differing=int(totals.more[0]) if totals.more else None,
        norm_limit=norm_limit,
        unlike=totals.unlike,
        work_before=tuple(DenseWork(int(tokens), seconds) for *_, tokens, seconds in totals.figures),
    )


@dataclass(frozen=True)
class _StepWork:
    """What all micro-steps of a step are computed with, and the losses that they add up."""

    moe: MoeModel
    head: CausalHead
    rules: StepRules
    clock: StepClock
    micro_steps: int
    mean: LossMean
    shares: SampleShares | None
    samples: float | None
    """see `pass_tokens`"""
    features_UF: Tensor | None
    losses: Tensor
    """float64 [2 or 3, positions]: the loss, the aux loss and, if that is checked, the number of assignments that differ; without
    `StepRules.order` there is one position"""

    def tokens(self, batch: Batch) -> PassTokens:
        faults.at("forward")
        tokens = pass_tokens(self.head, batch, self.samples, self.features_UF)
        return tokens if self.rules.replay is None else with_routing(tokens, self.moe, batch, forced=self.rules.replay == "force")

    def forward(self, batch: Batch) -> Tensor:
        """See `forward_loss`."""
        loss_sum = forward_loss(
            self.head, batch, self.mean.weight_of_source if self.shares is None else self.shares.weight_of_source(batch)
        )
        faults.at("loss", loss_sum)
        return loss_sum

    def share(self, loss_sum: Tensor, stats: Mapping[Unit, RouterStats], position: int = 0) -> Tensor:
        """A pass's share of the loss that is trained for, aux loss included, and note it. Every rank must call it."""
        share, losses = loss_sum / self.mean.trained, self.losses[:, position]
        aux = self.moe.balance_loss(stats, self.moe.engine.shards.groups.world)
        if aux is not None:
            losses[1] += aux.detach() / self.micro_steps
            share = share + aux * (self.rules.aux_coef / self.micro_steps)
        losses[0] += loss_sum.detach() / self.mean.reported
        if self.rules.replay == "check":
            losses[2] += torch.stack([one.differing for one in stats.values() if one.differing is not None]).sum()
        self.clock.ended("forward")
        return share

    def backward(self, micro: TrainingPass, batch: Batch, share: Tensor) -> None:
        micro.backward(share, limit=None if self.shares is None else self.shares.limit(batch))
        self.clock.ended("backward")


def _run(work: _StepWork, step: int, micro_batches: Sequence[Batch]) -> dict[Unit, np.ndarray]:
    """All passes of a step; its loads."""
    this_step = work.moe.engine.begin_step(step, work.micro_steps)
    work.clock.ended("plan")
    for batch in micro_batches:
        micro = this_step.begin_micro_step(work.tokens(batch))
        work.backward(micro, batch, work.share(work.forward(batch), micro.stats))
    return this_step.finish()


def _run_in_order(
    work: _StepWork, step: int, groups: Sequence[Batch], order: SumOrder, optimizer: ExpertOptimizer, replicated: PositionSums[Tensor]
) -> dict[Unit, np.ndarray]:
    """As `_run`, with a pass for each group of sequences.

    Args:
        replicated: gets the gradients of the replicated parameters, which have none afterwards.
    """
    engine = work.moe.engine
    assert isinstance(engine, Engine), "only hecate's own engine sums in an order"
    this_step = engine.begin_step(step, work.micro_steps, order)
    positions = order.ranges[dist.get_rank(engine.shards.groups.world)]
    work.clock.ended("plan")
    for first in range(0, len(groups), order.passes):
        batches = groups[first : first + order.passes]
        passes = this_step.begin_passes([work.tokens(batch) for batch in batches], positions)
        sums = []
        for one, batch in zip(passes, batches, strict=True):
            with engine.current.set_to(one):
                sums.append(work.forward(batch))
        # The share of tokens in the aux loss is that of the whole micro-step. All ranks exchange it before the first backward pass, so that
        # none waits for another between two of them.
        counts = {unit: torch.stack([one.stats[unit].count_KE for one in passes]).sum(0) for unit in passes[0].stats}
        shares = []
        for one, loss_sum in zip(passes, sums, strict=True):
            stats = {unit: replace(of_unit, count_KE=counts[unit]) for unit, of_unit in one.stats.items()}
            shares.append(work.share(loss_sum, stats, one.position or 0))
        last = first + order.passes == len(groups)
        for one, batch, share in zip(passes, batches, shares, strict=True):
            work.backward(one, batch, share)
            replicated.add(one.position, optimizer.take_replicated(), last=last)
    return this_step.finish()


@dataclass(frozen=True)
class LossMean:
    """How sums over label tokens become the loss of a step."""

    trained: int
    """what they are divided by for the gradients"""
    reported: int
    """what they are divided by for the report"""
    weight_of_source: Tensor | None = None
    """float64 [sources], of a token in the sums; None: 1"""


def _means_of_sources(moe: MoeModel, labels_of_source: Sequence[int], device: torch.device) -> LossMean | None:
    """Each source's own mean, where its expert is an adapter of its own; None where it is not. The host does not wait for the device."""
    if not moe.separate_experts:
        return None
    assert len(labels_of_source) == moe.separate_experts, (labels_of_source, moe.separate_experts)
    weights = torch.tensor([1 / max(labels, 1) for labels in labels_of_source], dtype=torch.float64)
    return LossMean(1, max(sum(labels > 0 for labels in labels_of_source), 1), copy_to(weights, device))
