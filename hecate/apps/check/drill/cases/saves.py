"""Saves that are interrupted: killed at every operation, the same step twice, on a disk that fails: R5, R6, R7."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hecate.apps.check.drill.armed import Injected
from hecate.apps.check.drill.disk import watched_disk, write_half
from hecate.apps.check.drill.outcome import DrillCase, DrillOutcome, Scope, outcome_of
from hecate.apps.check.drill.ranks import begin_run
from hecate.checkpoint import CheckpointError, good_checkpoints, latest_good, read_manifest, remove_stale_staging
from hecate.checkpoint.save import checkpoint_folder, commit, staging_folder, write_shard
from hecate.checkpoint.shard import read_tensors

_META = {"config": "abc", "data": {"position": 12, "rng": [1, 2.5, None, True]}}
_RANKS = 2
_WAY_OUT = {errno.ENOSPC: "set output_dir to another disk", errno.EIO: "set output_dir to another disk", errno.EMFILE: "ulimit -n"}


def shards_of(value: float) -> list[dict[str, Tensor]]:
    """What each of two ranks saves: tensors whose every number tells `value`."""
    return [
        {f"owned/{rank}.master": torch.full((3, 5), value + rank), f"owned/{rank}.step": torch.full((), int(value), dtype=torch.int64)}
        for rank in range(_RANKS)
    ]


def save(root: Path, step: int, value: float, nonce: str = "a") -> Path:
    """Save what tells `value`, as two ranks do."""
    staging, final = staging_folder(root, step, nonce), checkpoint_folder(root, step)
    for rank, tensors in enumerate(shards_of(value)):
        write_shard(staging, rank, _RANKS, tensors)
    commit(staging, final, _META, _RANKS)
    return final


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, each digest checked."""
    return read_tensors(folder, read_manifest(folder))


def value_of(folder: Path) -> float:
    """The one value that all numbers of a checkpoint of `save` tell.

    Raises:
        AssertionError: they do not tell the same, or some are missing.
        CheckpointError: it is damaged.
    """
    found = load(folder)
    value = float(found["owned/0.step"])
    wanted = {name: tensor for shard in shards_of(value) for name, tensor in shard.items()}
    assert found.keys() == wanted.keys(), "tensors are missing"
    assert all(torch.equal(found[name], wanted[name]) for name in wanted), "tensors of two saves are mixed"
    return value


def kill_at_each_operation(scope: Scope) -> DrillOutcome:
    """R5"""
    total = operations_of_a_save(scope.path / "count")
    cases, old, new = [], 0, 0
    for fatal in range(1, len(total) + 1):
        for inside in (False, True):
            if inside and total[fatal - 1] != "write":
                continue
            root = scope.path / f"{fatal}-{inside}"
            save(root, 1, 1.0)
            problem = _killed(lambda root=root: save(root, 2, 2.0), fatal, inside=inside) or check_whole(root, (2.0,))  # type: ignore[misc]
            if not problem:
                newest = latest_good(root)
                old, new = old + (newest == root / "checkpoint-1"), new + (newest == root / "checkpoint-2")
                problem = _goes_on(root)
            cases.append(DrillCase(f"{'in' if inside else 'before'} operation {fatal}, {total[fatal - 1]}", problem))
            shutil.rmtree(root)
    for rank, call in () if scope.quick else ((0, 4), (1, 6), (0, 14), (0, 17)):
        cases.append(DrillCase(f"rank {rank} of a run, operation {call}", _killed_in_a_run(scope, rank, call)))
    return outcome_of(cases, "0 torn", {"operations": len(total), "old_kept": old, "new_whole": new})


def same_step_twice(scope: Scope) -> DrillOutcome:
    """R6"""
    total = len(operations_of_a_save(scope.path / "count"))
    stride = (5, 6) if scope.quick else (2, 3)
    cases = []
    for fatal in range(1, total, stride[0]):
        for again in range(1, total, stride[1]):
            root = scope.path / f"{fatal}-{again}"
            save(root, 1, 1.0)
            problem = _killed(lambda root=root: save(root, 2, 2.0, "a"), fatal)  # type: ignore[misc]
            if not problem and not (root / "checkpoint-2").exists():
                problem = _killed(lambda root=root: save(root, 2, 200.0, "b"), again)  # type: ignore[misc]
            cases.append(DrillCase(f"killed at {fatal}, and again at {again}", problem or check_whole(root, (2.0, 200.0))))
            shutil.rmtree(root)
    for late in range(_RANKS):
        cases.append(
            DrillCase(f"rank {late} of the first save writes beside the second one", _written_late(scope.path / f"late-{late}", late))
        )
    return outcome_of(cases, "never mixed", {"operations": total})


def _written_late(root: Path, late: int) -> str:
    """What is wrong after a save that was broken off, and of which one rank writes only when the ranks of the next one have written."""
    save(root, 1, 1.0)
    first, second = (staging_folder(root, 2, nonce) for nonce in ("a", "b"))
    write_shard(first, 1 - late, _RANKS, shards_of(2.0)[1 - late])
    for rank, tensors in enumerate(shards_of(200.0)):
        write_shard(second, rank, _RANKS, tensors)
    write_shard(first, late, _RANKS, shards_of(2.0)[late])
    commit(second, checkpoint_folder(root, 2), _META, _RANKS)
    return check_whole(root, (200.0,))


