"""A rank that takes optimizer steps of a configuration for `benchmarks.before_after`, by the code of the checkout that PYTHONPATH names.

    python training_steps.py CONFIG [KEY=VALUE ...]

A step is the processor seconds of one `Training.train_one`: batch, passes, exchange, optimizer and what is recorded. It imports only what
checkouts have had under the same names since commit c7498cd8.
"""

from __future__ import annotations

import sys
import time

import torch

from hecate.config import load_config
from hecate.ranks.ranks import join_ranks
from hecate.train.training import Training


def main(config: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    with join_ranks() as ranks:
        training = Training(load_config(config, overrides, claim_output=False), ranks)
        # As `benchmarks.handover.take_steps`, which the other checkout need not have.
        for _ in sys.stdin:
            started = time.process_time()
            training.train_one()
            print(f"took {time.process_time() - started!r}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
