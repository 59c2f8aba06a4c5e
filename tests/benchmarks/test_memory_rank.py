"""The peak of tensors' bytes is found among what torch's allocator has given out, by hand and of tensors that another thread frees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory_rank import mapped_bytes, peak_bytes

PROGRAM = """
import json, threading, time, torch
from torch.profiler import ProfilerActivity, profile
from benchmarks.memory_rank import all_events, allocated, count_in_all_threads, peak_bytes

count_in_all_threads()
with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
    held = [torch.ones(1_000_000)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    start = time.time_ns()
    held.append(torch.ones(3_000_000))
    held.append(torch.ones(500_000))
    held.clear()
    end = time.time_ns()
    held.append(torch.ones(9_000_000))
events = all_events(seen.profiler.kineto_results.experimental_event_tree())
print(json.dumps(peak_bytes(allocated(events), start, end)))
"""


def test_a_peak_counts_what_was_there_before_and_nothing_after() -> None:
    changes = [(1, 10), (2, 60), (3, 10), (5, 17), (6, 10), (7, 13), (9, 99)]
    assert peak_bytes(changes, 4, 8) == 17


def test_a_peak_may_be_at_the_start() -> None:
    assert peak_bytes([(1, 10), (2, 60), (5, 17), (6, 20)], 4, 8) == 60


def test_a_mapped_file_is_no_block_of_the_allocator() -> None:
    assert peak_bytes([(1, 10), (2, 0), (5, 7), (6, 0)], 4, 8) == 10


def test_what_another_thread_frees_is_not_in_the_peak() -> None:
    """The profiler sees what its own thread frees alone; 3.5 million numbers are there at once after another thread has freed a million."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert 14_000_000 <= json.loads(done.stdout) < 14_001_000


def test_tensors_in_mapped_files_are_counted_each_once(tmp_path: Path) -> None:
    before = mapped_bytes()
    (tmp_path / "numbers").write_bytes(bytes(4000))
    mapped = torch.from_file(str(tmp_path / "numbers"), shared=True, size=1000)
    part, other = mapped[500:], torch.zeros(1000)
    with FakeTensorMode():
        fake = torch.zeros(3)
    assert mapped_bytes() - before == 4000
    assert len(part) + len(other) + len(fake) == 1503
