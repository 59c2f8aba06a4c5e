"""A rank on a mock GPU whose peers can be killed: a program for hecate's launchers.

`python -m tests.mock_cuda.surviving_rank CONFIG RANKS [KEY=VALUE ...]` is the launcher of so many ranks.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Sequence

from hecate.ranks.launcher_files import LAUNCHED_VARIABLE

GPUS = 4


def preload() -> None:
    """Put the mock device under torch, and import what a rank needs."""
    from tests.mock_cuda import install

    install.install(devices=GPUS)
    from tests.mock_cuda.collectives import install_backend, wait_while_stuck

    install_backend()
    install.device.observe(wait_while_stuck)
    from hecate.train import rank_main

    rank_main.preload()


def main(arguments: Sequence[str]) -> None:
    """Train as one rank, in a process that has preloaded."""
    from hecate.train import rank_main

    faulthandler.dump_traceback_later(500, exit=True)
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    rank_main.main(arguments)


if __name__ == "__main__":
    if LAUNCHED_VARIABLE in os.environ:  # a launcher starts ranks so where it cannot fork them
        preload()
        main(sys.argv[1:])
    else:
        from hecate.io.terminal import show_messages
        from hecate.launch.local_launcher import launch_local
        from hecate.launch.membership.job_policy import JobPolicy

        show_messages()
        config, ranks, *overrides = sys.argv[1:]
        sys.exit(launch_local("tests.mock_cuda.surviving_rank", [config, *overrides], int(ranks), JobPolicy(copied=True)))
