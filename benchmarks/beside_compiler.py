"""Compare steps of a small training beside the compiler of the planner's loops with steps while the compiler is stopped.

    python -m benchmarks.beside_compiler [--quick] [--json FILE]

Two gloo ranks of one thread each train, whose own planner has its machine code already. The compiler is the one that a run starts
(`hecate.parallel.loops.jit`), at idle priority, with an empty cache; it is stopped and continued by signals, so that steps beside it and
without it take turns. It begins anew when it has ended. On two cores it gets what the ranks leave.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.paired_steps import WARM_UP, on_all_ranks, training
from benchmarks.ratios import Budget, of_times, until_narrow
from benchmarks.report import arguments, finish
from benchmarks.small_run import make_folder
from hecate.parallel.loops import jit
from testing.ranks import run_ranks

RANKS = 2
ENOUGH = Budget(half_width=0.01, rounds=400)
_COMPILES = "import time; from hecate.parallel.loops import jit\nwhile jit.start_compiling() == 'compiling': time.sleep(0.2)"


class Compiler:
    """A process that has the loops compiled into a folder of its own, again and again; it can be stopped in between."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.started = 0
        self._process: subprocess.Popen[bytes] | None = None

    def go_on(self) -> None:
        if self._process is None or self._process.poll() is not None:
            self.started += 1
            env = os.environ | {"NUMBA_CACHE_DIR": str(self.folder / str(self.started))}
            # A group of its own, for signals, in the same session: Linux shares the processor among sessions before it sees priorities.
            self._process = subprocess.Popen([sys.executable, "-c", _COMPILES], env=env, process_group=0)
        os.killpg(self._process.pid, signal.SIGCONT)

    def stop(self, kind: signal.Signals = signal.SIGSTOP) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, kind)


def steps_in_turn(rank: int, world: int, folder: str, budget: Budget) -> tuple[dict[str, list[float]], int]:
    """The seconds of steps of each side, on the slowest rank, and how often the compiler was started."""
    jit.compile_and_wait()
    run = training(rank, world, folder, "beside", {"micro_batch_size": 6})
    with tempfile.TemporaryDirectory() as caches:
        compiler = Compiler(caches)

        def step(side: str) -> float:
            if rank == 0:
                (compiler.go_on if side == "beside" else compiler.stop)()
            return on_all_ranks(run.train_one)[0]

        for _ in range(WARM_UP):
            step("alone")
        try:
            return until_narrow(step, ["beside", "alone"], [("beside", "alone")], budget), compiler.started
        finally:
            compiler.stop(signal.SIGKILL)


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    budget = Budget(ENOUGH.half_width, 4) if options.quick else ENOUGH
    with tempfile.TemporaryDirectory() as base:
        folder = str(make_folder(Path(base)).parent)
        seconds, started = run_ranks(RANKS, steps_in_turn, folder, budget, timeout=3600)[0]
    row = {"clock": seconds, "compilers_started": started, **{f"{side}_s": median(taken) for side, taken in seconds.items()}}
    finish("beside_compiler", [row], {"slowdown": of_times(seconds["beside"], seconds["alone"], budget)}, options.json)


if __name__ == "__main__":
    main()