def failing_disk(scope: Scope) -> DrillOutcome:
    """R7"""
    operations = operations_of_a_save(scope.path / "count")
    cases = []
    for code in (errno.ENOSPC, errno.EIO, errno.EMFILE):
        for lasting in (False, True):
            for first in range(1, len(operations) + 1, 4 if scope.quick else 1):
                root = scope.path / f"{code}-{lasting}-{first}"
                save(root, 1, 1.0)
                problem = _failed(root, code, first, lasting=lasting, operation=operations[first - 1]) or check_whole(root, (2.0,))
                name = f"{errno.errorcode[code]} {'from' if lasting else 'at'} operation {first}, {operations[first - 1]}"
                cases.append(DrillCase(name, problem))
                shutil.rmtree(root)
    return outcome_of(cases, "the old checkpoint intact, the reason said", {"operations": len(operations)})


def operations_of_a_save(folder: Path) -> list[str]:
    """The file operations of one save beside an older checkpoint."""
    seen: list[str] = []
    save(folder, 1, 1.0)
    with watched_disk(lambda _number, operation, _args: seen.append(operation)):
        save(folder, 9, 2.0)
    return seen


def check_whole(root: Path, values: tuple[float, ...]) -> str:
    """What is wrong with the checkpoints of a folder, of which the first tells 1 and the second, if there is one, one of `values`."""
    try:
        named = {path.name for path in root.iterdir() if ".tmp-" not in path.name}
        if named - {"checkpoint-1", "checkpoint-2"} or {path.name for path in good_checkpoints(root)} != named:
            return f"of {sorted(named)} some are not whole"
        if value_of(root / "checkpoint-1") != 1.0:
            return "the old checkpoint has changed"
        if "checkpoint-2" in named and value_of(root / "checkpoint-2") not in values:
            return "the new checkpoint has other numbers"
    except (AssertionError, CheckpointError, OSError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _killed(action: Callable[[], Any], fatal: int, *, inside: bool = False) -> str:
    """Have a child process die by SIGKILL at its operation number `fatal`; what was wrong with that."""
    child = os.fork()
    if child == 0:

        def die(number: int, operation: str, args: tuple[Any, ...]) -> None:
            if number == fatal:
                if inside and operation == "write":
                    write_half(args)
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            with watched_disk(die):
                action()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return "" if killed else f"the process was not killed at operation {fatal}, but ended with {os.waitstatus_to_exitcode(status)}"


def _goes_on(root: Path) -> str:
    """What is wrong with a run that is started again, cleans up, and saves what is not there yet."""
    remove_stale_staging(root)
    if left := [path.name for path in root.iterdir() if ".tmp-" in path.name]:
        return f"{left[0]} was left"
    if not (root / "checkpoint-2").exists():
        save(root, 2, 200.0, "b")
    return check_whole(root, (2.0, 200.0))


def _failed(root: Path, code: int, first: int, *, lasting: bool, operation: str) -> str:
    """What is wrong with a save on a disk that fails once, or from then on."""

    def fail(number: int, what: str, _args: tuple[Any, ...]) -> None:
        # A full disk still deletes.
        if (number == first or (lasting and number > first)) and what not in ("unlink", "rmdir"):
            raise OSError(code, os.strerror(code))

    try:
        with watched_disk(fail):
            save(root, 2, 2.0)
    except CheckpointError as error:
        said = str(error)
        if os.strerror(code) not in said or len(said.splitlines()) > 8:
            return f"the error does not say why: {said[:100]}"
        return "" if _WAY_OUT[code] in said and "untouched" in said else f"the error says no way out: {said[:200]}"
    # A disk that fails once may fail where nothing is lost by it.
    return "" if not lasting and operation in ("unlink", "mkdir") else "no error was raised"


def _killed_in_a_run(scope: Scope, rank: int, call: int) -> str:
    """What is wrong with a run of two ranks without backups that is killed in its second save, and resumed."""
    fault = Injected(action="kill", place="file", call=call, rank=rank, step=3)
    run = begin_run(scope, "run", _RANKS, "save_steps=2", injected=[fault], survives=False).end()
    if run.status != 1 or not run.when("kill"):
        return f"the run ended with status {run.status}"
    named = {path.name for path in run.output.glob("checkpoint-*") if ".tmp-" not in path.name}
    good = {path.name for path in good_checkpoints(run.output)}
    if named != good or "checkpoint-2" not in good:
        return f"of {sorted(named)} only {sorted(good)} are whole"
    again = begin_run(scope, "again", _RANKS, "resume=true", survives=False, output=run.output).end()
    return "" if again.status == 0 and (run.output / "checkpoint-6").is_dir() else f"resumed, it ended with status {again.status}"
