"""Time what a user waits for before anything happens: `hecate --help` and a refused configuration, next to an empty interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import arguments, finish


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as name:
        wrong = Path(name) / "wrong.yaml"
        wrong.write_text("learning_rat: 1\n", encoding="utf-8")
        commands = {
            "python -c pass": ([sys.executable, "-c", "pass"], 0),
            "hecate --help": ([sys.executable, "-m", "hecate", "--help"], 0),
            "hecate train WRONG": ([sys.executable, "-m", "hecate", "train", str(wrong)], 2),
        }
        seconds: dict[str, list[float]] = {command: [] for command in commands}
        for _ in range(3 if options.quick else 15):
            for command, (words, status) in commands.items():
                start = time.perf_counter()
                done = subprocess.run(words, capture_output=True, check=False)
                seconds[command].append(time.perf_counter() - start)
                assert done.returncode == status, (command, done.returncode, done.stderr)
    rows = [
        {"command": command, "seconds_median": statistics.median(times), "seconds_min": min(times), "seconds_all": times}
        for command, times in seconds.items()
    ]
    finish("startup", rows, {"help_seconds": statistics.median(seconds["hecate --help"])}, options.json)


if __name__ == "__main__":
    main()
