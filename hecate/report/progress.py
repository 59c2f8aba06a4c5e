"""What a person sees while a run goes on: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from hecate.io.terminal import PROGRESS, new_console, shows_messages
from hecate.report.events import EvalScore

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

ETA_WINDOW = 20
"""Steps whose mean duration predicts the rest."""


@dataclass(frozen=True)
class StepLine:
    """What is shown of one optimizer step."""

    step: int
    """steps done, this one among them"""
    epoch: float
    """how often they have gone through the data"""
    loss: float
    aux_loss: float | None
    """the load-balancing loss; None, as both imbalances: there are no experts"""
    learning_rate: float
    tokens_per_s: float
    imbalance: float | None
    """largest over mean load of the ranks"""
    static_imbalance: float | None
    """what it would have been under static expert parallelism"""
    step_seconds: float
    skipped: str = ""
    """why nothing was changed; empty: the step was taken"""


def duration_text(seconds: float) -> str:
    """The two largest units: 45s, 1m32s, 2h05m, 3d04h."""
    whole = max(0, round(seconds))
    for unit, large, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= unit:
            return f"{whole // unit}{large}{whole % unit // smaller:02d}{small}"
    return f"{whole}s"


def epochs_text(epochs: float) -> str:
    """2.00, or two digits of less than a tenth: 0.0031."""
    return f"{epochs:.2f}" if epochs >= 0.1 else f"{epochs:.2g}"


def step_text(values: StepLine, max_steps: int, eta: float) -> str:
    """One plain line; `eta` in seconds."""
    parts = [
        f"step {values.step}/{max_steps}",
        *(f"{label} {text}" for label, text in _figures(values)),
        f"eta {duration_text(eta)}",
        *([f"skipped: {values.skipped}"] if values.skipped else []),
    ]
    return "  ".join(parts)


def eval_text(step: int, scores: Mapping[str, EvalScore]) -> str:
    """One plain line: each source's loss, and its accuracy if there is one."""
    return "  ".join([f"eval at step {step}, {_measures(scores)}:", *(_score_text(name, score) for name, score in scores.items())])


def _measures(scores: Mapping[str, EvalScore]) -> str:
    return "loss" if all(score.accuracy is None for score in scores.values()) else "loss (exact accuracy)"


class Progress:
    """Shows each step as it ends. One rank, 0, makes one; a context manager.

    Other messages meanwhile belong to `sys.stderr` as it stands when they are logged, which the panel diverts above itself.
    """

    def __init__(self, max_steps: int, start_step: int) -> None:
        """`start_step`: steps that were done before this run, 0 unless it resumes."""
        self._max_steps = max_steps
        self._done = start_step
        self._last: StepLine | None = None
        self._seconds: deque[float] = deque(maxlen=ETA_WINDOW)
        self._eval: tuple[int, dict[str, EvalScore]] | None = None
        self._live = self._start_live() if _on_terminal() else None

    def step(self, values: StepLine) -> None:
        """Show a step that has ended. Steps may be left out."""
        self._done, self._last = values.step, values
        self._seconds.append(values.step_seconds)
        self._show(step_text(values, self._max_steps, self._eta()))

    def evaluated(self, step: int, scores: Mapping[str, EvalScore]) -> None:
        """Show an evaluation, by source."""
        self._eval = step, dict(scores)
        self._show(eval_text(step, scores))

    def note(self, text: str) -> None:
        """Show a line that stays, above the panel if there is one."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            PROGRESS.info(text)

    def close(self) -> None:
        """Leave the last panel on the screen and give the terminal back; closing twice is fine."""
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _eta(self) -> float:
        """Seconds, evaluations and saves not counted."""
        return (self._max_steps - self._done) * sum(self._seconds) / len(self._seconds)

    def _show(self, plain: str) -> None:
        if self._live is not None:
            self._live.update(self._panel(), refresh=True)
        else:
            PROGRESS.info(plain)

    def _start_live(self) -> Live:
        from rich.live import Live

        # Drawn by step() alone: a refreshing thread would compete with the training for a core.
        live = Live(self._panel(), console=new_console(), auto_refresh=False)
        live.start(refresh=True)
        return live

    def _panel(self) -> RenderableType:
        from rich.columns import Columns
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        eta = f"eta {duration_text(self._eta())}" if self._seconds else "the first step is under way"
        bar.add_row(f"step {self._done}/{self._max_steps}", ProgressBar(total=self._max_steps, completed=self._done), eta)
        rows: list[RenderableType] = [bar]
        if self._last is not None:
            figures = [Text.assemble((f"{label} ", "dim"), (text, "bold")) for label, text in _figures(self._last)]
            rows.append(Columns(figures, padding=(0, 3)))
            if self._last.skipped:
                rows.append(Text(f"skipped: {self._last.skipped}", style="yellow"))
        if self._eval is not None:
            step, scores = self._eval
            rows.append(Text(f"eval at step {step}: {_measures(scores)}", style="dim"))
            rows.append(Columns([Text(_score_text(name, score)) for name, score in scores.items()], padding=(0, 3)))
        return Panel(Group(*rows), title="hecate train", title_align="left", border_style="dim")


def _on_terminal() -> bool:
    return shows_messages() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _figures(values: StepLine) -> list[tuple[str, str]]:
    aux, imbalance, static = values.aux_loss, values.imbalance, values.static_imbalance
    return [
        ("epoch", epochs_text(values.epoch)),
        ("loss", f"{values.loss:.3f}"),
        *([] if aux is None else [("aux", f"{aux:.2f}")]),
        ("lr", f"{values.learning_rate:.1e}"),
        ("tok/s", f"{values.tokens_per_s:.0f}"),
        *([] if imbalance is None else [("imbalance", f"{imbalance:.2f} (static EP {static:.2f})")]),
    ]


def _score_text(name: str, score: EvalScore) -> str:
    accuracy = "" if score.accuracy is None else f" ({score.accuracy:.2f})"
    return f"{name} {score.loss:.3f}{accuracy}"
