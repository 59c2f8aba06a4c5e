"""What hecate says passes through `logging`: the command shows it, and a program that uses hecate as a library redirects or silences it."""

from __future__ import annotations

import ast
import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from hecate.io.terminal import PROGRESS, show_messages, shows_messages
from hecate.report.events import EvalScore
from hecate.report.progress import Progress, StepLine
from hecate.report.summary import print_summary
from tests.rooms import ALL_SOURCES, ROOT, nodes

RESULTS = {
    "hecate/cli/": "what a verb was asked for",
    "hecate/apps/answers/inference.py": "the figures of `hecate eval`",
    "hecate/io/terminal.py": "prints for all others",
    "launch/forked_rank.py": "a program of the standard library alone",
    "launch/profile/rank_main.py": "the file of `hecate profile`",
    "launch/ray_job/submit.py": "the output of a job elsewhere",
    "benchmarks/": "programs of the checkout",
}
"""where something is printed that is not logged, and what it is"""
STEP = StepLine(1, 0.1, 2.0, 0.1, 1e-4, 100.0, 1.5, 2.0, 0.5)


@pytest.fixture
def as_a_library() -> None:
    """The logger of a process in which no program of hecate has begun; `_messages` of the tests puts back what was."""
    logger = logging.getLogger("hecate")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


def _say_all() -> None:
    with Progress(2, 0) as progress:
        progress.step(STEP)
        progress.note("saved")
    print_summary(None, {"dates": EvalScore(samples=2, loss=1.0, accuracy=None)}, [("adapter", "runs/first/adapter")])
    logging.getLogger("hecate.launch").info("hecate: a node has joined")
    logging.getLogger("hecate.data.encode").warning("%d samples skipped", 3)


def test_the_command_shows_progress_on_one_stream_and_all_else_on_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    _say_all()
    shown = capsys.readouterr()
    assert shown.out.startswith("step 1/2  epoch 0.10  loss 2.000")
    assert "\nsaved\n" in shown.out
    assert shown.out.endswith("adapter  runs/first/adapter\n")
    assert shown.err == "hecate: a node has joined\n3 samples skipped\n"


@pytest.mark.usefixtures("as_a_library")
def test_a_library_is_silent_but_for_warnings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    _say_all()
    assert not shows_messages()
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("as_a_library")
def test_a_library_user_redirects_and_silences(capsys: pytest.CaptureFixture[str]) -> None:
    logger, kept = logging.getLogger("hecate"), io.StringIO()
    logger.addHandler(logging.StreamHandler(kept))
    logger.setLevel(logging.INFO)
    _say_all()
    assert [line.split("  ")[0] for line in kept.getvalue().splitlines()[:2]] == ["step 1/2", "saved"]
    assert "a node has joined" in kept.getvalue()
    assert "\x1b" not in kept.getvalue()
    before = kept.getvalue()
    logger.setLevel(logging.CRITICAL)
    _say_all()
    assert kept.getvalue() == before
    assert capsys.readouterr() == ("", "")


def test_messages_are_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    show_messages()
    show_messages()
    PROGRESS.info("once")
    assert capsys.readouterr().out == "once\n"


@pytest.mark.parametrize("program", ["hecate", "hecate.train.rank_main"])
def test_programs_show_them(program: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", program, *(["train"] if program == "hecate" else []), str(tmp_path / "none.yaml")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("hecate: ")


def test_nothing_else_prints() -> None:
    """If this fails: say it by `logging.getLogger(__name__)`, or by `hecate.io.terminal.PROGRESS`."""
    found = {
        f"{name}:{node.lineno}"
        for path in ALL_SOURCES
        if not (name := str(path.relative_to(ROOT))).startswith(tuple(RESULTS))
        for node in nodes(path)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "show_text", "sys.stdout.write", "sys.stderr.write")
    }
    assert not found


def test_every_logger_is_below_the_packages() -> None:
    """A program's own `__name__` is `__main__`, whose logger nobody has asked for."""
    mains = {path for path in ALL_SOURCES if any(isinstance(node, ast.Constant) and node.value == "__main__" for node in nodes(path))}
    assert not [path for path in mains if "logging.getLogger(__name__)" in path.read_text(encoding="utf-8")]
