"""One rank of a training of a few steps that measures how many bytes of tensors it holds: `python -m benchmarks.memory_rank OUT CONFIG`.

On a GPU these are `torch.cuda.max_memory_allocated`. On a CPU torch's profiler records what torch's allocator gives out and takes back,
from before the model is loaded, so that temporary tensors inside operators are counted, too. Tensors that are mapped from files are added.
Not counted are the interpreter, libraries, and what libraries take without torch's allocator, such as gloo's buffers.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile, record_function

STEPS = 3
"""the first makes the optimizer's moments"""
_STEPS_MARK = "hecate: steps"
Change = tuple[int, int, int]
"""when torch's allocator gave out a block or took it back, its address, and its bytes: below 0 where it was taken back"""


def preload() -> None:
    """Import what a rank needs. The fork server calls this once, for all ranks of a machine."""
    from hecate.train.rank_main import preload

    preload()


def main(arguments: Sequence[str]) -> None:
    """Train, and write this rank's figures as JSON to the file OUT.RANK, and rank 0 the loads of the steps to the folder OUT.loads."""
    from hecate.config import load_config
    from hecate.parallel.traces import TraceWriter
    from hecate.ranks.ranks import join_ranks
    from hecate.train.training import Training

    out, path = arguments
    config = load_config(path, claim_output=False)
    model = config.model
    with join_ranks(config.fssdp.shard_size, model.tensor_parallel, sharded_layers=model.shard_non_experts) as ranks:
        if ranks.device.type == "cuda":
            training = Training(config, ranks)
            torch.cuda.reset_peak_memory_stats(ranks.device)
            loads = _take_steps(training)
            peak = torch.cuda.max_memory_allocated(ranks.device)
        else:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
                training = Training(config, ranks)
                before = live_tensors()
                loads = _take_steps(training)
            events = list(_all_events(seen.profiler.kineto_results.experimental_event_tree()))
            steps = next(event for event in events if event.name == _STEPS_MARK)
            peak = peak_bytes(_changes(events), steps.start_time_ns, steps.end_time_ns, before)
        Path(f"{out}.{ranks.rank}").write_text(json.dumps({"peak_bytes": peak}), encoding="utf-8")
        if ranks.rank == 0:
            top_k, most = training.parts.config.moe.experts_per_token, training.facts().tokens_per_rank
            trace = TraceWriter(Path(f"{out}.loads"), top_k=top_k, tokens_per_rank=most, model="", notes={}, after=0)
            for step, one in enumerate(loads, start=1):
                trace.append(step, one)
            trace.save()


def peak_bytes(changes: Iterable[Change], start: int, end: int, before: Mapping[int, int]) -> int:
    """Return the most bytes of tensors between two times.

    Args:
        changes: of all blocks, from before the first tensor on.
        before: the bytes of the tensors that are there at `start`, by address. Those that are in no block are mapped from files, and stay.
            Of a block that is a whole mapped file, the tensors are counted that are still in use.
    """
    live: dict[int, int] = {}
    held = most = 0
    mapped: int | None = None
    for when, address, size in sorted(changes):
        if when > end:
            break
        if when >= start and mapped is None:
            mapped = sum(before.values())
            for at, large in live.items():
                inside = {place: number for place, number in before.items() if at <= place < at + large}
                mapped -= sum(inside.values())
                if len(inside) > 1:
                    live[at] = sum(inside.values())
                    held += live[at] - large
            most = held
        if size > 0:
            held += size - live.get(address, 0)  # the profiler misses the end of some blocks; another one in their place tells of it
            live[address] = size
        else:
            held -= live.pop(address, 0)
        most = max(most, held)
    assert mapped is not None, "nothing was allocated in the steps"
    return most + mapped


def live_tensors() -> dict[int, int]:
    """Return the bytes of the storages of all tensors that Python holds, by address. torch.compile's fake tensors have none."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        of = type(thing)
        if issubclass(of, torch.Tensor) and not issubclass(of, FakeTensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _take_steps(training: Any) -> list[dict[Any, Any]]:
    """Return the loads of each step: unit -> int [experts, ranks]."""
    with record_function(_STEPS_MARK):
        return [training.train_one().result.loads for _ in range(STEPS)]


def _all_events(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _all_events(event.children)


def _changes(events: Iterable[Any]) -> Iterator[Change]:
    for event in events:
        if type(event.extra_fields).__name__ == "_ExtraFields_Allocation" and event.extra_fields.ptr:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size


if __name__ == "__main__":
    main(sys.argv[1:])
