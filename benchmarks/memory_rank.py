"""One rank of a training of a few steps that measures how many bytes of tensors it holds: `python -m benchmarks.memory_rank OUT CONFIG`.

On a GPU these are `torch.cuda.max_memory_allocated`. On a CPU torch's profiler records how much torch's allocator has given out whenever it
gives out or takes back a block, so that temporary tensors inside operators are counted, too. Tensors that are mapped from files are added.
Not counted are the interpreter, libraries, and what libraries take without torch's allocator, such as gloo's buffers.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile, record_function

STEPS = 3
"""the first makes the optimizer's moments"""
_STEPS_MARK = "hecate: steps"
Change = tuple[int, int]
"""when torch gave out a block or took it back, and the bytes of all blocks of its allocator then; 0 for a mapped file, which is none"""


def preload() -> None:
    """Import what a rank needs. The fork server calls this once, for all ranks of a machine."""
    from hecate.train.rank_main import preload

    preload()


def main(arguments: Sequence[str]) -> None:
    """Train, and write this rank's figures as JSON to the file OUT.RANK, and rank 0 the loads of the steps to the folder OUT.loads."""
    from hecate.config import load_config
    from hecate.parallel.values.traces import TraceWriter
    from hecate.ranks.ranks import join_ranks
    from hecate.train.training import Training

    count_in_all_threads()
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
                mapped = mapped_bytes()
                loads = _take_steps(training)
            events = list(all_events(seen.profiler.kineto_results.experimental_event_tree()))
            steps = next(event for event in events if event.name == _STEPS_MARK)
            peak = peak_bytes(allocated(events), steps.start_time_ns, steps.end_time_ns) + mapped
        Path(f"{out}.{ranks.rank}").write_text(json.dumps({"peak_bytes": peak}), encoding="utf-8")
        if ranks.rank == 0:
            top_k, most = training.parts.config.moe.experts_per_token, training.facts().tokens_per_rank
            trace = TraceWriter(Path(f"{out}.loads"), top_k=top_k, tokens_per_rank=most, model="", notes={}, after=0)
            for step, one in enumerate(loads, start=1):
                trace.append(step, one)
            trace.save()


def count_in_all_threads() -> None:
    """Have torch's allocator count what it gives out and takes back in threads that the profiler does not see, too.

    A tensor that ranks exchange is often freed by gloo's thread. Then no record of the profiler tells of its end, but the bytes of all
    blocks, which the next record has, are without it.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True


def peak_bytes(changes: Iterable[Change], start: int, end: int) -> int:
    """Return the most bytes of all blocks of torch's allocator between two times.

    Args:
        changes: from before the first tensor on.
        start, end: nanoseconds, as the profiler's records have them.
    """
    totals = [(when, total) for when, total in sorted(changes) if total and when <= end]
    at_start = [total for when, total in totals if when < start][-1:]
    return max(at_start + [total for when, total in totals if when >= start])


def allocated(events: Iterable[Any]) -> Iterator[Change]:
    """Yield what the events say of torch's allocator."""
    for event in events:
        if type(event.extra_fields).__name__ == "_ExtraFields_Allocation" and event.extra_fields.ptr:
            yield event.start_time_ns, event.extra_fields.total_allocated


def mapped_bytes() -> int:
    """Return the bytes of the tensors that Python holds in files that are mapped into memory. torch.compile's fake tensors have none."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        of = type(thing)
        if issubclass(of, torch.Tensor) and not issubclass(of, FakeTensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    total = 0
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        region, *_, path = line.split(maxsplit=5)
        if path.startswith("/"):
            first, last = (int(address, 16) for address in region.split("-"))
            total += sum(size for address, size in found.items() if first <= address < last)
    return total


def _take_steps(training: Any) -> list[dict[Any, Any]]:
    """Return the loads of each step: unit -> int [experts, ranks]."""
    with record_function(_STEPS_MARK):
        return [training.train_one().result.loads for _ in range(STEPS)]


def all_events(events: Iterable[Any]) -> Iterator[Any]:
    """Yield the events and all that are inside them."""
    for event in events:
        yield event
        yield from all_events(event.children)


if __name__ == "__main__":
    main(sys.argv[1:])
