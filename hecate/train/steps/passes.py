"""The forward and backward passes of a step, and the order in which what they leave is added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from hecate.data.batches import Batch
from hecate.engine.protocol import TrainingPass
from hecate.engine.shards import ExpertShards
from hecate.experts.forward_pass import PassTokens
from hecate.experts.pass_samples import PassSamples
from hecate.experts.routers.router import RouterStats
from hecate.model.causal_head import CausalHead
from hecate.model.moe_model import MoeModel
from hecate.optim.optimizer import ExpertOptimizer
from hecate.parallel.comm.device_tables import copy_to
from hecate.parallel.values.units import Unit
from hecate.train.extensions.extension import LossMean, Moment, StepExtension


def pass_tokens(head: CausalHead, batch: Batch, samples: float | None = None) -> PassTokens:
    """The tokens that the layers of this rank see in a forward pass of the batch. The host does not wait for the batch's device.

    Args:
        samples: see `PassSamples.expected`; None: nothing is to be known of the samples.
    """
    own = head.own_positions(batch.segment_ids.shape[1])
    is_token = batch.layout.is_token[:, own].flatten()
    valid = None if bool(is_token.all()) else copy_to(is_token.nonzero().squeeze(1), batch.token_ids.device)
    of_samples = None if samples is None else PassSamples(batch.segment_ids[:, own], batch.layout.most_samples, samples)
    return PassTokens(valid, batch.token_ids[:, own].flatten(), of_samples, batch.task[:, own].flatten())


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


@dataclass(frozen=True)
class StepWork:
    """What all passes of a step are computed with, and the losses that they add up."""

    moe: MoeModel
    head: CausalHead
    optimizer: ExpertOptimizer
    extensions: Sequence[StepExtension]
    micro_steps: int
    mean: LossMean
    aux_coef: float
    """The weight of the load-balancing loss in the training loss."""
    samples: float | None
    """The number of samples of a micro-step that `pass_tokens` takes."""
    losses: Tensor
    """The loss and the aux loss, float64 [2, positions]; a pass adds to the column of its position."""

    def at(self, moment: Moment, subject: Any = None) -> None:
        """The step has come to a moment of its extensions."""
        for extension in self.extensions:
            extension.at(moment, subject)

    def tokens(self, batch: Batch) -> PassTokens:
        """What the layers see of a batch, whose forward pass comes now."""
        self.at("forward")
        tokens = pass_tokens(self.head, batch, self.samples)
        for extension in self.extensions:
            tokens = extension.tokens(tokens, self.moe, self.head, batch)
        return tokens

    def forward(self, batch: Batch) -> Tensor:
        """See `forward_loss`."""
        weight = self.mean.weight_of_source
        for extension in self.extensions:
            weight = extension.weight_of_source(weight, batch)
        loss_sum = forward_loss(self.head, batch, weight)
        self.at("loss", loss_sum)
        return loss_sum

    def share(self, loss_sum: Tensor, stats: Mapping[Unit, RouterStats], position: int = 0) -> Tensor:
        """A pass's share of the loss that is trained for, aux loss included, and note it. Every rank must call it."""
        share, losses = loss_sum / self.mean.trained, self.losses[:, position]
        aux = self.moe.balance_loss(stats, self.moe.engine.shards.groups.world)
        if aux is not None:
            losses[1] += aux.detach() / self.micro_steps
            share = share + aux * (self.aux_coef / self.micro_steps)
        losses[0] += loss_sum.detach() / self.mean.reported
        for extension in self.extensions:
            extension.routed(stats)
        self.at("forwarded")
        return share

    def backward(self, micro: TrainingPass, batch: Batch, share: Tensor) -> None:
        """The backward pass of a batch, which ends its micro-step."""
        limits = [limit for extension in self.extensions if (limit := extension.gradient_limit(batch)) is not None]
        assert len(limits) < 2, "two extensions limit the gradient of a pass"
        micro.backward(share, limit=limits[0] if limits else None)
        self.at("backpropagated")


class StepSums(Protocol):
    """The passes of a step, and the order in which their losses and gradients are added."""

    @property
    def positions(self) -> int:
        """The number of columns in which losses are added up apart from each other."""

    def micro_steps(self, passes: int) -> int:
        """The number of micro-steps that a rank makes of so many passes."""

    def names(self, shards: ExpertShards) -> Sequence[str]:
        """Names of the experts whose gradients' squares are summed expert by expert, in this order; none: as they lie on their owners."""

    def run(self, work: StepWork, step: int, batches: Sequence[Batch]) -> dict[Unit, np.ndarray]:
        """All passes of a step, and the sums of all gradients over the ranks; the step's loads. Every rank must call it."""


class PassesByRank:
    """One pass a micro-step, whose losses and gradients are added as they come, by rank: a `StepSums`."""

    positions = 1

    def micro_steps(self, passes: int) -> int:
        return passes

    def names(self, shards: ExpertShards) -> Sequence[str]:
        return ()

    def run(self, work: StepWork, step: int, batches: Sequence[Batch]) -> dict[Unit, np.ndarray]:
        this_step = work.moe.engine.begin_step(step, work.micro_steps)
        work.at("planned")
        for batch in batches:
            micro = this_step.begin_micro_step(work.tokens(batch))
            work.backward(micro, batch, work.share(work.forward(batch), micro.stats))
        loads = this_step.finish()
        work.at("reduce", loads)
        work.optimizer.reduce_replicated(work.moe.engine.shards.groups.world)
        work.at("reduced")
        return loads
