"""What the trainer, evaluation and model surgery may expect of an engine, whoever computes the experts.

`hecate.engine.engine.Engine` materializes experts where their tokens are;
`hecate.apps.megatron.expert_parallel_engine.ExpertParallelEngine` has Megatron's own layers compute them. What layers see of an engine is a
`hecate.experts.forward_pass.ForwardPass`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
from torch import Tensor

from hecate.engine.shards import ExpertShards
from hecate.experts.forward_pass import CurrentPass, ForwardPass, PassTokens
from hecate.experts.routers.router import RouterStats
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import ExpertGroups


class TrainingPass(ForwardPass, Protocol):
    """A forward pass of a step, for its backward pass."""

    @property
    def stats(self) -> Mapping[Unit, RouterStats]:
        """What the routers of the layers that have run have done."""

    def backward(self, loss: Tensor, gradient: Tensor | None = None, limit: Tensor | None = None) -> None:
        """Run the micro-step's backward pass, which ends it. Every rank must call it.

        Args:
            gradient: the gradient of the objective by `loss`, of its shape; None: `loss` is a scalar, and its gradient 1.
            limit: scalar, to which the norm of what this rank's tokens add to the experts' gradients is clipped, over all layers, before
                it is added up with other ranks' and micro-steps'; given in all micro-steps of a step or in none. None: no clipping.
        """


class TrainingStep(Protocol):
    """One optimizer step, from its plans to its gradients. What is called out of order raises `OrderError`."""

    def begin_micro_step(self, tokens: PassTokens | None = None) -> TrainingPass:
        """The model's next forward pass is of these tokens; None: of any, none of which is padding."""

    def finish(self) -> dict[Unit, np.ndarray]:
        """Complete the step: gradients summed onto the owners' parameters, loads recorded. Every rank must call it.

        An expert that no token of any rank reached gets no gradient (None), so that its optimizer leaves it untouched.

        Returns:
            Per layer the step's loads, int64 [experts, ranks of the job].
        """


class EvaluationPasses(Protocol):
    """Any number of forward passes without training."""

    def forward(self, tokens: PassTokens) -> AbstractContextManager[Mapping[Unit, RouterStats]]:
        """Until the end of the block, the model's forward passes are of these tokens; yields what routers do in them."""


class ExpertEngine(Protocol):
    """Trains and evaluates the experts of all MoE layers of a model on one rank."""

    @property
    def shards(self) -> ExpertShards:
        """What this rank holds of the experts."""

    @property
    def current(self) -> CurrentPass:
        """The forward pass that the model is in; its modules are built with it."""

    @property
    def runs_in_lockstep(self) -> bool:
        """Whether ranks must run the same forward passes at the same time outside training, too."""

    def begin_step(self, number: int, micro_steps: int = 1) -> TrainingStep:
        """Plan all layers of an optimizer step from the history. Every rank must call it.

        Args:
            number: of the optimizer step, from 0.
            micro_steps: in which the step's tokens come.

        Raises:
            OrderError: the step before is not finished, or an evaluation is under way.
        """

    def evaluation(self, *, in_lockstep: bool = False) -> AbstractContextManager[EvaluationPasses]:
        """Every expert everywhere until the end of the block, so that ranks may run whatever they like, each on its own.

        Every rank must enter it; entering materializes all layers.

        Args:
            in_lockstep: experts stay with their owners and tokens go to them, so that no rank holds what it has no room for; the ranks
                must then run the same forward passes at the same time.

        Raises:
            OrderError: as `begin_step`.
        """

    def rejoin(
        self, topology: Topology, groups: ExpertGroups, owners: dict[Unit, np.ndarray], chunks: Mapping[Unit, Mapping[int, Tensor]]
    ) -> None:
        """See `ExpertShards.rejoin`. A step or an evaluation that was under way among the old ranks is forgotten."""
