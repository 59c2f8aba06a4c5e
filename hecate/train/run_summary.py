"""What a finished run shows of itself: what was learned, what it took, and which expert serves which task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hecate.checkpoint.train_state import TrainState
from hecate.report.events import EvalScore, Evaluation
from hecate.report.pages.heatmap import write_heatmap
from hecate.report.summary import print_summary

Fact = tuple[str, str]
"""A name and a value."""


@dataclass
class Measured:
    """What is shown of a run beside its state."""

    before: dict[str, EvalScore] | None = None
    """The scores of the evaluation before the first step, of this process or of one that it goes on from."""
    last: Evaluation | None = None
    train_seconds: float = 0.0
    tokens: int = 0
    """The number of tokens that this process has trained on."""


def show_summary(folder: Path, state: TrainState, measured: Measured, seconds: float, facts: Sequence[Fact]) -> None:
    """Print the summary, and draw the expert loads of the last evaluation to `folder`. Nothing that befalls the picture is an error.

    Args:
        facts: shown as well.
    """
    speed = f"{measured.tokens / measured.train_seconds:.0f}" if measured.train_seconds else "-"
    shown = [
        ("steps", f"{state.step}" + (f", {state.skipped} skipped" if state.skipped else "")),
        ("tokens trained", f"{state.tokens}"),
        ("training tokens/s", speed),
        ("time", f"{seconds:.0f} s, of which training {measured.train_seconds:.0f} s"),
        *facts,
    ]
    if measured.last and any(measured.last.loads.values()):
        shown.append(("expert loads", _drawn(folder / "expert_load.png", measured.last)))
    print_summary(measured.before, measured.last.scores if measured.last else {}, shown)


def _drawn(path: Path, evaluation: Evaluation) -> str:
    """Where the picture is, or why there is none, in one line."""
    try:
        write_heatmap(path, _shares(evaluation), "Share of each task's tokens by layer and expert")
    except Exception as error:  # noqa: BLE001 - the run is done, and all else that it leaves is there
        return f"not drawn: {'; '.join(line.strip() for line in str(error).splitlines()) or type(error).__name__}"
    return str(path)


def _shares(evaluation: Evaluation) -> dict[str, list[list[float]]]:
    """Per source and unit, each expert's share of the assignments."""
    return {
        source: [[count / max(sum(counts), 1) for count in counts] for _, counts in sorted(units.items())]
        for source, units in evaluation.loads.items()
    }
