"""List the sound checkpoints in a run's folder, move damaged ones aside, and delete old ones and what failed saves left behind."""

import itertools
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from hecate.checkpoint.files import CheckpointError, UnreadableError, read_small
from hecate.checkpoint.manifest import COMMIT, MANIFEST, Manifest, read_manifest, step_of
from hecate.checkpoint.meta import saved_at
from hecate.checkpoint.verify import first_damage
from hecate.io.durable import delete_files, sync_folder

_log = logging.getLogger(__name__)
OUTPUTS = ("adapter", "adapters", "model")
"""The names of the folders in which a run leaves what it has trained."""
SET_ASIDE = ".damaged-"
_PRUNED = ".tmp-pruned"
_ASIDE = re.compile(r"checkpoint-[0-9]{1,16}\.damaged-[0-9a-f]{1,64}")
_STAGING = re.compile(r"checkpoint-[0-9]{1,16}\.tmp-[0-9A-Za-z]{1,64}")
_said: set[tuple[Path, str]] = set()
"""The pairs of a checkpoint and a damage of it that this process has reported."""
_OUR_FILE = re.compile(r"rank-[0-9]{5}-of-[0-9]{5}\.(safetensors|json)|" + re.escape(MANIFEST) + "|" + COMMIT)


def good_checkpoints(root: Path) -> Iterator[Path]:
    """Yield the committed checkpoints in `root` whose manifests are sound, newest step first.

    Each damaged one is logged as a warning with the reason. Tensors are not read: if `read_tensors` fails for one checkpoint, try
    the next.
    """
    for folder, read in manifests(root):
        if isinstance(read, CheckpointError):
            _log.warning("checkpoint passed over: %s", read)
        else:
            yield folder


def manifests(root: Path) -> Iterator[tuple[Path, Manifest | CheckpointError]]:
    """Yield the committed checkpoints in `root`, newest step first, each with its manifest, or with what is wrong with it."""
    for folder in committed(root):
        try:
            read: Manifest | CheckpointError = read_manifest(folder)
        except CheckpointError as error:
            read = error
        yield folder, read


