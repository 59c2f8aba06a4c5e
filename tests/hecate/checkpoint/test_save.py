"""A save that is interrupted at any operation leaves only complete checkpoints (drills R5 to R7)."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hecate.checkpoint import CheckpointError, good_checkpoints, latest_good, read_manifest, remove_stale_staging
from hecate.checkpoint.manifest import manifest_value
from hecate.checkpoint.save import checkpoint_folder, commit, shard_bytes, staging_folder, write_shard
from hecate.errors import UserError
from hecate.io.strict_json import dump_json
from tests.hecate.checkpoint.disk import Killed, watched_disk, write_half
from tests.hecate.checkpoint.saving import META, holds, save, shards_of

ONE, TWO, TWO_AGAIN = shards_of(1.0), shards_of(2.0), shards_of(200.0)


def operations_of_a_save(root: Path) -> list[str]:
    """The file operations of a save of two ranks beside an older checkpoint."""
    seen: list[str] = []
    save(root, 1, ONE)
    with watched_disk(lambda number, operation, args: seen.append(operation)):
        save(root, 9, TWO)
    assert seen.count("rename") == 1
    return seen


def check_whole(root: Path) -> int:
    """Assert that every folder under a checkpoint's name is whole, with known contents. Returns the newest step."""
    named = sorted(path.name for path in root.iterdir() if ".tmp-" not in path.name)
    assert sorted(path.name for path in good_checkpoints(root)) == named
    newest = latest_good(root)
    assert newest is not None
    step = read_manifest(newest).step
    assert holds(checkpoint_folder(root, 1), ONE)
    if step == 2:
        assert holds(newest, TWO) or holds(newest, TWO_AGAIN)
    return step


def test_the_room_that_is_asked_for_is_enough_and_not_much_more(tmp_path: Path) -> None:
    tensors = {f"owned/{number}.down_proj": torch.zeros([1] * number + [300], dtype=torch.bfloat16) for number in range(8)}
    write_shard(staging_folder(tmp_path, 1, "a"), 0, 1, tensors)
    commit(staging_folder(tmp_path, 1, "a"), checkpoint_folder(tmp_path, 1), None, 1)
    written = sum(path.stat().st_size for path in checkpoint_folder(tmp_path, 1).iterdir())
    entries = len(dump_json(manifest_value(read_manifest(checkpoint_folder(tmp_path, 1)))))
    assert written + entries < shard_bytes(0, 1, tensors) < written + 3 * entries


def test_a_kill_before_or_inside_any_operation_tears_nothing(tmp_path: Path) -> None:
    total = len(operations_of_a_save(tmp_path / "count"))
    newest = []
    for fatal in range(1, total + 1):
        for inside in (False, True):
            root = tmp_path / f"run{fatal}{inside}"
            save(root, 1, ONE)

            def die(number: int, operation: str, args: tuple, fatal: int = fatal, inside: bool = inside) -> None:
                if number == fatal:
                    if inside and operation == "write":
                        write_half(args)
                    raise Killed

            with pytest.raises(Killed), watched_disk(die):
                save(root, 2, TWO)
            newest.append(check_whole(root))

            # The restarted run reaches the same step with other contents.
            remove_stale_staging(root)
            assert all(".tmp-" not in path.name for path in root.iterdir())
            if newest[-1] == 1:
                save(root, 2, TWO_AGAIN, nonce="b")
                assert holds(checkpoint_folder(root, 2), TWO_AGAIN)
    assert set(newest) == {1, 2}


def test_the_same_step_twice_with_a_kill_and_no_cleaning_never_mixes(tmp_path: Path) -> None:
    total = len(operations_of_a_save(tmp_path / "count"))
    for fatal in range(1, total, 3):
        for fatal_again in range(1, total, 4):
            root = tmp_path / f"run{fatal}-{fatal_again}"
            save(root, 1, ONE)
            for nonce, shards, last in (("a", TWO, fatal), ("b", TWO_AGAIN, fatal_again)):

                def die(number: int, operation: str, args: tuple, last: int = last) -> None:
                    if number == last:
                        raise Killed

                with pytest.raises(Killed), watched_disk(die):
                    save(root, 2, shards, nonce)
            check_whole(root)
            shutil.rmtree(root)


