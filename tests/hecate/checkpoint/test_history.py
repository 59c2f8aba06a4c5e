"""Which checkpoints are listed as sound, which are deleted, and which are never touched."""

import errno
import logging
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest

from hecate.checkpoint.files import CheckpointError
from hecate.checkpoint.history import good_checkpoints, latest_good, prune, remove_stale_staging, set_aside, stopped_early
from hecate.checkpoint.save import write_shard
from tests.hecate.checkpoint.disk import OPERATIONS, Killed, watched_disk
from tests.hecate.checkpoint.saving import META, flip_last_bit, holds, save, shards_of


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def damage(folder: Path) -> None:
    (folder / "COMMIT").write_text("0" * 32 + "\n")


def test_newest_is_by_number_not_by_name_or_time(tmp_path: Path) -> None:
    for step in (100, 20, 9):
        save(tmp_path, step, shards_of(float(step)))
    assert latest_good(tmp_path) == tmp_path / "checkpoint-100"
    assert [path.name for path in good_checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]


def test_a_damaged_one_is_passed_over_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, shards_of(float(step)))
    damage(tmp_path / "checkpoint-3")
    os.truncate(tmp_path / "checkpoint-2" / "rank-00001-of-00002.safetensors", 10)
    with caplog.at_level(logging.WARNING):
        assert latest_good(tmp_path) == tmp_path / "checkpoint-1"
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "checkpoint-3/manifest.json: its digest" in caplog.messages[0]
    assert "checkpoint-2/rank-00001-of-00002.safetensors: 10 bytes" in caplog.messages[1]


def test_nothing_to_find(tmp_path: Path) -> None:
    assert latest_good(tmp_path / "not there") is None
    (tmp_path / "checkpoint-5.tmp-x").mkdir()
    (tmp_path / "checkpoint-5x").mkdir()
    (tmp_path / "checkpoint-05").mkdir()
    (tmp_path / "checkpoint-6").write_text("a file")
    assert latest_good(tmp_path) is None


def test_a_link_to_a_checkpoint_is_not_found(tmp_path: Path) -> None:
    save(tmp_path / "other", 8, shards_of(1.0))
    (tmp_path / "checkpoint-8").symlink_to(tmp_path / "other" / "checkpoint-8")
    assert latest_good(tmp_path) is None


def test_prune_keeps_the_newest_good_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, shards_of(float(step)))
    assert [path.name for path in prune(tmp_path, 2)] == ["checkpoint-2", "checkpoint-1"]
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    assert prune(tmp_path, 2) == []


def test_a_deletion_that_failed_on_the_way_is_ended_by_the_next_one(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, shards_of(float(step)))
    with mock.patch("os.rmdir", side_effect=OSError(5, "Input/output error")), pytest.raises(CheckpointError, match="cannot be deleted"):
        prune(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-1.tmp-pruned", "checkpoint-2"]
    assert prune(tmp_path, 1) == []
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_run_that_was_stopped_before_its_first_checkpoint_is_known(tmp_path: Path) -> None:
    assert not stopped_early(tmp_path)  # no run has begun there
    (tmp_path / "config.yaml").touch()
    assert stopped_early(tmp_path)
    for left in ("adapter", "model", "checkpoint-3", "checkpoint-3.damaged-ab"):
        (tmp_path / left).mkdir()
        assert not stopped_early(tmp_path)
        (tmp_path / left).rmdir()


def test_prune_counts_good_ones_only(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, shards_of(float(step)))
    damage(tmp_path / "checkpoint-4")
    damage(tmp_path / "checkpoint-2")
    prune(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    damage(tmp_path / "checkpoint-3")
    assert prune(tmp_path, 1) == []
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]


def test_prune_counts_no_checkpoint_with_a_bad_tensor_and_reads_each_once(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, shards_of(float(step)))
    for step in (2, 4):
        flip_last_bit(tmp_path / f"checkpoint-{step}" / "rank-00001-of-00002.safetensors")
    said: list[str] = []
    assert prune(tmp_path, 3, warn=said.append) == []
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert [text.split(" ")[0] for text in said] == ["checkpoint-4", "checkpoint-2"]
    assert "checkpoint-2/rank-00001-of-00002.safetensors: tensor expert.1.master" in said[1]
    with mock.patch("hecate.checkpoint.verify.find_damage", side_effect=AssertionError("read again")):
        assert [path.name for path in prune(tmp_path, 1, warn=said.append)] == ["checkpoint-2", "checkpoint-1"]
    assert len(said) == 2
    assert holds(tmp_path / "checkpoint-3", shards_of(3.0))


def test_prune_keeps_the_best_beside_the_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, shards_of(float(step)))
    assert [path.name for path in prune(tmp_path, 2, best=2)] == ["checkpoint-3", "checkpoint-1"]
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert [path.name for path in prune(tmp_path, 1, best=5)] == ["checkpoint-4", "checkpoint-2"]


def test_one_in_each_stretch_of_steps_is_kept_for_good_and_stays_the_same_one(tmp_path: Path) -> None:
    kept = {}
    for step in range(2, 25, 2):
        save(tmp_path, step, shards_of(float(step)))
        prune(tmp_path, 2, 5)
        kept[step] = sorted(int(path.name.partition("-")[2]) for path in tmp_path.iterdir())
    assert kept[8] == [6, 8]
    assert kept[10] == [6, 8, 10]
    assert kept[16] == [6, 10, 14, 16]
    assert kept[24] == [6, 10, 16, 20, 22, 24]


