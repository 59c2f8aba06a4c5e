"""The program of every process of the drills, which a fork server starts: a drill, a launcher, a rank, or a function on one of some ranks.

It is the only program that arms a process (`hecate.faults`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from hecate.io.process_end import run_and_end

_CASES = "hecate.apps.check.drill.cases."


def preload() -> None:
    """Import what ranks and drills need."""
    from hecate.apps.check.drill import tiny_run  # noqa: F401
    from hecate.train import rank_main

    rank_main.preload()


def main(arguments: Sequence[str]) -> None:
    """Become what the first argument says, with the others as its own.

    Raises:
        SystemExit: with the status of what it became.
    """
    import torch

    from hecate.io.terminal import show_messages

    show_messages()
    torch.set_num_threads(1)
    if arguments[0] == "without":
        from hecate.apps.check.drill.prove import switch_off

        switch_off(arguments[1])
        arguments = arguments[2:]
    kinds: dict[str, Callable[..., None]] = {
        "drill": _drill,
        "workshop": _workshop,
        "launch": _launch,
        "node": _node,
        "rank": _rank,
        "call": _call,
    }
    kinds[arguments[0]](*arguments[1:])


def _workshop(folder: str) -> None:
    from hecate.apps.check.drill.tiny_run import make_workshop

    Path(folder).mkdir()
    make_workshop(Path(folder))


def _drill(function: str, scope: str, result: str) -> None:
    from hecate.apps.check.drill.outcome import Scope, TooSlow, outcome_so_far

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it has started ends on the way out
    given = json.loads(scope)
    try:
        outcome = found(function)(Scope(**{**given, "start": tuple(given["start"])}))
    except (TooSlow, subprocess.TimeoutExpired) as late:
        outcome = outcome_so_far(str(late))
    except SystemExit:  # of the handler above
        outcome = outcome_so_far("the drill had not ended when its time was over")
    _leave(Path(result), vars(outcome))


def _launch(request: str) -> None:
    """Become the launcher of a run. The local one has its ranks forked by this program's fork server; those of nodes have their own."""
    from hecate.apps.check.drill.launchers import run_request

    run_request(request)


def _node(request: str, number: str, endpoint: str) -> None:
    """Become the launcher of one of a run's two nodes."""
    from hecate.apps.check.drill.launchers import run_node

    run_node(request, number, endpoint)


def _rank(injected: str, trace: str, joins: str, *arguments: str) -> None:
    """Become a rank of a run, armed. A rank that is to join in the place of a lost one waits for its end unless `joins` says yes."""
    from hecate.apps.check.drill.armed import arm_process, from_text, not_struck
    from hecate.ranks.launcher_files import JOIN_VARIABLE
    from hecate.train import rank_main

    if JOIN_VARIABLE in os.environ and joins != "yes":
        signal.pause()
    arm_process(not_struck(from_text(injected), Path(trace)), int(os.environ["RANK"]), Path(trace))
    rank_main.main(arguments)


def _call(function: str, arguments: str, result: str) -> None:
    """Call a function of the drills as one rank of some, and leave what it returns."""
    from hecate.ranks.ranks import join_ranks

    try:
        with join_ranks() as ranks:
            value = found(function)(ranks, *json.loads(arguments))
            _leave(Path(result), {"value": value})
            if not ranks.aborted:
                ranks.barrier()  # a rank that leaves earlier would break the others off
    except BaseException:
        if not Path(result).exists():
            _leave(Path(result), {"failed": traceback.format_exc()})
        raise


def name_of(function: Callable[..., Any]) -> str:
    """The text by which `found` finds a function at the top of a module of `cases`."""
    return f"{function.__module__.removeprefix(_CASES)}:{function.__name__}"


def found(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return cast(Callable[..., Any], getattr(import_module(f"{_CASES}{module}"), function))


def _leave(path: Path, value: Any) -> None:
    staged = path.with_name(f"{path.name}.part")
    staged.write_text(json.dumps(value), encoding="utf-8")
    staged.rename(path)


if __name__ == "__main__":
    run_and_end(lambda: main(sys.argv[1:]))
