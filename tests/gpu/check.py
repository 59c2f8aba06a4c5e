"""The first ten minutes with a card, as one command: does hecate work on this machine's GPUs?

    python -m tests.gpu.check [--json FILE] [--only NAME,...] [--mock]

Prints a table of checks (docs/use/gpu.md says what each shows) and why any of them failed or was skipped; needs no network. A check whose
packages are not installed is skipped, with their names. With `--mock`
the checks that can do without a card run on the mock device of `tests/mock_cuda`. Exit status 0: nothing failed; 1: something failed;
2: there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from tests.gpu import device_checks, several_gpus, training_checks
from tests.gpu.bench import Bench, Check, Failed, Figures, Skipped, make_bench
from tests.mock_cuda.build import why_not

SECONDS = 600
"""that all checks together may take"""
LEAST_SECONDS = 30
"""with fewer left, no check begins"""
MOCK_GPUS, MOCK_SECONDS = 2, 3600
NO_GPU = 2
"""exit status"""
_MISSING = re.compile(r"ModuleNotFoundError: No module named '(?!(?:hecate|benchmarks|testing|tests)\b)([\w.]+)'")
"""what a process of a check ends with where a package is not installed"""
CHECKS: tuple[Check, ...] = (
    device_checks.arithmetic,
    device_checks.kernels,
    training_checks.float64_losses,
    training_checks.float32_losses,
    training_checks.bfloat16_losses,
    training_checks.command_line,
    training_checks.host_waits,
    device_checks.side_streams,
    training_checks.freed_replicas,
    training_checks.save_and_resume,
    several_gpus.two_ranks_on_one_gpu,
    several_gpus.uneven_exchanges,
    several_gpus.two_gpus,
    several_gpus.killed_rank,
    device_checks.profile,
    device_checks.sanitizer,
)
"""what tells most comes first: later ones are left out when the time is over"""


@dataclass(frozen=True)
class Row:
    """What came of a check."""

    name: str
    verdict: Literal["passed", "failed", "skipped"]
    seconds: float
    reason: str = ""
    """of a failure or of a skip"""
    figures: Figures = field(default_factory=dict)


def row_of(check: Check, bench: Bench) -> Row:
    """Make a check, whatever it does."""
    name, began = check.__name__, time.monotonic()
    try:
        if bench.seconds_left < LEAST_SECONDS:
            raise Skipped(f"the {bench.seconds / 60:.0f} minutes were over")
        figures = check(bench)
    except Skipped as skipped:
        return Row(name, "skipped", time.monotonic() - began, str(skipped))
    except (Failed, AssertionError, ImportError, OSError, ValueError, LookupError, RuntimeError) as error:
        text = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
        if (missing := _MISSING.search(text)) is not None:
            return Row(name, "skipped", time.monotonic() - began, f"the package {missing[1]} is not installed")
        return Row(name, "failed", time.monotonic() - began, text)
    return Row(name, "passed", time.monotonic() - began, figures=figures)


def table_of(rows: Sequence[Row]) -> str:
    """One line a check: verdict, seconds, name, and its figures or the first line of its reason."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        figures = ", ".join(f"{key} {_short(value)}" for key, value in row.figures.items())
        said = row.reason.splitlines()[0] if row.reason else figures
        lines.append(f"{row.verdict:<7}  {row.seconds:>5.0f} s  {row.name:<{width}}  {said}")
    return "\n".join(lines)


def _short(value: float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else value[:40]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--only", help="names of checks, with commas between them")
    parser.add_argument("--mock", action="store_true", help="on mock GPUs")
    options = parser.parse_args(arguments)
    named = {check.__name__: check for check in CHECKS}
    names = options.only.split(",") if options.only else list(named)
    if unknown := [name for name in names if name not in named]:
        parser.error(f"--only: there is no check {unknown[0]}; there are {', '.join(named)}")
    gpus = MOCK_GPUS if options.mock else _gpus()
    reason = why_not() if options.mock else _no_gpu(gpus)
    if reason:
        print(f"gpu-check: {reason}", file=sys.stderr)
        return NO_GPU
    rows = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        bench = make_bench(Path(folder), mock=options.mock, gpus=gpus, seconds=MOCK_SECONDS if options.mock else SECONDS)
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows.append(row_of(named[name], bench))
            print(table_of(rows[-1:]), file=sys.stderr, flush=True)
    print(table_of(rows))
    for row in rows:
        if row.verdict == "failed":
            print(f"\n{row.name} failed:\n{row.reason}")
    if options.json:
        found = {"machine": machine(gpus) | {"mock": options.mock}, "checks": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return int(any(row.verdict == "failed" for row in rows))


def machine(gpus: int) -> dict[str, Any]:
    """What a report must say of a machine: its cards, and the versions of what drives them."""
    import torch

    cards = [torch.cuda.get_device_properties(number) for number in range(gpus)] if torch.cuda.is_available() else []
    return {
        "gpus": [f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}" for card in cards],
        "cuda": torch.version.cuda,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # with its build, such as +cu132, which the name of its wheel may lack
            **{name: metadata.version(name) for name in ("triton", "transformers")},
        },
    }


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _no_gpu(gpus: int) -> str | None:
    """Why nothing can be checked; None: there is a GPU."""
    import torch

    if gpus:
        return None
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"torch {torch.__version__}, {built}, finds no CUDA GPU on this machine, so there is nothing to check."


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main(sys.argv[1:]))
