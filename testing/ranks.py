"""Run a function on several gloo ranks: processes of one thread each, from a fork server with torch loaded, that meet in a file store."""

from __future__ import annotations

import faulthandler
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from testing.namespaces import enter

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["testing.preloaded"])


def fork_server_process(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """A process, not yet started, that calls an importable function; see `testing.preloaded`."""
    return _context.Process(target=function, args=arguments)


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0, namespaces: Sequence[str] | None = None
) -> list[Any]:
    """Call `function(rank, world_size, *arguments)` on every rank, with a default gloo group, and return the results by rank.

    Raises the earliest failure of any rank with its traceback. Ranks that have not ended after `timeout` seconds are killed and reported,
    each with what its threads did shortly before.

    Args:
        function: an importable function, defined at the top of a module.
        namespaces: the network namespace of each rank (see `testing.namespaces`); None: this process's.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = _context.Pipe()
            namespace = None if namespaces is None else namespaces[rank]
            process = _context.Process(
                target=_rank_main, args=(rank, world_size, folder, timeout, namespace, sender, function, arguments), daemon=True
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, processes, timeout, Path(folder))
        finally:
            for process in processes:
                process.kill()
                process.join()


@contextmanager
def counted_all_to_alls() -> Iterator[list[None]]:
    """Yield a list that gets an entry for each all-to-all that this rank starts in the block."""
    import torch.distributed as dist

    real: Any = dist.all_to_all_single
    calls: list[None] = []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        return real(*arguments, **named)

    dist.all_to_all_single = counted
    try:
        yield calls
    finally:
        dist.all_to_all_single = real


def _collect(pipes: list[Connection], processes: list[Any], timeout: float, folder: Path) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[int, int, str]] = []
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            if not failures:
                stacks = "".join(
                    f"\nrank {rank}:\n{path.read_text()}" for rank in sorted(waiting.values()) if (path := _stacks(folder, rank)).exists()
                )
                raise TimeoutError(f"ranks {sorted(waiting.values())} of {len(pipes)} had not ended after {timeout:.0f} s; killed{stacks}")
            break
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[arg-type]
            try:
                kind, when, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join(timeout=5.0)
                # This failure counts as the first one: a process that dies makes the others fail, and their reports may arrive earlier.
                kind, when, value = "failed", 0, f"the process died without a word (exit code {processes[rank].exitcode})"
            if kind == "done":
                results[rank] = value
            else:
                failures.append((when, rank, value))
                # The other ranks may have caused this failure: wait a moment for their reports.
                deadline = min(deadline, time.monotonic() + 2.0)
    if failures:
        _, rank, text = min(failures)
        others = "".join(f"\nthen rank {other}: {said.strip().splitlines()[-1]}" for _, other, said in sorted(failures)[1:])
        raise AssertionError(f"rank {rank} of {len(pipes)} failed first:\n{text}{others}")
    return [results[rank] for rank in range(len(pipes))]


def _stacks(folder: Path, rank: int) -> Path:
    """The file with what each thread of a rank did when nine tenths of its time had passed."""
    return folder / f"stacks-{rank}"


def _rank_main(
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
    namespace: str | None,
    sender: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    stacks = _stacks(Path(folder), rank).open("w")
    faulthandler.dump_traceback_later(0.9 * timeout, file=stacks)
    try:
        if namespace is not None:
            enter(namespace)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        dist.barrier()  # a rank whose function leaves the group at once would break the connections that others are still making
        value = function(rank, world_size, *arguments)
        sender.send(("done", time.monotonic_ns(), value))
        # `new_group` has no barrier at its end, so a rank that exits now would break groups that other ranks are still creating.
        sender.poll(None)
    except BaseException:  # noqa: BLE001 - the parent raises it
        sender.send(("failed", time.monotonic_ns(), traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
