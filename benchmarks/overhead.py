"""What Ray costs a step: the same run of two ranks under `hecate ray` (a private cluster of this machine) and under torchrun, in turn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import arguments, finish
from benchmarks.small_run import make_folder

_FIRST_STEPS = 5
"""left out: they compile, allocate, connect"""


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    pairs, steps = (1, 15) if options.quick else (3, 40)
    launchers = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hecate", "train"],
        "ray": [sys.executable, "-m", "hecate", "ray"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in launchers}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="hecate-") as name:
        config = make_folder(Path(name))
        for pair in range(pairs):
            for launcher, command in launchers.items():
                run = Path(name) / "runs" / f"{launcher}-{pair}"
                overrides = [f"output_dir={run}", f"max_steps={steps}", "topology=two-cpu-ranks", "ray.workers=2"]
                address = ["--address", "local"] if launcher == "ray" else []
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                done = subprocess.run(
                    [*command, str(config), *overrides, *address], env=environment, capture_output=True, text=True, timeout=280, check=False
                )
                assert done.returncode == 0, done.stdout + done.stderr
                records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
                of_steps = [record for record in records if record["kind"] == "step"]
                losses[launcher] = [record["loss"] for record in of_steps]
                seconds[launcher] += [record["step_seconds"] for record in of_steps[_FIRST_STEPS:]]
    assert len(losses["ray"]) == steps
    assert max(abs(a - b) for a, b in zip(losses["ray"], losses["torchrun"], strict=True)) < 1e-3, "not the same training"
    rows: list[dict[str, Any]] = [
        {"launcher": launcher, "step_ms_median": 1e3 * statistics.median(values), "step_ms_min": 1e3 * min(values), "all": values}
        for launcher, values in seconds.items()
    ]
    ratio = statistics.median(seconds["ray"]) / statistics.median(seconds["torchrun"])
    finish("overhead", rows, {"ray_over_torchrun": ratio}, options.json)


if __name__ == "__main__":
    main()
