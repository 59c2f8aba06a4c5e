"""A program that trains by `hecate.api.train`, under torchrun: CONFIG OUTPUT. What it has seen is in OUTPUT.RANK.json then."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from torch import Tensor

from hecate.api import Callback, Result, train
from hecate.report.events import StepEvent
from tests.hecate.plain_losses import focal


class StopAfterFour(Callback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_step(self, event: StepEvent) -> str | None:  # type: ignore[override]
        self.seen.append(f"step {event.step}")
        return "stop" if event.step == 4 else None

    def on_save(self, step: int, folder: Path) -> None:
        self.seen.append(f"save {step}")

    def on_end(self, result: Result) -> None:
        self.seen.append(f"end {result.step}")


def loss(logits_NV: Tensor, label_N: Tensor) -> Tensor:
    return focal(logits_NV, label_N)


def main() -> None:
    config, output = sys.argv[1:]
    keys = [f"output_dir={output}", "model.dtype=float64", "eval.generate=false"]
    callback = StopAfterFour()
    stopped = train(config, [*keys, "eval.on_start=false"], callbacks=[callback], loss=loss)
    ended = train(config, [*keys, "eval.on_start=false", "resume=true"], loss=loss)
    found = {
        "seen": callback.seen,
        "finished": [stopped.finished, ended.finished],
        "losses": [stopped.losses[step] for step in (1, 2, 3, 4)] + [ended.losses[step] for step in (5, 6)],
        "evaluated": {step: {name: score.loss for name, score in scores.items()} for step, scores in ended.evaluations.items()},
        "has_model": ended.model is not None,
        "output": str(ended.output),
    }
    Path(f"{output}.{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
