"""Stands in for `hecate.parallel.plan.compile_loops` in tests: it takes its time, and leaves the mark of one that is done."""

import time

from hecate.parallel.loops import jit


@jit.loop
def double(x: float) -> float:
    return 2.0 * x


@jit.entry
def twice(x: float) -> float:
    return double(x) + 0.5


if __name__ == "__main__":
    from tests.parallel import slow_compiler

    time.sleep(1.5)
    with jit.compiling_in_this_process():
        slow_compiler.twice(1.0)
    jit.all_is_compiled()
