"""Faults as values, and the handler that carries them out in one process (`hecate.faults`)."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist

from hecate import faults
from hecate.apps.check.drill.disk import watch_disk
from hecate.faults import Place

Action = Literal["kill", "stop", "sleep", "fill", "scale", "one_expert", "flip", "fail", "stray"]
"""kill and stop: the process sends itself SIGKILL or SIGSTOP. sleep: for `value` seconds. fill: the subject's first number becomes `value`;
of an optimizer, that of its first gradient. scale: the whole subject is multiplied by it. one_expert: the logits send every token to expert
`value` first. flip: one bit of the first expert that the rank owns changes. fail: an operation on a file raises OSError with the number
`value`; deleting works also on a full disk. stray: the rank does a collective that the others do not, a barrier, or with `value` an
all-reduce of so many numbers."""

_TRACED = ("step", "stepped", "trained", "lost", "regrouped")
"""places whose times are written down"""


@dataclass(frozen=True, kw_only=True)
class Injected:
    """One fault: what happens, where, when and on which rank."""

    action: Action
    place: Place
    rank: int | None = None
    """the rank's number when the run began; None: every rank"""
    step: int | None = None
    """the number of the step, from 0; None: every one"""
    call: int = 1
    """at which of the step's calls of this place, from 1; 0: at each"""
    value: float = 0.0


@dataclass
class Armed:
    """The handler of one process: carries faults out, and writes what it came by to a file of lines of JSON."""

    injected: Sequence[Injected]
    rank: int
    trace: Path | None = None
    """None: nothing is written"""
    _step: int = -1
    _calls: dict[str, int] = field(default_factory=dict)
    _struck: set[int] = field(default_factory=set)
    """places in `injected` of faults at one call of one step, which do not strike again when that step is done again"""

    def __call__(self, place: Place, subject: Any) -> None:
        if place == "step":
            self._step, self._calls = subject, {}
        self._calls[place] = number = self._calls.get(place, 0) + 1
        if place in _TRACED:
            self._note(place, trained_samples(subject) if place == "trained" else None)
        for at, one in enumerate(self.injected):
            wanted = one.place == place and one.rank in (None, self.rank) and one.step in (None, self._step) and one.call in (0, number)
            if wanted and at not in self._struck:
                if one.step is not None and one.call:
                    self._struck.add(at)
                self._note(one.action, place)
                carry_out(one, subject)

    def _note(self, what: str, more: Any) -> None:
        if self.trace is None:
            return
        line = {"what": what, "rank": self.rank, "step": self._step, "time": time.monotonic(), "more": more}
        descriptor = os.open(self.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.write(descriptor, json.dumps(line).encode() + b"\n")
        os.close(descriptor)


def carry_out(one: Injected, subject: Any) -> None:
    """Do what a fault says, to the process or to the subject."""
    if one.action in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if one.action == "kill" else signal.SIGSTOP)
    elif one.action == "sleep":
        time.sleep(one.value)
    elif one.action == "flip":
        flip_a_bit(subject)
    elif one.action == "stray":
        dist.all_reduce(torch.ones(int(one.value))) if one.value else dist.barrier()
    elif one.action == "fail":
        if subject not in ("unlink", "rmdir"):
            raise OSError(int(one.value), os.strerror(int(one.value)))
    elif not isinstance(subject, torch.Tensor):  # an optimizer
        held = {**subject.owned, **subject.replicated}.values()
        carry_out(one, next(parameter.grad for parameter in held if parameter.grad is not None))
    else:
        numbers = subject.data  # autograd must not notice
        if one.action == "scale":
            numbers.mul_(one.value)
        elif one.action == "one_expert":
            numbers[:, int(one.value)] = numbers.abs().max() + 1 if numbers.numel() else 0
        else:
            numbers.view(-1)[:1] = one.value


def flip_a_bit(optimizer: Any, *, backup: bool = False) -> None:
    """Change one bit of the parameters of the first expert that the rank owns, or of its first backup, as a broken memory would."""
    parameter = next(iter((optimizer.backups if backup else optimizer.owned).values()))
    raw = parameter.data.view(-1)[:1].view(torch.uint8)
    raw[-1] ^= 1


def trained_samples(sequences: Any) -> list[list[int]]:
    """[source, sample] of everything that a step has trained on."""
    return [[int(source), int(sample)] for sequence in sequences for source, sample in sequence.samples]


def arm_process(injected: Sequence[Injected], rank: int, trace: Path | None = None) -> None:
    """Have this process carry out the faults from now on, those at operations on files of checkpoints included."""
    armed = Armed(injected, rank, trace)
    faults.arm(armed)
    if any(one.place == "file" for one in injected):
        watch_disk(lambda _number, operation, _args: faults.at("file", operation), only=lambda path: "/checkpoint-" in path)


def not_struck(injected: Sequence[Injected], trace: Path) -> list[Injected]:
    """Those faults of a rank and step that have not struck, by the trace of a run whose ranks were all started again."""
    lines = trace.read_text(encoding="utf-8").splitlines() if trace.exists() else []
    struck = {(line["what"], line["rank"], line["step"]) for line in map(json.loads, lines)}
    return [one for one in injected if (one.action, one.rank, one.step) not in struck]


def to_text(injected: Sequence[Injected]) -> str:
    return json.dumps([vars(one) for one in injected])


def from_text(text: str) -> list[Injected]:
    return [Injected(**cast(dict[str, Any], one)) for one in json.loads(text)]
