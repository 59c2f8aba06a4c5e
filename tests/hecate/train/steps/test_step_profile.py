"""A run with `profile` leaves one timeline of all its ranks, and trains the same."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from hecate.config import load_config
from hecate.ranks.ranks import Ranks
from hecate.train.loop import train
from hecate.train.steps.step_profile import BEFORE, STEPS, TIMELINE, StepProfile
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.train.in_process import ranks_of_default_group


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


def losses(rank: int, world: int, workshop: str, steps: int) -> list[list[float]]:
    """Of a run without a profile, and of one with it."""
    found = []
    for profile in ("false", "true"):
        folder = f"{workshop}/runs/{steps}-{profile}"
        keys = (f"max_steps={steps}", f"profile={profile}", "data.eval=[]", "eval.generate=false", f"output_dir={folder}")
        assert train(load_config(f"{workshop}/config.yaml", keys, claim_output=False), ranks_of_default_group(rank, world))
        records = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        found.append([record["loss"] for record in records if record["kind"] == "step"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("steps", [BEFORE + 1, BEFORE + STEPS + 1])
def test_all_ranks_are_in_one_file(workshop: str, steps: int) -> None:
    """Of a run that ends within the steps that are recorded, and of one that goes on after them."""
    plain, profiled = run_ranks(2, losses, workshop, steps)[0]
    assert plain == profiled
    assert len(plain) == steps
    folder = Path(workshop) / "runs" / f"{steps}-true"
    events = json.loads(gzip.decompress((folder / TIMELINE).read_bytes()))["traceEvents"]
    for rank in range(2):
        own = [event for event in events if str(event.get("pid", "")).startswith(f"rank {rank}: ")]
        assert sum(event.get("name") == "hecate: step" and event.get("ph") == "X" for event in own) == min(steps - BEFORE, STEPS)
        assert any(event.get("name") == "aten::mm" for event in own)
    assert not list(folder.glob("profile-rank-*"))
    assert not (Path(workshop) / "runs" / f"{steps}-false" / TIMELINE).exists()


def test_there_is_none_of_other_ranks_nor_of_first_steps(tmp_path: Path) -> None:
    ranks = mock.create_autospec(Ranks, instance=True, rank=0, world_size=1, is_first=True, device=torch.device("cpu"))
    short = StepProfile(tmp_path, ranks, wanted=True)
    with short.step():
        pass
    assert short.merge() is None
    assert "nothing was recorded, because the first 2 steps" in (short.merge(at_end=True) or "")
    changed = StepProfile(tmp_path, ranks, wanted=True)
    for _ in range(BEFORE + 1):
        with changed.step():
            pass
    assert changed.give_up() == "profile: given up, because the ranks have changed"
    assert changed.give_up() is None
    assert changed.merge(at_end=True) is None
    assert not list(tmp_path.iterdir())
