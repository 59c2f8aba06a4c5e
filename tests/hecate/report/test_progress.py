import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from hecate.report.events import EvalScore
from hecate.report.progress import ETA_WINDOW, Progress, StepLine, duration_text, epochs_text, eval_text, step_text

LINE = StepLine(
    step=12,
    epoch=0.4,
    loss=1.2341,
    aux_loss=2.006,
    learning_rate=1e-3,
    tokens_per_s=812.4,
    imbalance=1.03,
    static_imbalance=1.4,
    step_seconds=2.0,
)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen_text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue())


@contextlib.contextmanager
def on_terminal(term: str = "xterm-256color") -> Iterator[Terminal]:
    """This is no fixture, because pytest puts its own sys.stdout back between a test's fixtures and the test."""
    screen = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        patch.setenv("TERM", term)
        patch.setenv("COLUMNS", "80")
        patch.setenv("LINES", "24")
        patch.setattr(sys, "stdout", screen)
        yield screen


def test_the_plain_line() -> None:
    assert (
        step_text(LINE, 60, 92.0)
        == "step 12/60  epoch 0.40  loss 1.234  aux 2.01  lr 1.0e-03  tok/s 812  imbalance 1.03 (static EP 1.40)  eta 1m32s"
    )


def test_a_skipped_step_says_so() -> None:
    text = step_text(replace(LINE, skipped="a reason", loss=float("nan")), 60, 92.0)
    assert "loss nan" in text
    assert text.endswith("eta 1m32s  skipped: a reason")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (-1, "0s"), (59.4, "59s"), (59.6, "1m00s"), (92, "1m32s"), (3599.6, "1h00m"), (7500, "2h05m"), (273600, "3d04h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("epochs", "text"), [(2, "2.00"), (12.345, "12.35"), (0.1, "0.10"), (0.0999, "0.1"), (0.00314, "0.0031"), (0, "0")]
)
def test_epochs_in_words(epochs: float, text: str) -> None:
    assert epochs_text(epochs) == text


def test_the_eval_line() -> None:
    scores = {"gcd": EvalScore(0.9904, 0.4375, 64), "text": EvalScore(2.0, None, 3)}
    assert eval_text(20, scores) == "eval at step 20, loss (exact accuracy):  gcd 0.990 (0.44)  text 2.000"


def test_plain_lines_when_not_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(60, 0) as progress:
        progress.step(LINE)
        progress.note("saved [checkpoint-12]")
        progress.evaluated(12, {"gcd": EvalScore(1.0, None, 4)})
    assert capsys.readouterr().out.splitlines() == [
        "step 12/60  epoch 0.40  loss 1.234  aux 2.01  lr 1.0e-03  tok/s 812  imbalance 1.03 (static EP 1.40)  eta 1m36s",
        "saved [checkpoint-12]",
        "eval at step 12, loss:  gcd 1.000",
    ]


def test_eta_is_the_mean_of_recent_steps_times_those_left(capsys: pytest.CaptureFixture[str]) -> None:
    etas = []
    with Progress(100, 10) as progress:
        for number, seconds in enumerate([30.0, 2.0, 4.0] + [1.0] * ETA_WINDOW, start=11):
            progress.step(replace(LINE, step=number, step_seconds=seconds))
            etas.append(capsys.readouterr().out.strip().rpartition("eta ")[2])
    # 89 · 30 s; 88 · 16 s; 87 · 12 s; the slow first steps are forgotten at last: 67 · 1 s.
    assert [*etas[:3], etas[-1]] == ["44m30s", "23m28s", "17m24s", "1m07s"]


def test_each_plain_line_is_flushed() -> None:
    class Pipe(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    pipe = Pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        progress = Progress(60, 0)
        progress.step(LINE)
        assert "step 12/60" in pipe.flushed
        progress.note("saved")
        assert pipe.flushed.endswith("saved\n")


def test_a_panel_on_a_terminal() -> None:
    with on_terminal() as terminal, Progress(60, 5) as progress:
        assert "step 5/60" in terminal.screen_text()
        assert "eta" not in terminal.screen_text()
        progress.evaluated(5, {"gcd": EvalScore(4.6, 0.0, 64)})
        progress.note("saved [bold]checkpoint-5[/bold]")
        progress.step(LINE)
        shown = terminal.screen_text().rpartition("hecate train")[2]
    for part in (
        "step 12/60",
        "epoch 0.40",
        "eta 1m36s",
        "loss 1.234",
        "aux 2.01",
        "tok/s 812",
        "imbalance 1.03",
        "eval at step 5",
        "gcd 4.600 (0.00)",
    ):
        assert part in shown, part
    assert "saved [bold]checkpoint-5[/bold]\n" in terminal.screen_text()
    assert all(len(line) <= 80 for line in re.split("[\r\n]", terminal.screen_text()))


def test_the_panel_tells_of_a_skipped_step_until_the_next() -> None:
    with on_terminal() as terminal, Progress(60, 0) as progress:
        progress.step(replace(LINE, skipped="a reason"))
        assert "skipped" in terminal.screen_text()
        progress.step(replace(LINE, step=13))
        assert "skipped" not in terminal.screen_text().rpartition("hecate train")[2]


def train_and_fail() -> None:
    with Progress(60, 0):
        raise RuntimeError


def test_the_terminal_is_given_back_after_an_error() -> None:
    hide, show = "\x1b[?25l", "\x1b[?25h"
    with on_terminal() as terminal:
        with pytest.raises(RuntimeError):
            train_and_fail()
        assert terminal.getvalue().rindex(show) > terminal.getvalue().rindex(hide)
        assert sys.stdout is terminal


def test_a_dumb_terminal_gets_plain_lines() -> None:
    with on_terminal("dumb") as terminal, Progress(60, 0) as progress:
        progress.step(LINE)
    assert terminal.getvalue() == step_text(LINE, 60, 96.0) + "\n"


def test_rich_is_not_imported_without_a_terminal() -> None:
    code = (
        "import sys; from hecate.report.progress import Progress; from hecate.io.terminal import show_messages; show_messages()\n"
        "with Progress(2, 0) as progress: progress.note('x')\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('rich', 'torch')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "x\n[]\n"
