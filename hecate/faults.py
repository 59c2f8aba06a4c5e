"""The one place through which faults are put into a running process: `hecate drill` and the tests do so, and nothing else can.

The code that trains calls `at` at the places below. It does nothing unless this process was armed. No configuration key and no
environment variable arms a process: that takes a call of `arm`, and only the drills (`hecate.apps.check.drill`) have one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

Place = Literal[
    "begin",  # a rank is about to connect to those that it begins the run with
    "connect",  # a rank is about to connect to others; then: their first group, all others, and all that they ask each other are there
    "loaded",  # it has loaded the model, and is about to say so
    "evaluate",  # an evaluation begins
    "step",  # a step begins; with its number
    "forward",  # a micro-step's forward pass begins
    "layer",  # a decoder layer begins
    "router",  # a router has its logits, [tokens, experts]
    "experts",  # a layer's tokens are about to be computed, [tokens, hidden]
    "loss",  # a micro-step's summed loss, a scalar
    "backward",  # a layer's gradient is complete
    "reduce",  # the experts' gradients are with their owners; the replicated ones are about to be summed
    "gradients",  # all gradients are summed; with the optimizer
    "norm",  # the norm is about to be exchanged
    "optimizer",  # all ranks have the norm, and nothing has changed yet
    "stepped",  # the parameters have changed
    "trained",  # the step counts as done; with its sequences
    "save",  # a checkpoint is about to be written
    "move",  # in a re-shard a layer's experts are about to move; then: those of this rank have arrived, and it does not own them yet
    "backups",  # a layer's new backups have arrived, and this rank does not hold them yet; then: all ranks hold theirs
    "output",  # what the run leaves is about to be written; then: it is written, and the ranks are about to agree on that
    "lost",  # this rank has noticed that another one is lost
    "regrouped",  # this rank goes on with the ranks that are left, or that have come
    "file",  # an operation on a file of a checkpoint; with its name (`hecate.apps.check.drill.disk`)
]

_handler: Callable[[Place, Any], None] | None = None


def armed() -> bool:
    """Whether something is called at the places of this process."""
    return _handler is not None


def at(place: Place, subject: Any = None) -> None:
    """Say that this process has come to a place. It costs a comparison with None unless the process is armed.

    Args:
        subject: what is at hand there, which a fault may look at or change.
    """
    if _handler is not None:
        _handler(place, subject)


def arm(handler: Callable[[Place, Any], None] | None) -> None:
    """Have `handler(place, subject)` called at each place of this process from now on; None: nothing any more."""
    global _handler
    _handler = handler
