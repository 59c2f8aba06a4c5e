"""The tuner without timing: which candidates it tries, which one it selects, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import autotune
from hecate.kernels.common.launch_config import LaunchConfig, Rule, choose, meta_tensors_are_on, trying

SMALL = LaunchConfig({"BM": 16, "BN": 64}, num_warps=4, num_stages=2)
LARGE = LaunchConfig({"BM": 128, "BN": 256}, num_warps=8, num_stages=3)
RULES = (Rule(LARGE, min_sm=90), Rule(SMALL, min_sm=80), Rule(LaunchConfig({"BM": 8, "BN": 8}), min_sm=0))
META = torch.device("meta")


def test_candidates_are_the_table_and_the_neighbours_of_what_is_in_force() -> None:
    found = autotune.candidates(SMALL, RULES, sm=90)
    assert found[:2] == [SMALL, LARGE]
    assert LaunchConfig({"BM": 32, "BN": 64}, 4, 2) in found
    assert LaunchConfig({"BM": 16, "BN": 32}, 4, 2) in found
    assert LaunchConfig({"BM": 16, "BN": 64}, 8, 2) in found
    assert LaunchConfig({"BM": 16, "BN": 64}, 4, 4) in found
    assert all(config.blocks["BM"] >= 16 for config in found), "tensor cores take no less"
    assert len({str(config) for config in found}) == len(found)
    assert LARGE not in autotune.candidates(SMALL, RULES, sm=80)


def test_blocks_of_a_row_stay_possible() -> None:
    one = LaunchConfig({"BM": 1, "BD": 1024})
    blocks = [dict(config.blocks) for config in autotune.candidates(one, (), sm=90)]
    assert {"BM": 2, "BD": 1024} in blocks
    assert {"BM": 1, "BD": 512} in blocks
    assert all(block["BM"] > 0 for block in blocks)


def test_only_what_is_clearly_faster_is_taken() -> None:
    other = LaunchConfig({"BM": 32, "BN": 64})
    assert autotune.fastest([(SMALL, 1.0), (LARGE, 0.995)]) == SMALL
    assert autotune.fastest([(SMALL, 1.0), (LARGE, 0.9), (other, 0.895)]) == LARGE
    assert autotune.fastest([]) is None


def test_what_is_saved_is_read_and_added_to(tmp_path: Path) -> None:
    path = tmp_path / "tuned" / "some_gpu.json"
    autotune.save(autotune.tuned({("gemm", 16, 2): LARGE, ("gate", 0, 2): SMALL}), "some gpu", path)
    autotune.save(autotune.tuned({("gemm", 64, 2): SMALL, ("gate", 0, 2): LARGE}), "some gpu", path)
    known = autotune.from_json(json.loads(path.read_text()))
    assert known.configs == {"gemm": {(16, 2): LARGE, (64, 2): SMALL}, "gate": {(0, 2): LARGE}}


def test_a_trial_decides_and_notes_what_was_asked() -> None:
    def asked() -> LaunchConfig:
        return choose("gemm", RULES, rank=16, itemsize=2, device=META)

    with meta_tensors_are_on(90):
        assert asked() == LARGE
        with trying({("gemm", 16, 2): SMALL}) as trial:
            assert asked() == SMALL
            assert choose("gate", RULES, rank=0, itemsize=2, device=META) == LARGE
        assert list(trial.asked) == [("gemm", 16, 2), ("gate", 0, 2)]
        assert trial.asked["gate", 0, 2] == (RULES, 90)
        assert asked() == LARGE


def test_wrong_and_impossible_candidates_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that computes something else, one that does not run, one that is fine."""
    monkeypatch.setattr(autotune, "_milliseconds", lambda step: 1.0)

    def step() -> list[torch.Tensor]:
        config = choose("gemm", RULES, rank=16, itemsize=2, device=META)
        if config.num_stages == 4:
            raise MemoryError("out of shared memory")
        return [torch.full((3,), 2.0 if config.num_warps == 8 else 1.0)]

    fine = LaunchConfig({"BM": 16, "BN": 64}, 4, 3)
    tried = [LARGE, LaunchConfig({"BM": 16, "BN": 64}, 4, 4), fine]
    assert list(autotune._timed(step, [torch.ones(3)], 0.01, {}, ("gemm", 16, 2), tried)) == [(fine, 1.0)]


def test_elsewhere_than_on_a_gpu_it_refuses() -> None:
    with pytest.raises(RuntimeError, match="on a GPU only"):
        autotune.tune(list, torch.device("cpu"))
