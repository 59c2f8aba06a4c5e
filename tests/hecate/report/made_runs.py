"""Folders as runs leave them, without training: records of steps with loads that drift, evaluations and events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hecate.parallel.plan.sharding import ReshardGain
from hecate.parallel.values.static_ep_imbalance import static_ep_imbalance
from hecate.parallel.values.units import Unit
from hecate.report.events import EvalScore, Move, Resharding, StepEvent, StepResult
from hecate.report.metrics import MetricsWriter, Record, eval_record, event_record, reshard_record, step_record

FFNS = (Unit(0), Unit(1))
LINEARS = tuple(Unit(layer, f"self_attn.{place}_proj") for layer in range(32) for place in "qkvo")


def a_step(step: int, *, units: Sequence[Unit] = FFNS, experts: int = 4, ranks: int = 2) -> StepEvent:
    random = np.random.default_rng(step)
    loads = {unit: random.integers(1, 9, size=(experts, ranks)) for unit in units}
    for unit in units:
        loads[unit][0] *= 1 + 4 * (unit.layer == 1)  # one expert of the second layer is popular
    result = StepResult(3.0 / step, 2.0, 0.5, False, loads, 5000, 2000, tuple(700_000 + 1000 * rank for rank in range(ranks)))
    return StepEvent(
        step=step,
        epoch=step / 7.5,
        epoch_samples=300,
        result=result,
        tokens=512,
        seconds=0.5,
        learning_rate=1e-3,
        imbalance=1.02,
        calibrations=0,
        plan_modes={},
        static_imbalance=static_ep_imbalance(loads, ranks),
        copies=6,
        new_copies=int(step == 1),
        parts={"plan": 0.05, "forward": 0.2, "backward": 0.15, "gradients": 0.05},
    )


def write_run(folder: Path, records: Sequence[Record], config: dict[str, Any] | None = None) -> Path:
    """Write the records, and a configuration of which the report's header is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        for record in records:
            writer.write(record)
    (folder / "config.yaml").write_text(json.dumps({"max_steps": 12, "fssdp": {"policy": "auto"}} | (config or {})), encoding="utf-8")
    return folder


def an_eval(step: int, loss: float) -> Record:
    return eval_record(step, {"sum": EvalScore(loss, 0.5, 8), "count": EvalScore(loss + 1, None, 8)})


def usual_records(steps: int = 12) -> list[Record]:
    """Two ranks, experts that move after step 4, the loss of a rank after step 8, evaluations at the beginning and the end."""
    records = [an_eval(0, 4.0), *(step_record(a_step(step)) for step in range(1, 9))]
    records.insert(5, reshard_record(4, Resharding(Move(3, 4000), ReshardGain(saved=0.1, moving=0.2, steps=10), seconds=0.5)))
    records += [event_record(8, "saved checkpoint-8"), event_record(8, "1 ranks go on after step 8, 2 experts moved, 0.100 s")]
    records += [step_record(a_step(step, ranks=1)) for step in range(9, steps + 1)]
    return [*records, an_eval(steps, 1.5)]