KILLER = """
import os, signal, sys
from pathlib import Path
from hecate.checkpoint import latest_good, read_manifest
from tests.hecate.checkpoint.disk import watched_disk
from tests.hecate.checkpoint.saving import holds, save, shards_of
steps = set()
for fatal in range(1, 100):
    root = Path(sys.argv[1]) / str(fatal)
    save(root, 1, shards_of(1.0))
    child = os.fork()
    if child == 0:
        def die(number, operation, args):
            if number == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
        with watched_disk(die):
            save(root, 2, shards_of(2.0), in_threads=sys.argv[2] == "True")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    newest = latest_good(root)
    step = read_manifest(newest).step
    assert holds(newest, shards_of(float(step))), (fatal, step)
    steps.add(step)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
assert steps == {1, 2}
print(fatal - 1)
"""


@pytest.mark.parametrize("in_threads", [False, True])
def test_sigkill_of_a_real_process_at_every_operation(tmp_path: Path, in_threads: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "runs"), str(in_threads)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(operations_of_a_save(tmp_path / "count"))


def test_everything_is_on_disk_before_the_rename_and_the_rename_before_the_return(tmp_path: Path) -> None:
    opened: dict[int, Path] = {}
    dirty: set[Path] = set()
    synced_before_rename: list[set[Path]] = []
    after_rename: list[Path] = []
    real_open = os.open

    def track_open(path: str, flags: int, *args: int) -> int:
        descriptor = real_open(path, flags, *args)
        opened[descriptor] = Path(path)
        return descriptor

    def note(number: int, operation: str, args: tuple) -> None:
        if operation == "write":
            dirty.add(opened[args[0]])
        elif operation == "fsync":
            dirty.discard(opened[args[0]])
            if synced_before_rename:
                after_rename.append(opened[args[0]])
        elif operation == "unlink" or (operation == "open" and args[1] & os.O_CREAT):
            dirty.add(Path(args[0]).parent)
        elif operation == "rename":
            synced_before_rename.append(set(dirty))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", track_open)
        with watched_disk(note):
            save(tmp_path, 1, ONE)
    assert synced_before_rename == [set()]
    assert after_rename == [tmp_path]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("lasting", [False, True])
def test_a_failing_disk_leaves_the_old_checkpoint_and_says_so(tmp_path: Path, code: int, lasting: bool) -> None:
    operations = operations_of_a_save(tmp_path / "count")
    for first in range(1, len(operations) + 1):
        root = tmp_path / str(first)
        save(root, 1, ONE)
        staging, final = staging_folder(root, 2, "a"), checkpoint_folder(root, 2)

        def fail(number: int, operation: str, args: tuple, first: int = first) -> None:
            # A full disk still deletes.
            if (number == first or (lasting and number > first)) and operation not in ("unlink", "rmdir"):
                raise OSError(code, os.strerror(code))

        with watched_disk(fail):
            try:
                write_shard(staging, 0, 2, TWO[0])
                write_shard(staging, 1, 2, TWO[1])
                commit(staging, final, META, 2)
                message = None
            except CheckpointError as error:
                message = str(error)
        if message is None:  # this disk deletes, and rank 1 finds the folder made
            assert not lasting
            assert operations[first - 1] in ("unlink", "mkdir")
        else:
            assert os.strerror(code) in message
            assert len(message.splitlines()) <= 8
        # Rank 1's failure leaves rank 0's shard, which is the caller's to discard; nothing else is left over.
        left = {path.name for path in staging.iterdir()} if staging.exists() else set()
        assert left <= {"rank-00000-of-00002.safetensors", "rank-00000-of-00002.json"}
        check_whole(root)


