"""`make gpu-check` without a card: its verdicts and its arithmetic, and all of it that can run on mock GPUs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import CodeType

import pytest
import torch

from tests.gpu import check, profile, training_checks, waits
from tests.gpu.bench import Bench, Failed, Figures, Skipped
from tests.host_waits import ROOT
from tests.mock_cuda.build import why_not

CALL = "\n\ndef act(function):\n    return function()\n"


def passes(bench: Bench) -> Figures:
    return {"share": 0.25, "kernel": "flash"}


def fails(bench: Bench) -> Figures:
    raise Failed("losses differ\nby much")


def breaks(bench: Bench) -> Figures:
    raise RuntimeError("no such device")


def lacks(bench: Bench) -> Figures:
    raise Failed("exit status 1: python -m pytest\n  import gguf\nModuleNotFoundError: No module named 'gguf'\n")


def lacks_ours(bench: Bench) -> Figures:
    import tests.gpu.what_is_not_there  # type: ignore[import-not-found]  # noqa: F401

    return {}


def skips(bench: Bench) -> Figures:
    raise Skipped("needs 2 GPUs, and there is 1")


def test_each_check_has_a_verdict_a_reason_and_figures(tmp_path: Path) -> None:
    bench = Bench(tmp_path, mock=True, gpus=1, seconds=60)
    rows = [check.row_of(one, bench) for one in (passes, fails, breaks, skips, lacks, lacks_ours)]
    assert [(row.verdict, row.reason) for row in rows] == [
        ("passed", ""),
        ("failed", "losses differ\nby much"),
        ("failed", "RuntimeError: no such device"),
        ("skipped", "needs 2 GPUs, and there is 1"),
        ("skipped", "the package gguf is not installed"),
        ("failed", "ModuleNotFoundError: No module named 'tests.gpu.what_is_not_there'"),
    ]
    assert check.row_of(passes, Bench(tmp_path, mock=True, gpus=1, seconds=0)).verdict == "skipped", "its time was over"
    lines = check.table_of(rows).splitlines()
    assert len(lines) == 6
    assert lines[0].endswith("share 0.25, kernel flash")
    assert lines[1].endswith("losses differ")


@pytest.mark.parametrize(("checks", "status"), [((passes, skips), 0), ((passes, fails), 1)])
def test_exit_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checks: tuple[check.Check, ...], status: int) -> None:
    monkeypatch.setattr(check, "CHECKS", checks)
    monkeypatch.setattr(check, "_gpus", lambda: 1)
    monkeypatch.setattr(check, "make_bench", lambda folder, **facts: Bench(folder, **facts))
    assert check.main(["--json", str(tmp_path / "found.json")]) == status
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert [row["name"] for row in found["checks"]] == [one.__name__ for one in checks]


def test_without_a_gpu_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main([]) == check.NO_GPU
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert "finds no CUDA GPU on this machine" in err


def test_idle_share_counts_what_runs_at_once_only_once() -> None:
    kernels = [profile.Kernel("a", 0, 10), profile.Kernel("b", 5, 12), profile.Kernel("a", 20, 30), profile.Kernel("b", 21, 22)]
    assert profile.idle_share(kernels) == pytest.approx(8 / 30)
    assert profile.longest(kernels, 1) == "a 0.02"


def test_a_loss_that_is_no_number_is_no_small_difference() -> None:
    good, off = [(2.0, 1.0, 4.0), (1.0, 1.0, 4.0)], [(2.0, 1.0, 4.0), (1.5, 1.0, 5.0)]
    assert training_checks.largest_difference(off, good, (0, 1)) == pytest.approx(0.5)
    assert training_checks.largest_difference(off, good, (2,)) == pytest.approx(0.25)
    assert math.isnan(training_checks.largest_difference([good[0], (math.nan, 1.0, 4.0)], good, (0, 1)))


def code_of(path: str) -> CodeType:
    """A function `act` that calls its argument, as if it stood in that file of the checkout."""
    return compile(CALL, str(ROOT / path), "exec")


def test_waits_are_counted_by_the_projects_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: None)
    names: dict = {}
    exec(code_of("hecate/optim/some.py"), names)
    with waits.watching() as found:
        for _ in range(2):
            names["act"](lambda: warnings.warn(f"{waits.SYNCHRONIZES} (Triggered internally)", stacklevel=2))
        names["act"](lambda: warnings.warn("something else", stacklevel=2))
        names["act"](lambda: torch.cuda.Event.synchronize(None))
    assert found == Counter({"hecate/optim/some.py:act": 3})
    assert modes == ["warn", "default"]


ON_MOCK = {"arithmetic", "float64_losses", "float32_losses", "bfloat16_losses", "host_waits", "side_streams", "freed_replicas"}
MORE_ON_MOCK = {"save_and_resume", "uneven_exchanges", "two_gpus"}


@pytest.mark.slow
def test_every_check_that_needs_no_card_passes_on_mock_gpus(tmp_path: Path) -> None:
    if why_not() is not None:
        pytest.skip(f"no mock CUDA device: {why_not()}")
    command = [sys.executable, "-m", "tests.gpu.check", "--mock", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    verdicts = {row["name"]: row["verdict"] for row in json.loads((tmp_path / "found.json").read_text())["checks"]}
    wanted = {one.__name__: "passed" if one.__name__ in ON_MOCK | MORE_ON_MOCK else "skipped" for one in check.CHECKS}
    assert verdicts == wanted
