"""Whole runs on the way back from damage: what they say and record, and which checkpoints they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hecate.checkpoint.verify import find_damage
from hecate.config import load_config
from hecate.train.loop import train
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.checkpoint.saving import flip_last_bit
from tests.hecate.train.in_process import OVERRIDES, ranks_of_default_group


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


def trained_twice(rank: int, world: int, workshop: str) -> None:
    """Train 3 steps, damage the last checkpoint, and resume."""
    folder = f"{workshop}/runs/damaged"
    given = (*OVERRIDES, "max_steps=3", "save_steps=1", "save_total_limit=2", f"output_dir={folder}")
    ranks = ranks_of_default_group(rank, world)
    assert train(load_config(f"{workshop}/config.yaml", given, claim_output=False), ranks)
    if ranks.is_first:
        flip_last_bit(Path(folder, "checkpoint-3/rank-00001-of-00002.safetensors"))
    ranks.barrier()
    assert train(load_config(f"{workshop}/config.yaml", (*given, "resume=true"), claim_output=False), ranks)


@pytest.mark.slow
def test_a_run_records_what_it_passed_over_and_saves_that_step_again(workshop: str) -> None:
    run_ranks(2, trained_twice, workshop)
    folder = Path(workshop, "runs/damaged")
    (aside,) = folder.glob("*.damaged-*")
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3", aside.name]
    assert not list(find_damage(folder / "checkpoint-3"))
    records = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    told = [(record["step"], record["text"]) for record in records if record["kind"] == "event" and "damaged" in record["text"]]
    assert [step for step, _ in told] == [2, 3]
    assert "checkpoint-3/rank-00001-of-00002.safetensors: tensor owned/" in told[0][1]
    assert told[0][1].endswith("training goes on from checkpoint-2")
    assert told[1][1].startswith(f"checkpoint-3 is damaged and was moved aside to {aside.name}: ")