def test_one_in_each_stretch_of_hours_is_kept_for_good_by_the_time_in_the_checkpoint(tmp_path: Path) -> None:
    hour = 3600
    times = {
        1: 50 * hour - 1,
        2: 50 * hour,
        3: 51 * hour,
        4: 53 * hour,
        5: None,
        6: 49 * hour,
        7: "56",
        8: 54 * hour,
        9: True,
        10: 1,
        11: 2,
    }
    for step, when in times.items():
        folder = save(tmp_path, step, shards_of(float(step)), meta=META | ({} if when is None else {"saved_at": when}))
        os.utime(folder, (step, step))
        os.utime(folder / "COMMIT", (step, step))
        prune(tmp_path, 2, None, 2)
    # Stretches of two hours: 1 and 6; 2 and 3; 4; 8. The clock of the saves of 6, 10 and 11 was wrong.
    assert sorted(int(path.name.partition("-")[2]) for path in tmp_path.iterdir()) == [1, 2, 4, 8, 10, 11]
    damage(tmp_path / "checkpoint-1")
    assert [path.name for path in prune(tmp_path, 1, retain_hours=2)] == ["checkpoint-1"]
    assert [path.name for path in prune(tmp_path, 1, 8, 2)] == []
    assert [path.name for path in prune(tmp_path, 1, 8)] == ["checkpoint-10", "checkpoint-4", "checkpoint-2"]


def test_what_was_set_aside_is_neither_listed_nor_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, shards_of(float(step)))
    aside = set_aside(tmp_path / "checkpoint-3")
    assert aside.name.startswith("checkpoint-3.damaged-")
    assert latest_good(tmp_path) == tmp_path / "checkpoint-2"
    assert [path.name for path in prune(tmp_path, 1)] == ["checkpoint-1"]
    assert remove_stale_staging(tmp_path) == []
    assert names(tmp_path) == ["checkpoint-2", aside.name]


def test_prune_leaves_what_is_not_ours(tmp_path: Path) -> None:
    for step in (2, 3, 4):
        save(tmp_path, step, shards_of(float(step)))
    (tmp_path / "checkpoint-2" / "notes.txt").write_text("mine")
    foreign = tmp_path / "checkpoint-1"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"another trainer's")
    (tmp_path / "checkpoint-0").mkdir()
    (tmp_path / "best").mkdir()
    (tmp_path / "linked").mkdir()
    prune(tmp_path, 1)
    assert names(tmp_path) == ["best", "checkpoint-0", "checkpoint-1", "checkpoint-2", "checkpoint-4", "linked"]
    assert (foreign / "model.safetensors").read_bytes() == b"another trainer's"


def test_a_kill_inside_prune_leaves_whole_checkpoints(tmp_path: Path) -> None:
    for fatal in range(1, 200):
        root = tmp_path / str(fatal)
        for step in (1, 2):
            save(root, step, shards_of(float(step)))

        def die(number: int, operation: str, args: tuple, fatal: int = fatal) -> None:
            if number == fatal:
                raise Killed

        try:
            with watched_disk(die):
                prune(root, 1)
        except Killed:
            pass
        else:
            break
        for folder in root.glob("checkpoint-?"):
            assert holds(folder, shards_of(float(folder.name[-1])))
        assert latest_good(root) == root / "checkpoint-2"
        remove_stale_staging(root)
        assert all(".tmp-" not in name for name in names(root))
    assert 10 < fatal < 199


def test_prune_that_the_disk_refuses_says_so(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, shards_of(float(step)))

    def refuse(number: int, operation: str, args: tuple) -> None:
        assert operation in OPERATIONS
        if operation == "rename":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.raises(CheckpointError, match=r"checkpoint-1: .*Read-only"), watched_disk(refuse):
        prune(tmp_path, 1)


def test_prune_says_so_if_another_program_deletes_at_the_same_time(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, shards_of(float(step)))

    def first_damage_after_deletion(folder: Path) -> str | None:
        shutil.rmtree(tmp_path / "checkpoint-1", ignore_errors=True)
        return None

    with (
        mock.patch("hecate.checkpoint.history.first_damage", first_damage_after_deletion),
        pytest.raises(CheckpointError, match="checkpoint-1: "),
    ):
        prune(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-2"]


def test_stale_staging_goes_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1, shards_of(1.0))
    write_shard(tmp_path / "checkpoint-2.tmp-dead", 0, 2, shards_of(2.0)[0])
    (tmp_path / "checkpoint-3.tmp-empty").mkdir()
    mine = tmp_path / "checkpoint-4.tmp-mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-5.tmp-link").symlink_to(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-x.tmp-a").mkdir()
    assert [path.name for path in remove_stale_staging(tmp_path)] == ["checkpoint-2.tmp-dead", "checkpoint-3.tmp-empty"]
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4.tmp-mine", "checkpoint-5.tmp-link", "checkpoint-x.tmp-a"]
    assert holds(tmp_path / "checkpoint-1", shards_of(1.0))
    assert remove_stale_staging(tmp_path / "not there") == []
