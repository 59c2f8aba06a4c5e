"""What a training step asks of a GPU and of the host, on a mock GPU: `python hot_path_rank.py RUNS.json`, for `benchmarks.hot_path`.

The trainer and the mock device are those of the checkout that PYTHONPATH names, so one program measures several of them. RUNS.json has the
path of a configuration, overrides by the name of a run, and whether to count or to take times. Kernels are not run. The last line of the
output is JSON: of each run, for each of its later steps and each of the step's parts, what was called how often, and the processor time of
this process in seconds.

A step has three parts: `forward` and `backward`, of all its micro-steps together, and `rest`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.mock_cuda import install

WARM_UP = 2
NEVER_STOPS = "max_skipped_steps=1000000"  # what no kernel has written is NaN, so every step may be skipped
"""the steps that are not measured, because the first ones make what later ones find"""


class Parts:
    """Adds up what has happened in each part of a step. `happened` returns counters that only grow."""

    def __init__(self, happened: Callable[[], Counter[str]]) -> None:
        self._happened = happened
        self.restart()

    def restart(self) -> None:
        """Begin a step."""
        self.calls: dict[str, Counter[str]] = {part: Counter() for part in ("forward", "backward", "rest")}
        self.seconds = dict.fromkeys(self.calls, 0.0)
        self._part, self._before, self._since = "rest", self._happened(), time.process_time()

    def enter(self, part: str) -> None:
        """End the part under way and begin another."""
        spent, happened = time.process_time(), self._happened()
        self.calls[self._part] += happened - self._before
        self.seconds[self._part] += spent - self._since
        self._part, self._before, self._since = part, happened, time.process_time()

    def of_step(self) -> dict[str, Any]:
        """End the step; returns its parts."""
        self.enter("rest")
        return {part: {"calls": dict(calls), "seconds": self.seconds[part]} for part, calls in self.calls.items()}


def watch(parts: Parts) -> list[dict[str, Any]]:
    """Have every training step of this process add a record to the list that is returned."""
    from hecate.engine.step import Step
    from hecate.train.training import Training

    steps: list[dict[str, Any]] = []
    begin_micro_step, backward, train_one = Step.begin_micro_step, Step.backward, Training.train_one

    def watched_begin(self: Step, *given: Any) -> Any:
        parts.enter("forward")
        return begin_micro_step(self, *given)

    def watched_backward(self: Step, *given: Any) -> None:
        parts.enter("backward")
        backward(self, *given)
        parts.enter("rest")

    def watched_step(self: Training, *given: Any) -> Any:
        parts.restart()
        event = train_one(self, *given)
        if self.run_state.step > WARM_UP:
            steps.append(parts.of_step())
        return event

    Step.begin_micro_step = watched_begin  # type: ignore[method-assign]
    Step.backward = watched_backward  # type: ignore[method-assign]
    Training.train_one = watched_step  # type: ignore[method-assign]
    return steps


def one_kernel_attention(note: Callable[[str], None], written: Callable[[Any], None]) -> None:
    """Have attention be a launch in each pass, as flash attention is on a GPU. Checkouts without `model.attention` compute it in torch.

    Args:
        note: called with the name of each launch.
        written: called with each tensor that a launch would have written.
    """
    import torch

    try:
        from hecate.model.layers import attention_kernels
    except ImportError:
        return

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(query, key, value)
            note("flash_attention")
            out = torch.empty_like(query)
            written(out)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
            note("flash_attention_backward")
            outs = tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)
            for out in outs:
                written(out)
            return outs

    def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        result: torch.Tensor = Attention.apply(query, key, value)
        return result

    attention_kernels.flash_kernel = lambda: attention_kernels.package_flash(flash)  # type: ignore[assignment]


def run_all(runs: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Train every run to its end. No kernel runs, so the values that are trained with mean nothing."""
    import torch
    import torch.distributed as dist

    from hecate.config import load_config
    from hecate.kernels.common.kernel_launch import Launch
    from hecate.ranks.ranks import connect
    from hecate.train.loop import train
    from tests.mock_cuda.waits import NO_WAITS, watching

    launches: Counter[str] = Counter()

    def note(name: str) -> None:
        launches[name] += 1

    def written(value: Any) -> None:
        if runs["count"] and isinstance(value, torch.Tensor) and value.is_floating_point():
            # What the kernel would have written is NaN, and with NaN in a gradient no optimizer step is taken.
            install.device.as_cpu(value.detach()).nan_to_num_()

    one_kernel_attention(note, written)
    with ExitStack() as stack:
        if runs["count"]:

            def run(launch: Launch) -> None:
                note(launch.kernel.__name__)
                for value in launch.args.values():
                    written(value)

            watched = stack.enter_context(watching())

            def happened() -> Counter[str]:
                found = Counter({f"operator {name}": number for name, number in install.device.operators().items()})
                found.update({f"launch {name}": number for name, number in launches.items()})
                for (_, kind), number in watched.waits.items():
                    if kind not in NO_WAITS:
                        found[f"wait {kind}"] += number
                return found

        else:

            def run(launch: Launch) -> None:
                """Nothing."""

            def happened() -> Counter[str]:
                return Counter()

        Launch.run = run  # type: ignore[method-assign]
        steps = watch(Parts(happened))
        found = {}
        for name, overrides in runs["overrides"].items():
            folder = Path(runs["folder"], name)
            config = load_config(runs["config"], [f"output_dir={folder}", NEVER_STOPS, *overrides], claim_output=False)
            model, store = config.model, dist.FileStore(f"{folder}.store", 1)
            ranks = connect(store, 0, 1, config.fssdp.shard_size, model.tensor_parallel, sharded_layers=model.shard_non_experts)
            train(config, ranks)
            dist.destroy_process_group()
            found[name] = list(steps)
            steps.clear()
    return found


if __name__ == "__main__":
    install.install(devices=1)
    from tests.mock_cuda.collectives import install_backend

    install_backend()
    os.environ["LOCAL_RANK"] = "0"
    print(json.dumps(run_all(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
