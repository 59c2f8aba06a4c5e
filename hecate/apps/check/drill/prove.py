"""What each drill must notice: parts of hecate that are switched off in a drill's processes, after which the drill has to fail.

The program of the drills replaces them where its arguments begin with `without NAME`; nothing else can.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Change = Callable[[Any], Any]
"""makes of a function or a value what takes its place"""


@dataclass(frozen=True)
class Proof:
    """One feature, and how it is switched off."""

    feature: str
    """in a few words"""
    changes: dict[str, Change]
    """by MODULE:NAME or MODULE:CLASS.NAME"""


def switch_off(drill: str) -> None:
    """Switch off what a drill is about, in this process and for good."""
    for where, change in PROOFS[drill].changes.items():
        module, _, path = where.partition(":")
        *parents, name = path.split(".")
        holder: Any = import_module(module)
        for parent in parents:
            holder = getattr(holder, parent)
        setattr(holder, name, change(getattr(holder, name)))


def _returning(value: Any) -> Change:
    return lambda _: lambda *_args, **_named: value


def _with(**given: Any) -> Change:
    """The same function with these arguments, whatever it is called with."""
    return lambda function: lambda *args, **named: function(*args, **{**named, **given})


def _file_by_file(commit: Callable[..., None]) -> Callable[..., None]:
    def commit_so(staging: Path, final: Path, *given: Any) -> None:
        commit(staging, final, *given)
        whole = final.with_name(f"{final.name}.tmp-whole")
        os.rename(final, whole)
        os.mkdir(final)
        for name in os.listdir(whole):
            os.rename(whole / name, final / name)
        os.rmdir(whole)

    return commit_so


def _written_over(create: Callable[..., int]) -> Callable[..., int]:
    def create_anew(path: Path, *given: Any, **named: Any) -> int:
        path.unlink(missing_ok=True)
        return create(path, *given, **named)

    return create_anew


def _turned(read: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    return lambda *given: {name: tensor.flip(0) if tensor.dim() else tensor for name, tensor in read(*given).items()}


def _stepping_idle(step: Callable[..., bool]) -> Callable[..., bool]:
    def step_all(self: Any, *given: Any) -> bool:
        for parameter in self.owned.values():
            parameter.grad = parameter.data.new_zeros(parameter.shape) if parameter.grad is None else parameter.grad
        return step(self, *given)

    return step_all


def _own_norm(exchange: Callable[..., Any]) -> Callable[..., Any]:
    def exchange_totals(*given: Any) -> Any:
        totals = exchange(*given)
        return replace(totals, grad_norm=totals.grad_norm / (1.0 if given[2].rank() == 0 else 1e9))

    return exchange_totals


def _after(statements: str) -> Change:
    """The command that runs a module after these statements, in place of `RUN_MODULE`."""
    program = f"import runpy, sys; {statements}; sys.argv = sys.argv[1:]; "
    return lambda _: (sys.executable, "-P", "-c", program + "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)")


_BACKUPS = Proof("a second copy of each expert", {"hecate.apps.check.drill.cases.losses:begin_run": _with(survives=False)})
PROOFS: dict[str, Proof] = {
    "R1": _BACKUPS,
    "R2": _BACKUPS,
    "R3": Proof("that stopped ranks are looked for", {"hecate.launch.stopped_ranks:StoppedRanks.look": _returning({})}),
    "R4": Proof(
        "that moments go with their experts",
        {
            "hecate.optim.optimizer:ExpertOptimizer.replace_owned": lambda replace_owned: (
                lambda self, owned, _, **named: replace_owned(self, owned, {}, **named)
            )
        },
    ),
    "R5": Proof("the one rename of a commit", {"hecate.apps.check.drill.cases.saves:commit": _file_by_file}),
    "R6": Proof(
        "a nonce of each save, and files that are written once",
        {
            "hecate.apps.check.drill.cases.saves:staging_folder": lambda folder: lambda root, step, _: folder(root, step, "same"),
            "hecate.io.durable:_create": _written_over,
        },
    ),
    "R7": Proof("the way out in the message", {"hecate.checkpoint.save:advice": _returning("")}),
    "R8": Proof("the digests of tensors", {"hecate.checkpoint.shard:digest_of": _returning("0" * 32)}),
    "R10": Proof("that tensors arrive as they were saved", {"hecate.checkpoint.train_state:read_tensors": _turned}),
    "R11": Proof(
        "the loads of the last steps in a checkpoint", {"hecate.parallel.values.loads:LoadHistory.load_state_dict": _returning(None)}
    ),
    "R12": Proof(
        "that a step begins again with its samples",
        {"hecate.checkpoint.train_state:TrainState.put_back": lambda _: lambda _self, parts: parts.optimizer.abandon()},
    ),
    "R13": Proof(
        "that a norm which is not finite is not taken",
        {
            "hecate.optim.optimizer:ExpertOptimizer.step": lambda step: (
                lambda self, norm, *given: step(self, norm if math.isfinite(norm) else 1.0, *given)
            )
        },
    ),
    "R14": Proof("that all ranks have one norm", {"hecate.train.steps.step:exchange_totals": _own_norm}),
    "R15": Proof("that idle experts are left alone", {"hecate.optim.optimizer:ExpertOptimizer.step": _stepping_idle}),
    "R18": Proof("the watch of what ranks wait in", {"hecate.elastic.mismatch_watch:MismatchWatch.begin": _returning(None)}),
    "R19": Proof("the comparison of ranks' speeds", {"hecate.elastic.stragglers:SlowRanks.after_step": _returning([])}),
    "R20": Proof("the comparison of copies", {"hecate.elastic.damaged_copies:CopyChecks.check": _returning(None)}),
    "R21": Proof(
        "loopback: the launcher listens on all interfaces",
        {"hecate.apps.check.drill.ranks:RUN_MODULE": _after("import socket; s = socket.create_server(('0.0.0.0', 0))")},
    ),
    "R22": Proof(
        "that the launcher removes its files",
        {"hecate.apps.check.drill.cases.launching:RUN_MODULE": _after("import tempfile; tempfile.mkdtemp()")},
    ),
    "R23": Proof(
        "that ranks save at a signal",
        {"hecate.train.loop:_stop_on_signals": lambda _: lambda: nullcontext(SimpleNamespace(is_set=False))},
    ),
    "R24": _BACKUPS,
    "R25": Proof("the names of followers in trouble", {"hecate.report.tracking.tracker_threads:Trackers._name_troubled": _returning(None)}),
}
