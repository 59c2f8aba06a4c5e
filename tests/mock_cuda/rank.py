"""One rank of some training runs, one after the other, on a mock GPU or on the CPU: `python -m tests.mock_cuda.rank RUNS.json RANK`.

For `RUNS.json` see `tests.mock_cuda.runs.Runs`. On a mock GPU the rank leaves, beside each run's folder, what happened in the steps from
the third on: waits of the host by place, and kernels by name.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WARM_UP = 2
"""steps that are not watched: the first ones make what later ones find"""


def main(runs: dict[str, Any], rank: int) -> None:
    world = int(runs["world"])
    if runs["mock"]:
        from tests.mock_cuda import install

        install.install(devices=world)
        from tests.mock_cuda.collectives import install_backend
        from tests.mock_cuda.kernels import interpret_in_place

        install_backend()
        interpret_in_place()
    os.environ["LOCAL_RANK"] = str(rank)
    import torch.distributed as dist

    from hecate.config import load_config
    from hecate.ranks.ranks import connect
    from hecate.train.loop import train

    for name, overrides in runs["overrides"].items():
        print(f"run {name}", flush=True)
        folder = Path(runs["folder"], name)
        config = load_config(runs["config"], [f"output_dir={folder}", *overrides], claim_output=False)
        store = dist.FileStore(f"{folder}.store", world)
        ranks = connect(store, rank, world, config.fssdp.shard_size, config.model.tensor_parallel)
        if runs["mock"]:
            with _watched_steps() as steps:
                train(config, ranks)
            folder.with_name(f"{name}.rank{rank}.json").write_text(json.dumps(steps), encoding="utf-8")
        else:
            train(config, ranks)
        dist.destroy_process_group()


@contextmanager
def _watched_steps() -> Iterator[list[dict[str, Any]]]:
    """Watch the training steps until the end of the block; yields what is found, one record a step."""
    from hecate.report.events import StepEvent
    from hecate.train.training import Training
    from tests.mock_cuda.kernels import LAUNCHES
    from tests.mock_cuda.waits import watching

    steps: list[dict[str, Any]] = []
    plain = Training.train_one

    def train_one(self: Training, *arguments: Any) -> StepEvent:
        before = Counter(LAUNCHES)
        with watching() as watched:
            event = plain(self, *arguments)
        if self.standing.step > WARM_UP:
            launches = dict(LAUNCHES - before)
            steps.append({"waits": watched.by_place(), "kinds": watched.by_kind(), "launches": launches})
        return event

    Training.train_one = train_one  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        Training.train_one = plain  # type: ignore[method-assign]


if __name__ == "__main__":
    faulthandler.dump_traceback_later(280, exit=True)
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[2]))
