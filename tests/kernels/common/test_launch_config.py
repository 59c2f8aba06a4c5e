"""The tables of launch configurations: the first matching rule, tuned configurations above it, and the file of tuned ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hecate.kernels.common import launch_config
from hecate.kernels.common.launch_config import (
    LaunchConfig,
    Rule,
    Tuned,
    by_rule,
    choose,
    from_json,
    meta_tensors_are_on,
    padded_rank,
    to_json,
)
from hecate.kernels.mixlora.passes import RULES

NARROW, WIDE, ANY = (LaunchConfig({"BM": rows}) for rows in (32, 64, 16))
TABLE = (Rule(NARROW, min_sm=90, max_rank=64, itemsizes=(2,)), Rule(WIDE), Rule(ANY, min_sm=0))


@pytest.mark.parametrize(
    ("rank", "itemsize", "sm", "config"),
    [(16, 2, 90, NARROW), (64, 2, 100, NARROW), (128, 2, 90, WIDE), (16, 4, 90, WIDE), (16, 2, 80, WIDE), (16, 2, 0, ANY)],
)
def test_the_first_rule_that_serves(rank: int, itemsize: int, sm: int, config: LaunchConfig) -> None:
    assert by_rule("some", TABLE, rank=rank, itemsize=itemsize, sm=sm) is config


def test_no_rule_is_an_error_that_says_for_what() -> None:
    with pytest.raises(ValueError, match="kernel some: no launch configuration for rank 16, 2-byte elements, sm_75"):
        by_rule("some", TABLE[:2], rank=16, itemsize=2, sm=75)


def test_meta_tensors_stand_for_a_gpu() -> None:
    meta = torch.device("meta")
    assert choose("some", TABLE, rank=16, itemsize=2, device=meta) is ANY
    with meta_tensors_are_on(90):
        assert choose("some", TABLE, rank=16, itemsize=2, device=meta) is NARROW


def test_what_was_tuned_takes_the_place_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = Tuned({"some": {(16, 2): LaunchConfig({"BM": 128}, num_warps=8, num_stages=4)}})
    monkeypatch.setattr(launch_config, "TUNED", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3 (test)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    launch_config.tuned_path("NVIDIA H100 80GB HBM3 (test)").write_text(json.dumps(to_json(tuned)), encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["NVIDIA_H100_80GB_HBM3_test.json"]
    device = torch.device("cuda")
    assert choose("some", TABLE, rank=16, itemsize=2, device=device) == LaunchConfig({"BM": 128}, num_warps=8, num_stages=4)
    assert choose("some", TABLE, rank=32, itemsize=2, device=device) is NARROW
    assert choose("other", TABLE, rank=16, itemsize=2, device=device) is NARROW


def test_to_json_and_back() -> None:
    tuned = Tuned({"a": {(16, 2): NARROW, (64, 4): WIDE}, "b": {(0, 2): ANY}})
    assert from_json(json.loads(json.dumps(to_json(tuned)))) == tuned


@pytest.mark.parametrize(("rank", "padded"), [(0, 0), (1, 16), (16, 16), (17, 32), (64, 64), (100, 128), (256, 256)])
def test_ranks_are_padded_for_tensor_cores(rank: int, padded: int) -> None:
    assert padded_rank(rank) == padded


@pytest.mark.parametrize("name", RULES)
def test_every_kernel_has_blocks_for_whatever_it_may_be_given(name: str) -> None:
    for sm in (0, 80, 90, 100):
        for itemsize in (2, 4):
            for rank in (0, 16, 32, 64, 128, 256):
                by_rule(name, RULES[name], rank=rank, itemsize=itemsize, sm=sm)
