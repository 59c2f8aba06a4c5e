"""What a model's layers share during one forward pass: the tokens that it is made for, and the experts that it may call.

An engine (`hecate.engine`) begins a forward pass, a micro-step of training or a batch of an evaluation, and shows it to the model's modules
through the one `CurrentPass` that they were built with:

    routing = router(x_TD)
    forward = current.required()
    forward.note_routing(unit, routing)
    y_TD = forward.experts(unit, x_TD, routing.expert_TK, routing.weight_TK, token_T)

Shapes: B sequences of S positions, T tokens, D hidden, K experts a token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hecate.experts.pass_routing import PassRouting
from hecate.experts.pass_samples import PassSamples
from hecate.experts.pass_users import PassUsers
from hecate.experts.routers.router import Routing
from hecate.parallel.values.units import Unit


class OrderError(Exception):
    """The engine was called in another order than a training step allows: a mistake of the calling program, not of its user."""


@dataclass(frozen=True)
class PassTokens:
    """The tokens of one forward pass, flattened to [B·S]."""

    valid: Tensor | None = None
    """The indices of the tokens that are no padding, int64; None: no token is padding."""
    number: Tensor | None = None
    """Each token's number, unique over the run, int64 [B·S]; None outside training."""
    samples: PassSamples | None = None
    """The samples that the tokens belong to; None outside training."""
    source: Tensor | None = None
    """The number of the source in the training data, int64 [B·S], or [1] for all tokens; None: not known."""
    users: PassUsers | None = None
    """The users of the tokens' samples; None: not known, or nothing depends on them."""
    routing: PassRouting | None = None
    """The experts that the samples bring for their tokens; None: routers alone decide."""


class ForwardPass(Protocol):
    """One forward pass through the whole model, as its layers see it."""

    @property
    def tokens(self) -> PassTokens: ...

    @property
    def step(self) -> int:
        """The optimizer step that it belongs to, from 0; 0 outside training."""

    def prefetch(self, *units: Unit) -> None:
        """Start to materialize layers, in the order in which they are needed; every rank must call it in the same order.

        Does nothing for layers whose replicas have arrived or are on their way.
        """

    def note_routing(self, unit: Unit, routing: Routing) -> None:
        """Keep what the load-balancing loss needs of a layer's routing of the valid tokens."""

    def experts(self, unit: Unit, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, token_T: Tensor) -> Tensor:
        """The weighted sum of each token's experts: [T, D].

        Every rank must call it for the same layers in the same order, also with no tokens.

        Args:
            expert_TK: int64.
            token_T: int64: token numbers.
        """

    def again(self) -> ForwardPass:
        """The same pass for a checkpointed layer that runs a second time: it computes the same, and nothing is counted twice."""


class CurrentPass:
    """The forward pass that a model is in. One object for the whole model: its engine sets it, its modules read it."""

    def __init__(self) -> None:
        self.now: ForwardPass | None = None
        """The pass that the model is in; None: no step and no evaluation is under way."""

    def required(self) -> ForwardPass:
        """Raises OrderError: the model runs outside of training steps and evaluations."""
        if self.now is None:
            raise OrderError(
                "the model was called outside of a training step and of an evaluation, so its experts are not materialized\n"
                "  call it inside `with engine.evaluation():`, or after `engine.begin_step(...).begin_micro_step(...)`"
            )
        return self.now

    @contextmanager
    def set_to(self, forward: ForwardPass) -> Iterator[None]:
        """Until the end of the block the model is in another pass."""
        before, self.now = self.now, forward
        try:
            yield
        finally:
            self.now = before
