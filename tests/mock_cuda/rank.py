"""One rank of some training runs on a GPU, a mock one or the CPU: `python -m tests.mock_cuda.rank RUNS.json RANK`.

The runs come one after the other. For `RUNS.json` see `tests.mock_cuda.runs.Runs`. On a GPU, mock or not, the rank leaves, beside each
run's folder, what happened in the later steps: waits of the host by place, kernels and operators by name, and the routes of the gathers.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hecate.config import Config


def main(runs: dict[str, Any], rank: int) -> None:
    world = int(runs["world"])
    if runs["mock"]:
        from tests.mock_cuda import install

        install.install(devices=int(os.environ.get("MOCK_GPUS", world)))
        from tests.mock_cuda.collectives import install_backend
        from tests.mock_cuda.kernels import interpret_in_place

        install_backend()
        interpret_in_place()
    os.environ["LOCAL_RANK"] = str(rank)
    import torch.distributed as dist

    from hecate.config import load_config
    from hecate.io.terminal import show_messages
    from hecate.ranks.ranks import connect
    from hecate.train.loop import train

    show_messages()
    for name, overrides in runs["overrides"].items():
        print(f"run {name}", flush=True)
        folder = Path(runs["folder"], name)
        config = load_config(runs["config"], [f"output_dir={folder}", *overrides], claim_output=False)
        store = dist.FileStore(f"{folder}.store", world)
        model = config.model
        ranks = connect(store, rank, world, config.fssdp.shard_size, model.tensor_parallel, sharded_layers=model.shard_non_experts)
        if runs["mock"] or runs["gpu"]:
            with _watched_steps(_watched_on_mock if runs["mock"] else _watched_on_gpu, runs["unwatched"]) as steps:
                train(config, ranks)
            folder.with_name(f"{name}.rank{rank}.json").write_text(json.dumps(steps), encoding="utf-8")
        else:
            train(config, ranks)
        dist.destroy_process_group()
        if name in runs["asked"]:
            folder.with_name(f"{name}.answered.json").write_text(json.dumps(_ask(config, folder)), encoding="utf-8")


def _ask(config: Config, folder: Path) -> dict[str, str]:
    """Evaluate what a run has written, as `hecate eval` does, and have it answer a question in two tokens."""
    from testing.answering import answer, evaluate_trained

    written = folder / ("model" if (folder / "model").exists() else "adapter")
    printed = io.StringIO()
    with redirect_stdout(printed):
        evaluate_trained(replace(config, eval=replace(config.eval, generate=False)), written)
    return {
        "printed": "\n".join(line for line in printed.getvalue().splitlines() if str(folder) not in line),
        "answer": answer(written, "w1x1", system=None, model=None, max_new_tokens=2),
    }


Watch = Callable[[], AbstractContextManager[dict[str, Any]]]
"""watches a block; what it yields is filled at the block's end"""


@contextmanager
def _watched_steps(watch: Watch, unwatched: int) -> Iterator[list[dict[str, Any]]]:
    """Watch the training steps until the end of the block, but for the first ones; yields what is found, one record a step."""
    from hecate.report.events import StepEvent
    from hecate.train.training import Training

    steps: list[dict[str, Any]] = []
    plain = Training.train_one

    def train_one(self: Training, *arguments: Any) -> StepEvent:
        with watch() as found:
            event = plain(self, *arguments)
        if self.run_state.step > unwatched:
            transfers = self.parts.moe.engine.shards.plans.transfers.values()
            steps.append(found | {"routes": sorted({transfer.chunks.route for transfer in transfers})})
        return event

    Training.train_one = train_one  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        Training.train_one = plain  # type: ignore[method-assign]


@contextmanager
def _watched_on_mock() -> Iterator[dict[str, Any]]:
    from tests.mock_cuda.kernels import LAUNCHES
    from tests.mock_cuda.waits import watching

    found: dict[str, Any] = {}
    before = Counter(LAUNCHES)
    with watching() as watched:
        yield found
    found |= {"waits": watched.by_place(), "kinds": watched.by_kind(), "launches": dict(LAUNCHES - before), "operators": watched.operators}


@contextmanager
def _watched_on_gpu() -> Iterator[dict[str, Any]]:
    from tests.gpu.waits import watching

    found: dict[str, Any] = {}
    with watching() as waits:
        yield found
    found["waits"] = dict(waits)


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    faulthandler.dump_traceback_later(given["seconds"], exit=True)
    main(given, int(sys.argv[2]))
