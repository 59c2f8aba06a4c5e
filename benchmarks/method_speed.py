"""How long is a step of each system of `benchmarks.methods`, beside one of LoRA of rank 8 on every linear?

    python -m benchmarks.method_speed [--quick] [--json FILE]

All runs are `hecate train` of SmolLM2-135M-Instruct on one rank with one thread, in bfloat16, with 512 tokens a step and with the
systems' settings of `benchmarks.methods`; no bytes are sent. The systems take turns, three times. A system's step is the first quartile
of its steps' seconds, because what else runs on a shared machine only ever slows a step down. `methods` records tokens a second, too, but
over hours in which the machine does not stay the same. The goal: a step of ALLoRA takes at most 1.05 of LoRA's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

from benchmarks.method_cases import METHODS, TASKS, Method
from benchmarks.report import arguments, finish
from benchmarks.whole_run import ROOT, train
from hecate.data.synthetic_tasks import write_tasks

BESIDE = "lora_r8"
NAMES = (BESIDE, "allora", "ffa_lora", "mos", "nola", "mola_5555", "smora", "llava_mole", "mixlora")
GOAL = 1.05
"""the most that a step of ALLoRA may take of LoRA's"""
SETTINGS = {
    "data.eval": "[]",
    "data.seq_len": "256",
    "eval.generate": "false",
    "fssdp.policy": "full",
    "micro_batch_size": "2",
    "model.dtype": "bfloat16",
    "nproc": "1",
}


def step_seconds(method: Method, steps: int, output: Path, folder: Path) -> list[float]:
    """The seconds of each step of a training, but for the first two.

    Raises:
        SystemExit: the training has failed.
    """
    given = {**SETTINGS, "max_steps": steps, "output_dir": output, **method.settings}
    return [step["step_seconds"] for step in train(ROOT / "configs" / "quickstart.yaml", given, folder).of_kind("step")[2:]]


def rows_of(seconds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """A row for each system: its step's seconds, and those over LoRA's."""
    quartile = {name: quantiles(values, n=4)[0] for name, values in seconds.items()}
    return [{"system": name, "step_seconds": value, f"of_{BESIDE}": value / quartile[BESIDE]} for name, value in quartile.items()]


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    rounds, steps, names = (1, 4, NAMES[:2]) if options.quick else (3, 10, NAMES)
    methods = {method.name: method for method in METHODS}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_tasks(folder / "data" / "quickstart", TASKS, train_size=400, eval_size=1, seed=0)
        for round_number in range(rounds):
            for name in names:
                seconds[name] += step_seconds(methods[name], steps, folder / "runs" / f"{name}-{round_number}", folder)
    rows = rows_of(seconds)
    ratio = {row["system"]: row[f"of_{BESIDE}"] for row in rows}
    finish("method_speed", rows, {f"{name} / {BESIDE}": ratio[name] for name in names[1:]}, options.json)
    print(f"allora: a step takes at most {GOAL} of LoRA's: {'met' if ratio['allora'] <= GOAL else 'missed'}")


if __name__ == "__main__":
    main()
