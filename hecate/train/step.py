"""One optimizer step over all ranks.

    begin           plan
    per micro-step  forward; aux loss over all ranks; backward (the last one, or every one, also reduces the experts' gradients)
    finish          experts' gradients onto their owners, and on to their backups; the replicated gradients; one global norm; skip or step

The loss is the sum over label tokens divided by their number in the whole step, all ranks and micro-steps together, plus the mean over
the micro-steps of the aux loss. Each rank computes its share; gradients are summed, never averaged.

Where each expert is an adapter of its own (`Router.separates`), it is trained by the mean over its own label tokens, so that the others'
numbers do not matter to it; the loss that is reported is the mean over the experts that have label tokens. With `StepRules.privacy` it is
trained by the mean over its samples of their own means (`hecate.train.privacy`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hecate.data.batches import Batch
from hecate.elastic.backups import send_gradients
from hecate.experts.forward_pass import PassTokens
from hecate.experts.pass_routing import PassRouting
from hecate.experts.pass_samples import PassSamples
from hecate.experts.pass_users import users_of_packed
from hecate.model.causal_head import CausalHead
from hecate.model.moe_model import MoeModel
from hecate.optim.optimizer import ExpertOptimizer
from hecate.parallel.comm.device_tables import copy_to
from hecate.ranks.peak_memory import peak_bytes
from hecate.report.events import StepResult
from hecate.train.privacy import Privacy, SampleShares, add_noise
from hecate.train.step_clock import StepClock
from hecate.train.step_totals import exchange_totals


@dataclass(frozen=True, kw_only=True)
class StepRules:
    """What is the same in every step of a run."""

    aux_coef: float
    """weight of the load-balancing loss in the training loss"""
    max_grad_norm: float | None
    """to which the global norm of all gradients is clipped; None: no clipping"""
    redundancy: int = 0
    """1: the optimizers step backups, too (`hecate.elastic.backups`)"""
    privacy: Privacy | None = None
    """None: samples are not hidden; else each micro-batch is one sample at most"""
    replay: Literal["force", "check"] | None = None
    """what layers do with the routing that the batches' samples bring; None: nothing"""


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
    clock: StepClock | None = None,
) -> StepResult:
    """Forward, backward, reduce, clip, step. Every rank must call it with as many micro-batches, whose rows may be all padding.

    Args:
        num_labels: label tokens of the whole step, all ranks and micro-batches together.
        num_samples: samples of the whole step, likewise; None: no loss of the model is a mean over samples.
        labels_of_source: label tokens of the whole step by source; needed where each expert has a mean loss of its own.
        samples_of_source: samples of the whole step by source; needed with `StepRules.privacy`.
        features_UF: the vectors of all users, [users, width], on the batches' device; None: no router decides by users.
        step: its number, from 0.
        norm_limit: the step is skipped if its gradient norm is larger.
        requests: returns this rank's requests to all ranks (`StepResult.asked`), equally many on every rank. It is called once.
        clock: times the parts plan, forward, backward, gradients and waiting of this step; None: nobody asks.
    """
    group, engine, device = moe.engine.shards.groups.world, moe.engine, micro_batches[0].input_ids.device
    sent, sent_far = engine.shards.bytes_sent, engine.shards.bytes_between_nodes
    clock = clock or StepClock(device)
    clock.begin()
    this_step = engine.begin_step(step, len(micro_batches))
    clock.ended("plan")
    checks = rules.replay == "check"
    losses = torch.zeros(2 + checks, dtype=torch.float64, device=device)  # the last one counts assignments that differ
    mean = _means_of_sources(moe, labels_of_source, losses.device) or LossMean(max(num_labels, 1), max(num_labels, 1))
    each = None if num_samples is None else num_samples / len(micro_batches)
    shares = None if rules.privacy is None else SampleShares.of(rules.privacy, samples_of_source, device)
    for batch in micro_batches:
        tokens = pass_tokens(head, batch, each, features_UF)
        if rules.replay is not None:
            tokens = with_routing(tokens, moe, batch, forced=rules.replay == "force")
        micro = this_step.begin_micro_step(tokens)
        loss_sum = forward_loss(head, batch, mean.weight_of_source if shares is None else shares.weight_of_source(batch))
        share = loss_sum / mean.trained
        aux = moe.balance_loss(micro.stats, group)
        if aux is not None:
            losses[1] += aux.detach() / len(micro_batches)
            share = share + aux * (rules.aux_coef / len(micro_batches))
        losses[0] += loss_sum.detach() / mean.reported
        if checks:
            losses[2] += torch.stack([stats.differing for stats in micro.stats.values() if stats.differing is not None]).sum()
        clock.ended("forward")
        micro.backward(share, limit=None if shares is None else shares.limit(batch))
        clock.ended("backward")
    loads = this_step.finish()
    if rules.privacy is not None:
        add_noise(engine.shards, rules.privacy, samples_of_source, step)
    on_its_way = send_gradients(engine, optimizer, loads) if rules.redundancy else None
    optimizer.reduce_replicated(group)
    if on_its_way:
        on_its_way.wait()
    squares = optimizer.squares(counts_owned=engine.shards.in_first_group)
    clock.ended("gradients")
    figures = (engine.shards.bytes_between_nodes - sent_far, peak_bytes(device))
    totals = exchange_totals(losses, squares, engine.shards.bytes_sent - sent, requests(), group, figures)
    clock.host_waited("waiting")
    grad_norm = totals.grad_norm
    if not moe.separate_experts and not (math.isfinite(totals.loss) and math.isfinite(totals.aux_loss)):
        grad_norm = math.nan  # router logits that are not finite are in the aux loss even where no gradient depends on them
    taken = optimizer.step(grad_norm, rules.max_grad_norm, loads, totals.grad_norms, norm_limit)
    return StepResult(
        totals.loss,
        totals.aux_loss,
        grad_norm,
        not taken,
        loads,
        totals.bytes_sent,
        totals.asked,
        bytes_between_nodes=sum(int(far) for far, _ in totals.figures),
        peak_bytes=tuple(int(peak) for _, peak in totals.figures),
        differing=int(totals.more[0]) if checks else None,
        norm_limit=norm_limit,
    )


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
