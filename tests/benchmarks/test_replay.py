"""The samples of `benchmarks.replay` have, in the order in which a run takes them, the loads of the workload."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from benchmarks.ratios import Budget, Ratio
from benchmarks.replay import SEED, Sizes, make_inputs, summarize
from hecate.config import DataSource
from hecate.data.batches import sequence_ranges
from hecate.data.encode import encode_source
from hecate.data.routed_experts import RoutingShape
from hecate.data.stream import TrainStream
from hecate.parallel.simulate.workloads import WORKLOADS


def test_a_run_takes_samples_whose_loads_are_the_workloads(tmp_path: Path) -> None:
    sizes = Sizes(steps=3, hidden=16, ffn=16, layers=2, experts=4, top_k=2, seq_len=16, sequences=3)
    make_inputs(tmp_path, sizes)
    source = DataSource(path=str(tmp_path / "train.jsonl"), name="train")
    tokenizer, shape = AutoTokenizer.from_pretrained(tmp_path / "model"), RoutingShape((4, 4), 2)
    encoded = encode_source(source, tokenizer, seq_len=16, vocab_size=300, routing=shape)
    stream = TrainStream([encoded], seq_len=16, packing=False, sequences_per_step=6, seed=SEED)
    wanted = WORKLOADS["rotating"](3, 2, 2, 4, 48, 2, SEED)
    for step in range(3):
        sequences = stream.next_step()
        for rank, own in enumerate(sequence_ranges(6, (1, 1))):
            routed = np.concatenate([sequences[i].routed for i in own])  # type: ignore[misc]
            assert routed.shape == (48, 2, 2)
            for layer in range(2):
                assert np.bincount(routed[:, layer].ravel(), minlength=4).tolist() == wanted[step, layer, :, rank].tolist()


def test_ratios_are_of_one_setting() -> None:
    rows = [
        {
            "setting": setting,
            "plan": plan,
            "seconds_all": [seconds * times] * 16,
            "step_seconds_min": seconds,
            "loss_difference": seconds / 1e6,
        }
        for setting, times in (("a", 1), ("b", 10))
        for plan, seconds in (("history", 2.0), ("exact", 4.0), ("replay", 1.0))
    ]
    found = summarize(rows, Budget(half_width=0.02, rounds=16))
    over_history, over_exact = found["b: replay over history"], found["a: replay over exact"]
    assert isinstance(over_history, Ratio)
    assert isinstance(over_exact, Ratio)
    assert (over_history.value, over_history.verdict) == (pytest.approx(0.5), 1)
    assert over_exact.value == pytest.approx(0.25)
    assert found["largest_loss_difference"] == pytest.approx(4e-6)
