"""The device itself: its kernels, its arithmetic, its streams, and what watches over its memory."""

from __future__ import annotations

import json
import shutil
import sys

from tests.gpu.bench import Bench, Failed, Figures, Skipped

KERNEL_TESTS = ("tests/kernels/mixlora/test_on_gpu.py", "tests/kernels/experts/test_on_gpu.py")
SANITIZED = "bf16 and odd and sizes"
"""the tests that compute-sanitizer watches, as pytest's -k"""
SANITIZER_SECONDS = 90
"""of each of its tools"""


def kernels(bench: Bench) -> Figures:
    """The Triton kernels, compiled for this GPU, against the formula."""
    bench.real()
    printed = bench.program([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *KERNEL_TESTS], seconds=240)
    last = printed.strip().splitlines()[-1]
    if "passed" not in last:
        raise Failed(f"no test of the kernels ran: {last}")
    return {"tests": last.strip("= ")}


def arithmetic(bench: Bench) -> Figures:
    """Operators of unusual types that the kernels' host code asks for, and the attention of one layer, against the CPU."""
    return _figures(bench.on_device("arithmetic"))


def side_streams(bench: Bench) -> Figures:
    """Exchanges over leaders and in slices read their index tables on another stream, while the caller's stream allocates."""
    figures = _figures(bench.on_device("side_streams"))
    if not bench.mock and not figures["freed_memory_was_used_again"]:
        raise Skipped("torch did not use the memory of a freed tensor again, so nothing was shown")
    return figures


def profile(bench: Bench) -> Figures:
    """Three steps of a MixLoRA model with layers of 8B's size, with packing and without: idle share, kernels a layer, memory."""
    bench.real()
    figures: Figures = {}
    for packing in ("true", "false"):
        found = _figures(bench.on_device("profile", str(bench.folder), packing))
        figures |= {f"{'packed' if packing == 'true' else 'padded'}_{name}": value for name, value in found.items()}
    return figures


def sanitizer(bench: Bench) -> Figures:
    """compute-sanitizer over the layer of odd sizes: no access out of bounds, no race in shared memory, no read before a write."""
    bench.real()
    found = shutil.which("compute-sanitizer")
    if found is None:
        raise Skipped("compute-sanitizer, which CUDA's toolkit has, is not installed")
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", KERNEL_TESTS[0], "-k", SANITIZED]
    done = []
    for tool in ("memcheck", "racecheck", "initcheck"):
        if bench.seconds_left > SANITIZER_SECONDS:
            bench.program([found, "--tool", tool, "--error-exitcode", "9", *pytest], seconds=SANITIZER_SECONDS)
            done.append(tool)
    if not done:
        raise Skipped(f"needs {SANITIZER_SECONDS} seconds, and the time is over")
    return {"tools": ", ".join(done)}


def _figures(printed: str) -> Figures:
    """The last line of what a process has printed."""
    found: Figures = json.loads(printed.strip().splitlines()[-1])
    return found
