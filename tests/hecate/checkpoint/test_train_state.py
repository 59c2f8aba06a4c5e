"""A run's state: what it holds, how all ranks save and load it, and what must be as it was for a run to go on."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from hecate.checkpoint import latest_good
from hecate.checkpoint.files import CheckpointError, UnreadableError
from hecate.checkpoint.manifest import Manifest, read_manifest
from hecate.checkpoint.meta import saved_at
from hecate.checkpoint.save_run import save_state
from hecate.checkpoint.shard import read_tensors
from hecate.checkpoint.train_state import NoCheckpointError, TrainState, load_state, refuse_other_run
from hecate.checkpoint.verify import find_damage
from hecate.config import Config, to_yaml
from hecate.errors import UserError
from hecate.parallel.values.loads import LoadHistory
from hecate.parallel.values.units import Unit
from testing.ranks import run_ranks
from tests.hecate.apps.megatron.making import config_of, ranks_of, write_parts
from tests.hecate.checkpoint.saving import flip_last_bit
from tests.hecate.checkpoint.stepping import state_of, stepped_parts


def meta_of(config: Config) -> dict[str, str]:
    return {"config": to_yaml(config)}


def test_what_makes_it_another_run_is_named_and_nothing_else(tmp_path: Path) -> None:
    write_parts(tmp_path)
    elsewhere = ("nproc=4", "fssdp.shard_size=2", "resume=true", "save_steps=7", "data.eval=[]", "max_steps=9", "fssdp.prefetch=2")
    before = meta_of(config_of(tmp_path))
    refuse_other_run(Path("checkpoint-1"), before, config_of(tmp_path, *elsewhere), "")
    with pytest.raises(UserError) as caught:
        refuse_other_run(Path("checkpoint-1"), before, config_of(tmp_path, *elsewhere, "seed=9", "moe.top_k=1"), "")
    assert str(caught.value).splitlines()[1:] == ["  moe.top_k: 2 then, 1 now", "  seed: 0 then, 9 now"]


def test_a_base_model_is_the_same_by_its_content_or_where_none_is_recorded_by_its_name(tmp_path: Path) -> None:
    write_parts(tmp_path)
    shutil.copy(tmp_path / "tiny.yaml", tmp_path / "moved.yaml")
    early, now = meta_of(config_of(tmp_path)), config_of(tmp_path, f"model.name_or_path={tmp_path}/moved.yaml")
    recorded = {**early, "base_model": "abc"}
    refuse_other_run(Path("checkpoint-1"), recorded, now, "abc")
    with pytest.raises(UserError, match=r"another base model than the one in model\.name_or_path, .*/moved\.yaml"):
        refuse_other_run(Path("checkpoint-1"), recorded, now, "abd")
    with pytest.raises(UserError, match=r"model.name_or_path: .* then, .*moved\.yaml' now"):
        refuse_other_run(Path("checkpoint-1"), early, now, "abc")


def saved_and_loaded(rank: int, world: int, folder: str, hidden: bool) -> tuple[int, int, list[float], list[float]]:
    """Save steps 1 and 2; rank 1 then lists no checkpoint (`hidden`), as where folders are seen late; load on new parts.

    What other matrices were drawn for is refused on the way.
    """
    ranks = ranks_of(rank, world)
    config = config_of(Path(folder))
    parts = replace(stepped_parts(rank, world), drawn_digest="ab")
    assert save_state(config, ranks, parts, state_of(parts, 1)).folder is not None
    state = replace(state_of(parts, 1), step=2)
    assert save_state(config, ranks, parts, state).folder is not None
    assert save_state(config, ranks, parts, state).folder is None
    loaded = replace(stepped_parts(rank, world), drawn_digest="ab")
    with pytest.raises(UserError, match="drew other matrices from seed 0"):
        load_state(config, ranks, replace(loaded, drawn_digest="cd"))
    with mock.patch("hecate.checkpoint.history.committed", return_value=[]) if hidden and rank == 1 else nullcontext():
        found = load_state(config, ranks, loaded).state
    values = [part.optimizer.replicated["r"].tolist() for part in (parts, loaded)]
    return found.step, found.tokens, values[0], values[1]


@pytest.mark.parametrize("hidden", [False, True])
def test_ranks_load_the_checkpoint_that_rank_0_names_though_listings_differ(tmp_path: Path, hidden: bool) -> None:
    write_parts(tmp_path)
    for step, tokens, saved, loaded in run_ranks(2, saved_and_loaded, str(tmp_path), hidden, timeout=60):
        assert (step, tokens) == (2, 10)
        assert saved == loaded


def manifests_read(rank: int, world: int, folder: str) -> int:
    """How often a rank reads, and hashes, a manifest to load the only checkpoint."""
    ranks, parts, config = ranks_of(rank, world), stepped_parts(rank, world), config_of(Path(folder))
    began = time.time()
    saved = save_state(config, ranks, parts, state_of(parts, 1))
    assert saved.folder is not None
    assert int(began) <= (saved_at(read_manifest(saved.folder).meta) or 0) <= time.time()
    read = mock.Mock(wraps=read_manifest)
    with mock.patch("hecate.checkpoint.history.read_manifest", read), mock.patch("hecate.checkpoint.train_state.read_manifest", read):
        load_state(config, ranks, parts)
    return read.call_count


def test_a_rank_reads_a_manifest_once(tmp_path: Path) -> None:
    write_parts(tmp_path)
    assert run_ranks(2, manifests_read, str(tmp_path)) == [1, 1]


def resumed_past_damage(rank: int, world: int, folder: str) -> tuple[int, tuple[str, ...], str, tuple[str, ...]]:
    """Save steps 1 to 3; damage a tensor of step 3, which only rank 1 needs, and the manifest of step 2. Load; save steps 2 and 3 again.

    The step that was loaded and what was said; the name of the newest checkpoint in the end and what was said.
    """
    ranks, parts, config = ranks_of(rank, world), stepped_parts(rank, world), config_of(Path(folder))
    root, begun = Path(config.output_dir), state_of(parts, 1)
    for step in (1, 2, 3):
        save_state(config, ranks, parts, replace(begun, step=step))
    if ranks.is_first:
        flip_last_bit(root / "checkpoint-3/rank-00000-of-00002.safetensors")
        (root / "checkpoint-2/COMMIT").write_text("0" * 32 + "\n")
    ranks.barrier()

    def read(folder: Path, manifest: Manifest, names: list[str]) -> dict[str, torch.Tensor]:
        return {} if rank == 0 and manifest.step == 3 else read_tensors(folder, manifest, names)

    with mock.patch("hecate.checkpoint.train_state.read_tensors", read):
        loaded = load_state(config, ranks, parts)
    said: list[str] = []
    for step in (2, 3):
        saved = save_state(config, ranks, parts, replace(loaded.state, step=step))
        assert saved.folder == root / f"checkpoint-{step}"
        said += saved.warnings
    newest = latest_good(root)
    assert newest is not None
    return loaded.state.step, loaded.warnings, newest.name, tuple(said)


def test_a_damaged_checkpoint_is_passed_over_named_and_replaced(tmp_path: Path) -> None:
    write_parts(tmp_path)
    first, second = run_ranks(2, resumed_past_damage, str(tmp_path))
    root = tmp_path / "out"
    assert first[:3] == second[:3]
    assert first[0] == 1
    bad_tensor, bad_manifest = first[1]
    file = root / "checkpoint-3/rank-00000-of-00002.safetensors"
    assert bad_tensor.startswith(f"checkpoint-3 is damaged and was passed over: {file}: tensor replicated/")
    assert bad_manifest.startswith(f"checkpoint-2 is damaged and was passed over: {root}/checkpoint-2/manifest.json: ")
    assert all(text.endswith("training goes on from checkpoint-1") for text in first[1])
    assert first[2] == "checkpoint-3"
    asides = sorted(path.name for path in root.glob("*.damaged-*"))
    assert [text.split(": ")[0] for text in first[3]] == [f"{name[:12]} is damaged and was moved aside to {name}" for name in asides]
    assert second[3] == ()
    assert sorted(path.name for path in root.iterdir()) == sorted(["checkpoint-1", "checkpoint-2", "checkpoint-3", *asides])
    assert not [*find_damage(root / "checkpoint-2"), *find_damage(root / "checkpoint-3")]
    assert len(list(find_damage(root / asides[1]))) == 1


def owners_adopted(rank: int, world: int, folder: str) -> tuple[int, int]:
    """Save steps 1 and 2, of which rank 1 alone cannot read the second; the step that was loaded, and how often owners were adopted."""
    ranks, parts, config = ranks_of(rank, world), stepped_parts(rank, world), config_of(Path(folder))
    for step in (1, 2):
        save_state(config, ranks, parts, replace(state_of(parts, 1), step=step))

    def read(folder: Path) -> Manifest | CheckpointError:
        return CheckpointError("the file system is slow") if rank == 1 and folder.name == "checkpoint-2" else read_manifest(folder)

    adopted = mock.Mock()
    with mock.patch("hecate.checkpoint.train_state.read_manifest", read), mock.patch("hecate.checkpoint.train_state.adopt_owners", adopted):
        loaded = load_state(config, ranks, parts)
    return loaded.state.step, adopted.call_count


def test_owners_whose_frozen_parts_travel_are_adopted_by_all_ranks_or_none(tmp_path: Path) -> None:
    write_parts(tmp_path)
    assert run_ranks(2, owners_adopted, str(tmp_path), timeout=60) == [(1, 1), (1, 1)]


def loaded_with_mistakes(rank: int, world: int, folder: str) -> tuple[int, tuple[str, ...], str]:
    """Save steps 1 and 2. Load, where the position of step 2 is none in these data; load, where this program itself makes a mistake."""
    ranks, parts, config = ranks_of(rank, world), stepped_parts(rank, world), config_of(Path(folder))
    begun = state_of(parts, 1)
    for step in (1, 2):
        save_state(config, ranks, parts, replace(begun, step=step))
    parts.stream.check_state_dict.side_effect = [KeyError("mixture"), None, None]  # type: ignore[union-attr]
    loaded = load_state(config, ranks, parts)
    with pytest.raises(Exception, match="our own") as caught, mock.patch.object(LoadHistory, "redeal", side_effect=TypeError("our own")):
        load_state(config, ranks, parts)
    return loaded.state.step, loaded.warnings, repr(caught.value)


def test_a_position_that_is_none_is_damage_and_a_mistake_of_the_program_is_not(tmp_path: Path) -> None:
    write_parts(tmp_path)
    ((step, (said,), mistake),) = run_ranks(1, loaded_with_mistakes, str(tmp_path))
    assert step == 1
    assert said.startswith(f"checkpoint-2 is damaged and was passed over: {tmp_path}/out/checkpoint-2/manifest.json: ")
    assert "what its run says there is damaged: KeyError: 'mixture'" in said
    assert mistake == "TypeError('our own')"


def saved_without_room(rank: int, world: int, folder: str) -> tuple[str, list[str]]:
    """Save step 1; save step 2 where one byte less is free than needed, then exactly as much. The error of rank 0, and what it has left."""
    ranks, parts, config = ranks_of(rank, world), stepped_parts(rank, world), config_of(Path(folder))
    begun, root = state_of(parts, 1), Path(config.output_dir)
    save_state(config, ranks, parts, begun)
    size = sum(file.stat().st_size for file in (root / "checkpoint-1").iterdir() if file.suffix == ".safetensors")
    text, left = "", []
    for free in (size, 10 * size):
        with mock.patch("os.statvfs", return_value=mock.Mock(f_bavail=free, f_frsize=1, f_blocks=10**9)):
            try:
                save_state(config, ranks, parts, replace(begun, step=2))
            except UserError as error:
                text, left = str(error), sorted(path.name for path in root.iterdir())
    assert (root / "checkpoint-2").is_dir()
    return text, left


def test_a_save_without_room_writes_nothing_and_says_how_much_is_needed(tmp_path: Path) -> None:
    write_parts(tmp_path)
    (said, left), (other, _) = run_ranks(2, saved_without_room, str(tmp_path))
    assert left == ["checkpoint-1"]
    free, needed = (int(number.replace(",", "")) for number in re.findall(r"([0-9,]+) (?:bytes free|are needed)", said))
    assert free < needed
    assert said.startswith(f"cannot save checkpoint-2: {tmp_path}/out has ")
    assert "save_total_limit" in said
    assert "output_dir" in said
    assert "rank 0 could not write its part" in other


def nothing_to_load(rank: int, world: int, folder: str) -> str:
    try:
        load_state(config_of(Path(folder)), ranks_of(rank, world), stepped_parts(rank, world))
    except NoCheckpointError as error:
        return str(error)
    return ""


def test_that_there_is_no_checkpoint_is_said_without_a_guess_who_asked(tmp_path: Path) -> None:
    write_parts(tmp_path)
    bad = tmp_path / "out" / "checkpoint-3"
    bad.mkdir(parents=True)
    for text in run_ranks(2, nothing_to_load, str(tmp_path)):
        assert text.startswith(f"{tmp_path}/out has no checkpoint that can be read")
        assert "resume" not in text


def test_a_state_travels_as_json_and_steps_are_counted(tmp_path: Path) -> None:
    parts = stepped_parts(0, 1)
    state = state_of(parts, 2)
    assert (state.step, state.completed, state.tokens, len(state.history)) == (2, 0, 20, 2)
    again = TrainState.from_json(json.loads(json.dumps(state.to_json())))
    assert again.to_json() == state.to_json()
    assert (again.completed, again.sequences_per_step) == (2, 4)
    skipped = state.after_step(parts, tokens=5, skipped=True).after_step(parts, tokens=5, skipped=True)
    assert (skipped.skipped, skipped.skipped_in_a_row) == (2, 2)
    assert skipped.after_step(parts, tokens=5, skipped=False).skipped_in_a_row == 0
    # A checkpoint of an early version: no count of skipped steps.
    early = {key: value for key, value in state.to_json().items() if not key.startswith("skipped")}
    assert TrainState.from_json(early).to_json() == state.to_json()


def test_a_step_under_way_is_undone(tmp_path: Path) -> None:
    parts = stepped_parts(0, 1)
    state = state_of(parts, 1)
    parts.engine.shards.history.record({Unit(0): np.array([[9, 9], [9, 9]])})
    parts.optimizer.replicated["r"].grad = torch.ones(3, dtype=torch.float64)
    state.put_back(parts)
    assert len(parts.engine.shards.history.snapshot()) == 1
    assert parts.optimizer.replicated["r"].grad is None
    parts.stream.load_state_dict.assert_called_with({"rows": 8})  # type: ignore[attr-defined]


def loading_what_one_rank_cannot_read(rank: int, world: int, folder: str) -> str:
    ranks, parts, config = ranks_of(rank, world), stepped_parts(rank, world), config_of(Path(folder))
    for step in (1, 2):
        save_state(config, ranks, parts, state_of(parts, step))
    real = os.preadv

    def refused(descriptor: int, *given: Any) -> int:
        if rank == 1 and os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors"):
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, *given)

    with mock.patch("hecate.checkpoint.files.os.preadv", refused), pytest.raises(UnreadableError) as caught:
        load_state(config, ranks, parts)
    assert load_state(config, ranks, parts).state.step == 2
    return str(caught.value)


def test_a_checkpoint_that_the_system_does_not_let_a_rank_read_is_not_passed_over(tmp_path: Path) -> None:
    """An older one would be trained on from there, and the newer one would be lost when its step is saved again."""
    write_parts(tmp_path)
    first, second = run_ranks(2, loading_what_one_rank_cannot_read, str(tmp_path))
    for text in (first, second):
        assert "checkpoint-2" in text
        assert "cannot be read: Input/output error" in text
        assert "try again" in text