def latest_good(root: Path) -> Path | None:
    """Return the first of `good_checkpoints`, or None if there is none or `root` does not exist."""
    return next(good_checkpoints(root), None)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that its step can be saved again. Returns its new path, `checkpoint-{step}.damaged-{nonce}`.

    Nothing lists, counts or deletes it under that name. Raises CheckpointError if it cannot be renamed.
    """
    aside = folder.with_name(f"{folder.name}{SET_ASIDE}{secrets.token_hex(4)}")
    try:
        os.rename(folder, aside)
        sync_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(f"{folder}: is damaged and cannot be moved aside: {error.strerror}\n  remove or rename it") from error
    return aside


def retained(steps: Iterable[int], every: int) -> set[int]:
    """Return those of the steps that are kept for good: the first one at or after each multiple of `every` and before the next multiple.

    It stays the same when others are deleted. Source: Megatron-LM's --save-retain-interval, which keeps exact multiples only.
    """
    first: dict[int, int] = {}
    for step in sorted(steps):
        first.setdefault(step // every, step)
    return {step for stretch, step in first.items() if stretch > 0}


def retained_by_time(times: Mapping[int, int | None], hours: int) -> set[int]:
    """Return those steps that are kept for good: the first one in each stretch of so many hours, counted from 1970 on.

    It stays the same when others are deleted.

    Args:
        times: step -> when it was saved, in seconds since 1970; None, where a checkpoint does not say: it is not kept for its time.
    """
    first: dict[int, int] = {}
    for step, when in sorted(times.items()):
        if when is not None:
            first.setdefault(when // (3600 * hours), step)
    return set(first.values())


def prune(
    root: Path,
    keep: int,
    retain_steps: int | None = None,
    retain_hours: int | None = None,
    warn: Callable[[str], None] = _log.warning,
    best: int | None = None,
) -> list[Path]:
    """Delete the checkpoints older than the `keep` newest whole ones. Returns the deleted folders, oldest last.

    Whole means that every digest was verified; of what this process has written or verified before, tensors are not read again. If there
    are fewer than `keep` whole ones, nothing is deleted. A damaged checkpoint newer than those is kept for inspection, and a folder with
    any file that a save does not write is never deleted. Raises CheckpointError if the deletion fails.

    Args:
        retain_steps: see `retained`; these are not deleted. None: none.
        retain_hours: see `retained_by_time`; these are not deleted, either. None: none.
        warn: called with a text for each damaged checkpoint that does not count, once in a process.
        best: the step of the best model, whose checkpoint is not deleted; None: none is known.
    """
    assert keep >= 1, keep
    deleted: list[Path] = []
    folders = committed(root)
    _delete_pruned(root)
    if len(folders) <= keep:
        return deleted
    kept = list(itertools.islice((folder for folder in folders if _is_whole(folder, warn)), keep))
    if len(kept) < keep:
        return deleted
    for_good = retained((_step(folder) for folder in folders), retain_steps) if retain_steps else set()
    if best is not None:
        for_good.add(best)
    if retain_hours:
        for_good |= retained_by_time({_step(folder): _saved_at(folder) for folder in folders}, retain_hours)
    for folder in folders[folders.index(kept[-1]) + 1 :]:
        if _step(folder) in for_good:
            continue
        # The rename comes first, so that a process killed while deleting leaves no incomplete checkpoint under this name.
        doomed = folder.with_name(f"{folder.name}{_PRUNED}")
        try:
            if not _is_ours(folder) or not {MANIFEST, COMMIT} <= set(os.listdir(folder)):
                _log.warning("%s holds files that no save wrote, or lacks some: not deleted", folder)
                continue
            delete_files(doomed)
            os.rename(folder, doomed)
            sync_folder(root)
            delete_files(doomed)
        except OSError as error:
            raise CheckpointError(f"{folder}: the old checkpoint cannot be deleted: {error.strerror}") from error
        deleted.append(folder)
    return deleted


def _delete_pruned(root: Path) -> None:
    """Delete what is left of checkpoints whose deletion failed on the way. Raises CheckpointError: it fails again."""
    for folder in _folders(root):
        if _STAGING.fullmatch(folder.name) and folder.name.endswith(_PRUNED):
            try:
                delete_files(folder)
            except OSError as error:
                raise CheckpointError(f"{folder}: what is left of an old checkpoint cannot be deleted: {error.strerror}") from error


def remove_stale_staging(root: Path) -> list[Path]:
    """Delete the staging folders of saves that did not finish, and return them.

    One rank calls it, while no save in `root` is running. A staging folder with a link, or with a file that a save does not write,
    is kept and logged as a warning. Raises CheckpointError if the deletion fails.
    """
    deleted = []
    for folder in _folders(root):
        if not _STAGING.fullmatch(folder.name):
            continue
        if not _is_ours(folder):
            _log.warning("%s holds files that no save wrote: not deleted", folder)
            continue
        try:
            delete_files(folder)
        except OSError as error:
            raise CheckpointError(f"{folder}: the leftover of an unfinished save cannot be deleted: {error.strerror}") from error
        deleted.append(folder)
    return deleted


def committed(root: Path) -> list[Path]:
    """Return the folders named `checkpoint-{step}`, newest first."""
    return sorted((folder for folder in _folders(root) if step_of(folder.name) is not None), key=_step, reverse=True)


def stopped_early(root: Path) -> bool:
    """Return whether a run has begun in the folder, and has left neither a checkpoint, whole or not, nor what it has trained."""
    names = [path.name for path in _folders(root)]
    left = [name for name in names if name in OUTPUTS or step_of(name) is not None or _ASIDE.fullmatch(name)]
    return (root / "config.yaml").is_file() and not left


def left_over(root: Path) -> list[Path]:
    """Return the staging folders of saves that are under way or did not finish, and the damaged checkpoints that were moved aside."""
    return [folder for folder in _folders(root) if _STAGING.fullmatch(folder.name) or _ASIDE.fullmatch(folder.name)]


def _is_whole(folder: Path, warn: Callable[[str], None]) -> bool:
    try:
        damage = first_damage(folder)
    except UnreadableError as error:  # it may be whole, and does not count until that is known
        damage = str(error).splitlines()[0]
    if damage is not None and (folder, damage) not in _said:
        _said.add((folder, damage))
        warn(f"{folder.name} is damaged or cannot be read, and does not count as one of the latest checkpoints: {damage}")
    return damage is None


def _saved_at(folder: Path) -> int | None:
    """When a checkpoint was saved, as its manifest says; None: it does not, or is damaged."""
    try:
        return _time_in(folder, read_small(folder, COMMIT, 1024))
    except CheckpointError:
        return None


@cache
def _time_in(folder: Path, _commit: bytes) -> int | None:
    """The time in a manifest, which is read once for each COMMIT: a run may keep hundreds of checkpoints."""
    return saved_at(read_manifest(folder).meta)


def _step(folder: Path) -> int:
    step = step_of(folder.name)
    assert step is not None, folder
    return step


def _folders(root: Path) -> list[Path]:
    """Return the folders in `root`, without links to folders."""
    try:
        with os.scandir(root) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def _is_ours(folder: Path) -> bool:
    """Return whether the folder holds only plain files with names that a save writes."""
    with os.scandir(folder) as entries:
        return all(entry.is_file(follow_symlinks=False) and _OUR_FILE.fullmatch(entry.name) for entry in entries)
