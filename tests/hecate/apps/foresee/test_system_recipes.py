"""`hecate plan` forecasts the recipe of every published system over a tiny model, with what its experts train counted by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hecate.apps.foresee.dry_run import fits, forecast
from hecate.config import load_config
from hecate.model.sizes.run_shape import run_shape
from tests.hecate.apps.foresee.making import write_model

LAYERS, HIDDEN, FFN, KV = 4, 16, 24, 8
"""queries and outputs are as wide as hidden states"""
GATED = 3 * (HIDDEN + FFN)
"""inputs and outputs of an FFN's three projections"""
LINEAR = {
    "q_proj": HIDDEN + HIDDEN,
    "k_proj": HIDDEN + KV,
    "v_proj": HIDDEN + KV,
    "o_proj": HIDDEN + HIDDEN,
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), HIDDEN + FFN),
}
"""inputs and outputs of each linear"""


@dataclass(frozen=True)
class System:
    numbers: set[tuple[int, int]]
    """of each unit: its experts, and the numbers that one of them trains and moves"""
    pools: dict[int, int] | None = None
    """the numbers of a block -> the pools with such blocks"""
    overrides: tuple[str, ...] = ()


SYSTEMS = {
    "mola": System({(experts, 8 * width) for experts in (2, 4, 6, 8) for width in LINEAR.values()}),
    "smora": System({(64, width) for width in LINEAR.values()}),
    "llava_mole": System({(3, 32 * GATED)}),
    # A pool of four layers has shards for a rank of 4 at most.
    "mos": System({(1, 0)}, {2 * (HIDDEN + HIDDEN): 2, 2 * (HIDDEN + KV): 2, 2 * (HIDDEN + FFN): 3}, ("lora.r=4",)),
    "nola": System({(1, 2 * 256)}),
    "allora": System({(1, 8 * width) for width in LINEAR.values()}),
    "ffa_lora": System({(1, 8 * outputs) for outputs in (HIDDEN, KV, FFN)}),
    "reclora": System({(8, 8 * LINEAR["q_proj"]), (8, 8 * LINEAR["v_proj"])}),
    "adapters": System({(2, 16 * GATED)}, overrides=("moe.num_experts=2",)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes")
    write_model(path, num_hidden_layers=LAYERS)
    np.savez(path / "users.npz", ids=np.array(["u0", "u1"]), features=np.ones((2, 5)))
    return path


@pytest.mark.parametrize("recipe", SYSTEMS)
def test_a_recipe_is_forecast(folder: Path, recipe: str) -> None:
    system = SYSTEMS[recipe]
    given = [f"model.name_or_path={folder}/model", f"data.train=[{folder}/a.jsonl,{folder}/b.jsonl]", "data.seq_len=64"]
    given += [f"data.features={folder}/users.npz"] if recipe == "reclora" else []
    config = load_config(recipe, [*given, *system.overrides], claim_output=False, inputs=False)
    run = run_shape(config, "two-cpu-ranks", None)
    assert {(group.experts, int(group.cost.trainable_bytes) // 4) for group in run.groups} == system.numbers
    pools = {numel: sum(pool.numel == numel for pool in run.pools) for numel in {pool.numel for pool in run.pools}}
    assert pools == (system.pools or {})
    assert all(pool.blocks == LAYERS for pool in run.pools)

    found = forecast(run, "zipf")
    assert found.policies[0].policy == config.fssdp.policy
    assert fits(found.policies[0], run)
    assert all(math.isfinite(one.step_seconds) and one.step_seconds > 0 for one in found.policies)
    moved = {one.policy: one.bytes.near + one.bytes.far for one in found.policies}
    assert moved["full"] != moved["static_ep"]
