"""A run leaves nothing behind, however it is started and ended. `python -m benchmarks.start_stop --cycles 50` does it fifty times."""

from __future__ import annotations

import subprocess
import sys

import pytest

from testing.namespaces import missing_for_slow_link
from tests.launch.cluster import ROOT


@pytest.mark.slow
@pytest.mark.skipif((lacking := missing_for_slow_link()) is not None, reason=f"counts in namespaces of its own: {lacking}")
def test_launched_runs_leave_nothing() -> None:
    command = [sys.executable, "-m", "benchmarks.start_stop", "--quick", "--command", "launch"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("left_") == 5
