"""Launchers that are killed or get signals, and what the processes of a run leave and listen on: R21, R22, R23."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from hecate.apps.check.drill.armed import Injected
from hecate.apps.check.drill.outcome import DrillCase, DrillOutcome, Scope, outcome_of, worst
from hecate.apps.check.drill.processes import tcp_addresses, wait_until_gone
from hecate.apps.check.drill.ranks import begin_command, begin_run, environment
from hecate.checkpoint import committed, read_manifest
from hecate.io.python_module import RUN_MODULE
from hecate.launch.run_folder import processes_below

_LOOPBACK = {"127.0.0.1", "::1"}
_EXIT_SECONDS = 10.0
_ENDLESS = "max_steps=100000"


def only_loopback(scope: Scope) -> DrillOutcome:
    """R21"""
    cases, seen = [], 0
    for overrides in ((),) if scope.quick else ((), ("fssdp.redundancy=1",)):
        run = begin_command(scope, "listening", 3, _ENDLESS, *overrides)
        try:
            run.wait_for("step 2/")
            pids = [run.process.pid, *processes_below(run.process.pid)]
            for what, listening in (("listens on", True), ("is connected with", False)):
                found = tcp_addresses(pids, listening=listening)
                seen += len(found)
                others = sorted(found - _LOOPBACK)
                cases.append(DrillCase(f"{what} loopback only {' '.join(overrides)}".strip(), f"{others} beside it" if others else ""))
            cases.append(DrillCase("there are ranks to look at", "" if len(pids) > 3 else f"only {len(pids)} processes"))
        finally:
            run.process.kill()
            run.process.wait()
    return outcome_of(cases, "every TCP socket of launcher, server and ranks is bound to loopback", {"addresses": seen})


def killed_launcher(scope: Scope) -> DrillOutcome:
    """R22"""
    cases: list[DrillCase] = []
    settled: list[float] = []
    temporary = scope.path / "tmp"
    temporary.mkdir()
    for cycle in range(4 if scope.quick else 44):
        cases.append(_idle_cycle(scope, temporary, cycle, settled))
    for cycle in range(0 if scope.quick else 6):
        cases.append(_training_cycle(scope, temporary, cycle, settled))
    return outcome_of(cases, "no process, socket or file is left", {"cycles": len(cases), "gone_after_worst_ms": 1000 * worst(settled)})


def _idle_cycle(scope: Scope, temporary: Path, cycle: int, settled: list[float]) -> DrillCase:
    """Start a launcher with two idle ranks; end it in one of four ways, sometimes before its ranks are there."""
    folder = scope.path / f"idle-{cycle}"
    folder.mkdir()
    way = ("SIGKILL", "SIGTERM", "SIGKILL at once", "SIGKILL of the fork server")[cycle % 4]
    variables = environment() | {"TMPDIR": str(temporary)}
    command = [*RUN_MODULE, "hecate.apps.check.drill.idle", "2", str(folder)]
    with subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + (0.1 * (cycle % 7) if way == "SIGKILL at once" else 30.0)
        while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        below = processes_below(process.pid)
        began = time.monotonic()
        if way == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        elif way == "SIGKILL of the fork server":
            server = [pid for pid in below if b"fork_server" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            os.kill(server[0], signal.SIGKILL)
        else:
            process.kill()
        process.wait(timeout=30)
        left = wait_until_gone(below, temporary)
        settled.append(time.monotonic() - began)
    return DrillCase(f"cycle {cycle + 1}, {way}", f"left: {left[:3]}" if left else "")


def _training_cycle(scope: Scope, temporary: Path, cycle: int, settled: list[float]) -> DrillCase:
    """Start a run of two ranks, and end it in one of three ways."""
    way = ("its own end", "SIGTERM", "SIGKILL")[cycle % 3]
    run = begin_command(scope, "cycle", 2, "max_steps=3" if way == "its own end" else _ENDLESS, temporary=temporary)
    try:
        run.wait_for("step 2/")
        below = processes_below(run.process.pid)
        began = time.monotonic()
        if way == "SIGTERM":
            run.process.send_signal(signal.SIGTERM)
        elif way == "SIGKILL":
            run.process.kill()
        run.process.wait(timeout=60)
        left = wait_until_gone(below, temporary)
        settled.append(time.monotonic() - began)
    finally:
        run.process.kill()
        run.process.wait()
    return DrillCase(f"training, {way}", f"left: {left[:3]}" if left else "")


def signals(scope: Scope) -> DrillOutcome:
    """R23"""
    late = Injected(action="sleep", place="backward", rank=1, step=3, value=0.3)
    death = Injected(action="kill", place="norm", rank=1, step=1)
    kinds: dict[str, tuple[signal.Signals, int, tuple[str, ...], tuple[Injected, ...]]] = {
        "SIGTERM in a step": (signal.SIGTERM, 143, (), (late,)),
        "SIGINT": (signal.SIGINT, 130, (), ()),
        "SIGTERM while each step is saved": (signal.SIGTERM, 143, ("save_steps=1", "save_total_limit=2"), ()),
        "SIGTERM after a rank was lost": (signal.SIGTERM, 143, (), (death,)),
    }
    cases, took = [], []
    for name, (number, status, overrides, injected) in list(kinds.items())[: 2 if scope.quick else None]:
        run = begin_run(scope, "signal", 2, _ENDLESS, *overrides, injected=injected)
        run.wait_for("step 3/")
        began = time.monotonic()
        run.process.send_signal(number)
        ended = run.end(60)
        seconds = time.monotonic() - began
        took.append(1000 * seconds)
        last = max(ended.losses)
        newest = committed(ended.output)
        problem = ""
        if ended.status != status:
            problem = f"ended with status {ended.status}: {ended.log.strip().splitlines()[-1]}"
        elif not newest or read_manifest(newest[0]).step != last:
            problem = f"the last step is {last}, the checkpoints are {[path.name for path in newest]}"
        elif "Traceback" in ended.log:
            problem = "a traceback was printed"
        overdue = seconds > _EXIT_SECONDS and not scope.quick
        cases.append(DrillCase(name, problem, f"it took {seconds:.1f} s" if overdue else ""))
    seen = "the step under way is finished and saved, exit status 128 + the signal's number"
    return outcome_of(cases, seen, {"exit_worst_ms": worst(took)})
