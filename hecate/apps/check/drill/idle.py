"""A program of ranks that do nothing until they are told to end: `python -m hecate.apps.check.drill.idle RANKS FOLDER` launches it.

Its processes start and end in a fraction of a second, so that fifty starts and ends of a launcher take a minute.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path


def preload() -> None:
    """Nothing is needed."""


def main(arguments: Sequence[str]) -> None:
    """Make a file that says that this rank is there, and wait for a signal. As every rank, it dies with the fork server."""
    Path(arguments[0], f"rank-{os.environ['RANK']}").touch()
    signal.pause()


def launch_idle(ranks: int, folder: str) -> int:
    """The exit status of the local launcher with ranks of this program."""
    from hecate.io.terminal import show_messages
    from hecate.launch.local_launcher import launch_local

    show_messages()
    return launch_local("hecate.apps.check.drill.idle", [folder], ranks)


if __name__ == "__main__":
    sys.exit(launch_idle(int(sys.argv[1]), sys.argv[2]))
