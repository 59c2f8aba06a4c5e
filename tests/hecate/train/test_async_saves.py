"""Whole runs that write checkpoints beside their steps: the same training and the same tensors, and a failure within a step."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from hecate.checkpoint.files import CheckpointError
from hecate.checkpoint.save import write_shard
from hecate.checkpoint.save_run import SaveUnderWay
from hecate.checkpoint.verify import find_damage
from hecate.config import load_config
from hecate.errors import UserError
from hecate.train.loop import train
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.train.in_process import OVERRIDES, ranks_of_default_group

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


def trained(rank: int, world: int, workshop: str, name: str, *overrides: str) -> str:
    """Train; the error that it ended with, if any."""
    given = (*OVERRIDES, "max_steps=4", "save_steps=1", f"output_dir={workshop}/runs/{name}", *overrides)
    try:
        assert train(load_config(f"{workshop}/config.yaml", given, claim_output=False), ranks_of_default_group(rank, world))
    except UserError as error:
        return str(error)
    return ""


def records(workshop: str, name: str, kind: str) -> list[dict[str, object]]:
    lines = Path(workshop, "runs", name, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_a_run_that_saves_beside_its_steps_leaves_the_same_tensors(workshop: str) -> None:
    reshards = "fssdp.reshard_interval=3"
    assert run_ranks(2, trained, workshop, "at-once", reshards) == ["", ""]
    assert run_ranks(2, trained, workshop, "beside", reshards, "save_async=true") == ["", ""]
    for key in ("loss", "grad_norm"):
        first, second = ([one[key] for one in records(workshop, name, "step")] for name in ("at-once", "beside"))
        assert first == second
    saved = [str(one["text"]) for one in records(workshop, "beside", "event") if str(one["text"]).startswith("saved ")]
    assert saved == [f"saved checkpoint-{step}" for step in (1, 2, 3, 4)]
    for step in (1, 2, 3, 4):
        folders = [Path(workshop, "runs", name, f"checkpoint-{step}") for name in ("at-once", "beside")]
        assert not list(find_damage(folders[1]))
        names = sorted(path.name for path in folders[0].glob("rank-*"))
        assert len(names) == 2
        for name in names:
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), (step, name)


def fail_at_step_2(rank: int, world: int, workshop: str) -> str:
    """Train with a disk that refuses rank 1's part of step 2."""

    def write(staging: Path, *arguments: object) -> None:
        if rank == 1 and staging.name.startswith("checkpoint-2."):
            raise CheckpointError("rank 1's disk is full")
        write_shard(staging, *arguments)  # type: ignore[arg-type]

    real = SaveUnderWay.requests

    def once_ended(save: SaveUnderWay) -> tuple[bool, bool]:
        """Rank 1 has ended by the next step, however fast that is."""
        if rank == 1 and save.thread is not None:
            save.thread._thread.join()
        return real(save)

    with mock.patch("hecate.checkpoint.save_run.write_shard", write), mock.patch.object(SaveUnderWay, "requests", once_ended):
        return trained(rank, world, workshop, "full", "save_async=true")


def test_a_full_disk_ends_all_ranks_within_a_step_and_the_older_checkpoint_is_good(workshop: str) -> None:
    first, second = run_ranks(2, fail_at_step_2, workshop)
    assert second == "rank 1's disk is full"
    assert first.endswith("checkpoint-2: rank 1 could not write its part: rank 1's disk is full"), "each rank says whose fault it is"
    assert [one["step"] for one in records(workshop, "full", "step")] == [1, 2, 3]
    left = sorted(path.name for path in Path(workshop, "runs/full").glob("checkpoint-*"))
    assert left == ["checkpoint-1"]
    assert not list(find_damage(Path(workshop, "runs/full/checkpoint-1")))
