"""hecate checkpoint list, show and verify on small checkpoints, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hecate.checkpoint.history import set_aside
from hecate.checkpoint.save import write_shard
from hecate.checkpoint.survey import survey
from hecate.cli import app, checkpoints
from hecate.errors import UserError
from tests.hecate.checkpoint.saving import META, flip_last_bit, save, shards_of

SECOND = "rank-00001-of-00002.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Whole: 3 and 1. Step 5 has a bad tensor, step 4 no COMMIT; one was moved aside, and a save was broken off."""
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, shards_of(float(step)), meta=META | ({"saved_at": 10**9} if step == 3 else {}))
    flip_last_bit(tmp_path / "checkpoint-5" / SECOND)
    (tmp_path / "checkpoint-4" / "COMMIT").unlink()
    set_aside(tmp_path / "checkpoint-2")
    write_shard(tmp_path / "checkpoint-6.tmp-dead", 0, 2, shards_of(6.0)[0])
    return tmp_path


def invoked(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    assert done.exit_code == status, done.output
    return done.output


def test_all_are_listed_with_what_is_wrong_as_far_as_manifests_tell(run: Path) -> None:
    listed = [(one.step, one.state, one.ranks) for one in survey(run)]
    assert listed == [
        (6, "unfinished save", None),
        (5, "whole", 2),
        (4, "damaged", None),
        (3, "whole", 2),
        (2, "damaged", None),
        (1, "whole", 2),
    ]
    values = json.loads(invoked("list", run, "--json"))
    assert [(one["step"], one["state"], one["ranks"]) for one in values] == listed
    files = list((run / "checkpoint-3").iterdir())
    assert values[3]["num_bytes"] == sum(file.stat().st_size for file in files)
    assert values[3]["when"] == 10**9
    assert values[5]["when"] == (run / "checkpoint-1" / "COMMIT").stat().st_mtime, "an early version's manifest has no time"
    assert "COMMIT: the file is missing" in values[2]["reason"]
    head, *lines = invoked("list", run).splitlines()
    assert head.split() == ["step", "when", "ranks", "bytes", "folder", "state"]
    assert [line.split()[0] for line in lines] == ["6", "5", "4", "3", "2", "1"]


def test_verify_names_file_and_tensor_and_ends_with_1(run: Path) -> None:
    text = invoked("verify", run, status=1)
    assert f"{run}/checkpoint-5: damaged\n  {run}/checkpoint-5/{SECOND}: tensor expert.1.master does not have" in text
    assert f"{run}/checkpoint-3: whole\n" in text
    verdicts = {Path(one["folder"]).name: one for one in json.loads(invoked("verify", run, "--json", status=1))}
    assert {name for name, one in verdicts.items() if one["whole"]} == {"checkpoint-1", "checkpoint-3"}
    (damage,) = verdicts["checkpoint-5"]["damage"]
    assert (damage["file"], damage["tensor"]) == (SECOND, "expert.1.master")
    assert invoked("verify", run / "checkpoint-3") == f"{run}/checkpoint-3: whole\n"


def test_verify_goes_on_after_the_first_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, shards_of(1.0))
    path = folder / "rank-00000-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[9] ^= 1  # the header
    data[-1] ^= 1
    path.write_bytes(data)
    flip_last_bit(folder / SECOND)
    (verdict,) = json.loads(invoked("verify", folder, "--json", status=1))
    found = [(one["file"], one["tensor"]) for one in verdict["damage"]]
    assert found == [(path.name, None), (path.name, "expert.0.master"), (SECOND, "expert.1.master")]


def test_show_tells_what_a_checkpoint_holds_and_obeys_nothing_in_it(tmp_path: Path) -> None:
    config = "model: {name_or_path: /models/tiny}\nmoe: {family: mixlora}\nmax_steps: 9\n"
    meta = {**META, "config": config, "owners": {"0": [0, 1, 0], "1": [1, 1, 0]}, "tokens": "\x1b[31m7"}
    folder = save(tmp_path, 4, shards_of(1.0), meta=meta)
    held = json.loads(invoked("show", tmp_path, "--json"))
    assert [held[key] for key in ("folder", "step", "ranks")] == [str(folder), 4, 2]
    assert [held[key] for key in ("base_model", "family", "max_steps")] == ["/models/tiny", "mixlora", 9]
    assert held["experts"] == {"0": 3, "1": 3}
    assert sum(of["bytes"] for of in held["tensors"].values()) == 2 * (3 * 5 * 4 + 8)
    text = invoked("show", folder)
    assert text.splitlines()[1].split() == ["step", "4", "of", "9"]
    assert "\x1b" not in text
    held = json.loads(invoked("show", save(tmp_path, 5, shards_of(1.0), meta={"config": ": {", "owners": [3]}), "--json"))
    assert (held["base_model"], held["experts"]) == (None, {})


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    assert invoked("list", tmp_path) == f"{tmp_path} has no checkpoint\n"
    for verb in (checkpoints.show, checkpoints.verify):
        with pytest.raises(UserError, match="neither a checkpoint nor a folder"):
            verb(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        checkpoints.list_checkpoints(tmp_path / "not there")


def test_a_folder_without_a_verb_is_answered_with_the_verbs(run: Path) -> None:
    with pytest.raises(UserError, match=f"`hecate checkpoint list {run}`.*`hecate checkpoint verify {run}`"):
        CliRunner().invoke(app, ["checkpoint", str(run)], catch_exceptions=False)
    assert "No such command 'lst'" in invoked("lst", run, status=2)
