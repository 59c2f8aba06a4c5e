"""Plans of the next step, which a thread makes while the backward pass of this one runs.

What the thread leaves are answers, each beside all that it was made from. The next step asks as if nothing had been made, and takes an
answer only if it was made from the same: so nothing that happens between two steps can have a step go by another plan, and what was made
in vain is made anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from torch.profiler import record_function

from hecate.parallel.planners import PlanInput

T = TypeVar("T")

THREAD = "hecate-plan-ahead"
"""The name of each thread that plans."""


@dataclass(frozen=True)
class _Answer:
    question: tuple[Any, ...]
    value: Any
    error: Exception | None
    """What was raised instead of an answer; None: there is one."""


class Answers:
    """What planners have answered so far, and what they were asked."""

    def __init__(self) -> None:
        self._known: list[_Answer] = []
        self.made = 0
        """The number of questions whose answers were not known."""

    def has(self, error: Exception) -> bool:
        """Whether an error is the answer to a question."""
        return any(known.error is error for known in self._known)

    def ask(self, question: tuple[Any, ...], answer: Callable[[], T]) -> T:
        """What is known as the answer to the same question, or what `answer` returns, which is known from then on. An error that it
        raises is an answer, too.

        Args:
            question: all that the answer depends on. Inputs of planners are the same if all their values are; other objects, if they are
                one object, or equal values that can be hashed.
        """
        for known in self._known:
            if _same(known.question, question):
                if known.error is not None:
                    raise known.error
                value: T = known.value
                return value
        self.made += 1
        try:
            made = answer()
        except Exception as error:
            self._known.append(_Answer(question, None, error))
            raise
        self._known.append(_Answer(question, made, None))
        return made


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, PlanInput) and isinstance(other, PlanInput):
        return all(_same(getattr(one, field.name), getattr(other, field.name)) for field in fields(PlanInput))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one).__hash__ is not None and type(one) is type(other) and bool(one == other)


class PlansAhead:
    """What a thread of its own answers, beginning at once.

    A timeline (`profile`) shows when the thread works, and when the next step waits for it.
    """

    def __init__(self, make: Callable[[Answers], object]) -> None:
        """Begin. `make`: asks. What it reads must be its own, or never change."""
        self._answers = Answers()
        self._failure: Exception | None = None
        # A daemon: a process that ends because a rank was lost, whose loads never come, does not wait for it.
        self._thread = threading.Thread(target=self._run, args=(make,), name=THREAD, daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> Answers:
        """What the thread has answered, once it has ended; nothing of it counts in `Answers.made`.

        Raises:
            Exception: what has ended the thread, unless it is the answer to a question, which is raised by whoever asks that.
        """
        with record_function("hecate: wait for plan ahead"):
            self._thread.join()
        answers = self._answers
        if self._failure is not None and not answers.has(self._failure):
            raise self._failure
        answers.made = 0
        return answers

    def _run(self, make: Callable[[Answers], object]) -> None:
        try:
            with record_function("hecate: plan ahead"):
                make(self._answers)
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            self._failure = error
