"""One optimizer step over all ranks.

    begin           plan
    per micro-step  forward; aux loss over all ranks; backward (the last one, or every one, also reduces the experts' gradients)
    finish          experts' gradients onto their owners; the replicated gradients; one global norm; skip or step

The loss is the sum over label tokens divided by their number in the whole step, all ranks and micro-steps together, plus the mean over
the micro-steps of the aux loss. Each rank computes its share; gradients are summed, never averaged.

Extensions say what a run does beside that (`hecate.train.extensions.extension`), and `StepRules.sums` says in which order sums are made
(`hecate.train.steps.passes`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from hecate.data.batches import Batch
from hecate.model.causal_head import CausalHead
from hecate.model.moe_model import MoeModel
from hecate.optim.optimizer import ExpertOptimizer
from hecate.ranks.peak_memory import peak_bytes
from hecate.report.events import StepResult
from hecate.train.extensions.extension import LossMean, StepExtension
from hecate.train.steps.passes import PassesByRank, StepSums, StepWork
from hecate.train.steps.step_totals import Totals, exchange_totals


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """What one step trains on."""

    number: int
    """The number of the step, from 0."""
    micro_batches: Sequence[Batch]
    """This rank's batches, one for each pass of each micro-step, equally many on every rank; rows may be all padding."""
    num_labels: int
    """The number of label tokens of the whole step, over all ranks and micro-batches."""
    num_samples: int | None = None
    """The number of samples of the whole step; None: no loss of the model is a mean over samples."""


@dataclass(frozen=True, kw_only=True)
class StepRules:
    """How a step is made of its batches."""

    aux_coef: float
    """The weight of the load-balancing loss in the training loss."""
    max_grad_norm: float | None
    """The largest global norm of all gradients, to which they are clipped; None: no clipping."""
    norm_limit: float = math.inf
    """The gradient norm above which the step is skipped."""
    sums: StepSums = field(default_factory=PassesByRank)
    """The order in which a step's passes run and their losses and gradients are added."""


def train_step(
    moe: MoeModel,
    head: CausalHead,
    optimizer: ExpertOptimizer,
    batches: StepBatches,
    rules: StepRules,
    extensions: Sequence[StepExtension] = (),
) -> StepResult:
    """Forward, backward, reduce, clip, step. Every rank must call it, with extensions of the same kinds in the same order."""
    shards, device = moe.engine.shards, batches.micro_batches[0].input_ids.device
    sent, sent_far = shards.bytes_sent, shards.bytes_between_nodes
    micro_steps = rules.sums.micro_steps(len(batches.micro_batches))
    mean = LossMean(max(batches.num_labels, 1), max(batches.num_labels, 1))
    for extension in extensions:
        mean = extension.mean(mean, device)
    assert bool(moe.separate_experts) == (mean.weight_of_source is not None), "separate experts have means of their own"
    work = StepWork(
        moe,
        head,
        optimizer,
        extensions,
        micro_steps,
        mean,
        rules.aux_coef,
        None if batches.num_samples is None else batches.num_samples / micro_steps,
        torch.zeros(2, rules.sums.positions, dtype=torch.float64, device=device),
    )
    work.at("step", batches.number)
    loads = rules.sums.run(work, batches.number, batches.micro_batches)
    work.at("gradients", optimizer)
    names = rules.sums.names(shards)
    squares = optimizer.squares(counts_owned=shards.in_first_group, names=names)
    work.at("norm")
    own = (shards.bytes_sent - sent, shards.bytes_between_nodes - sent_far, peak_bytes(device))
    figures = [own, *(extension.figures() for extension in extensions)]
    sums = [extension.sums() for extension in extensions]
    added_up = [of_extension for of_extension in sums if of_extension is not None]
    by_expert = partial(optimizer.squares_by_expert, names=names)
    totals = exchange_totals(work.losses, squares, shards.groups.world, figures, added_up, by_expert)
    work.at("optimizer")
    grad_norm = _usable_norm(totals, separate=bool(moe.separate_experts))
    taken = optimizer.step(grad_norm, rules.max_grad_norm, loads, totals.grad_norms, rules.norm_limit)
    work.at("stepped")
    result = StepResult(
        totals.loss,
        totals.aux_loss,
        grad_norm,
        not taken,
        loads,
        sum(int(sent) for sent, *_ in totals.figures[0]),
        bytes_between_nodes=sum(int(far) for _, far, _ in totals.figures[0]),
        peak_bytes=tuple(int(peak) for *_, peak in totals.figures[0]),
        norm_limit=rules.norm_limit,
        unlike=totals.unlike,
    )
    added = iter(totals.more)
    for extension, of_ranks, own_sums in zip(extensions, totals.figures[1:], sums, strict=True):
        result = extension.completed(result, of_ranks, () if own_sums is None else next(added))
    return result


def _usable_norm(totals: Totals, *, separate: bool) -> float:
    """The gradient norm; NaN, by which no parameter changes, where the step must not be taken.

    Args:
        separate: each expert has a loss of its own, which is no reason to leave out the others.
    """
    if not separate and not (math.isfinite(totals.loss) and math.isfinite(totals.aux_loss)):
        return math.nan  # router logits that are not finite are in the aux loss even where no gradient depends on them
    if totals.unlike:
        return math.nan  # ranks that took the step would no longer have the same parameters
    return totals.grad_norm
