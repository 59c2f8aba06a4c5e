"""Run a module that compiles kernels in a process of its own, because the tests' processes interpret kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def json_of(module: str, *arguments: str) -> Any:
    """What `python -m module arguments` prints on its last line, as JSON."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"python -m {module} {' '.join(arguments)} failed ({done.returncode}):\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])