def test_full_disk_message_names_the_step_and_the_way_out(tmp_path: Path) -> None:
    def fail(number: int, operation: str, args: tuple) -> None:
        if operation == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    expected = r"(?s)cannot save checkpoint-7: No space left.*untouched.*free space"
    with pytest.raises(UserError, match=expected), watched_disk(fail):
        save(tmp_path, 7, ONE)
    assert list(tmp_path.iterdir()) == []


def test_a_committed_folder_holds_the_four_files_only(tmp_path: Path) -> None:
    folder = save(tmp_path, 5, ONE)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["COMMIT", "manifest.json", "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert read_manifest(folder).meta == META


def test_an_existing_checkpoint_is_never_written_over(tmp_path: Path) -> None:
    save(tmp_path, 5, ONE)
    with pytest.raises(UserError, match="checkpoint-5: exists already"):
        save(tmp_path, 5, TWO, nonce="b")
    assert holds(tmp_path / "checkpoint-5", ONE)
    (tmp_path / "checkpoint-6").mkdir()
    with pytest.raises(UserError, match="exists already"):
        save(tmp_path, 6, TWO)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6"]


def test_a_rival_that_commits_in_between_is_not_written_over(tmp_path: Path) -> None:
    def rival(number: int, operation: str, args: tuple) -> None:
        if operation == "rename" and not (tmp_path / "checkpoint-5").exists():
            shutil.copytree(old, tmp_path / "checkpoint-5")

    old = save(tmp_path / "elsewhere", 5, ONE)
    with pytest.raises(UserError, match="another process"), watched_disk(rival):
        save(tmp_path, 5, TWO)
    assert holds(tmp_path / "checkpoint-5", ONE)


def test_a_rank_that_wrote_nothing_is_named(tmp_path: Path) -> None:
    staging = staging_folder(tmp_path, 5, "a")
    write_shard(staging, 0, 2, ONE[0])
    with pytest.raises(UserError, match=r"rank-00001-of-00002\.json: the file is missing"):
        commit(staging, checkpoint_folder(tmp_path, 5), META, 2)
    assert list(tmp_path.iterdir()) == []


def test_one_name_from_two_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"both rank-00000-of-00002.*and rank-00001-of-00002.* hold tensor router"):
        save(tmp_path, 5, [{"router": torch.ones(1)}, {"router": torch.ones(1)}])


def test_a_shard_cut_short_after_it_was_written_is_refused(tmp_path: Path) -> None:
    staging = staging_folder(tmp_path, 5, "a")
    for rank in range(2):
        write_shard(staging, rank, 2, ONE[rank])
    os.truncate(staging / "rank-00001-of-00002.safetensors", 20)
    with pytest.raises(UserError, match=r"rank-00001-of-00002\.safetensors: 20 bytes"):
        commit(staging, checkpoint_folder(tmp_path, 5), META, 2)


def test_a_nonce_used_twice_is_refused_and_the_first_writer_kept(tmp_path: Path) -> None:
    staging = staging_folder(tmp_path, 5, "a")
    write_shard(staging, 0, 1, ONE[0])
    with pytest.raises(UserError, match="nonce"):
        write_shard(staging, 0, 1, TWO[0])
    commit(staging, checkpoint_folder(tmp_path, 5), META, 1)
    assert holds(tmp_path / "checkpoint-5", ONE[:1])


@pytest.mark.parametrize("meta", [{"rng": (1, 2)}, {1: "a"}, {"loss": float("nan")}])
def test_meta_that_json_would_change_is_refused(tmp_path: Path, meta: object) -> None:
    staging = staging_folder(tmp_path, 5, "a")
    write_shard(staging, 0, 1, ONE[0])
    with pytest.raises((AssertionError, ValueError)):
        commit(staging, checkpoint_folder(tmp_path, 5), meta, 1)
    assert not (tmp_path / "checkpoint-5").exists()
