"""A process ends as Python's do, without the time that it takes to destroy what was loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from hecate.io.process_end import run_and_end

class Destroyed:
    def __del__(self):
        print("destroyed")

kept = Destroyed()

def program():
    atexit.register(print, "at exit")
    threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
    ThreadPoolExecutor().submit(lambda: (time.sleep(0.1), print("a task")))
    print("no line break", end="")
    %s

run_and_end(program)
"""


@pytest.mark.parametrize(
    ("last", "status", "error"),
    [
        ("", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(7)", 7, ""),
        ("sys.exit('why')", 1, "why\n"),
        ("raise ValueError('what')", 1, "ValueError: what\n"),
        ("raise KeyboardInterrupt", -2, "KeyboardInterrupt\n"),
    ],
)
def test_how_a_process_ends(tmp_path: Path, last: str, status: int, error: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM % last, encoding="utf-8")
    done = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert done.stderr.endswith(error)
    as_ever = status == -2 or error == "why\n"
    assert done.stdout == "no line breaka task\na thread\nat exit\n" + ("destroyed\n" if as_ever else "")


def test_output_that_cannot_be_written_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM % "", encoding="utf-8")
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, str(tmp_path / "program.py")], stdout=full, env=buffered, check=False)
    assert done.returncode == 120
