"""The checkpoints under one root folder: which can be trusted, which may go."""

import itertools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from hecate.checkpoint.files import CheckpointError
from hecate.checkpoint.manifest import COMMIT, MANIFEST, read_manifest, step_of
from hecate.io.durable import delete_files, sync_folder

_log = logging.getLogger(__name__)
_STAGING = re.compile(r"checkpoint-[0-9]{1,16}\.tmp-[0-9A-Za-z]{1,64}")
_OUR_FILE = re.compile(r"rank-[0-9]{5}-of-[0-9]{5}\.(safetensors|json)|" + re.escape(MANIFEST) + "|" + COMMIT)


def good_checkpoints(root: Path) -> Iterator[Path]:
    """Committed checkpoints under `root` whose manifest is sound, newest step first.

    A warning gives the reason for each other one. Tensors are not read: if `read_tensors` of the first fails, go on to
    the next.
    """
    for folder in _committed(root):
        try:
            read_manifest(folder)
        except CheckpointError as error:
            _log.warning("checkpoint passed over: %s", error)
        else:
            yield folder


def latest_good(root: Path) -> Path | None:
    """The first of `good_checkpoints`; None if there is none, or no such folder."""
    return next(good_checkpoints(root), None)


def prune(root: Path, keep: int) -> list[Path]:
    """Delete the checkpoints older than the `keep` newest good ones. Returns what was deleted, oldest last.

    A damaged checkpoint newer than those is left for a look; one that holds any file that we do not write is never
    touched. With `keep` = 1 a flipped bit in a tensor leaves nothing to fall back to. Raises CheckpointError if the
    disk refuses.
    """
    assert keep >= 1, keep
    kept = list(itertools.islice(good_checkpoints(root), keep))
    deleted: list[Path] = []
    if not kept:
        return deleted
    folders = _committed(root)
    for folder in folders[folders.index(kept[-1]) + 1 :]:
        if not _is_ours(folder) or not {MANIFEST, COMMIT} <= set(os.listdir(folder)):
            _log.warning("%s holds files that no save wrote, or lacks some: not deleted", folder)
            continue
        # First out of the readers' sight in one step, so that a kill leaves no half of a checkpoint under its name.
        doomed = folder.with_name(f"{folder.name}.tmp-pruned")
        try:
            delete_files(doomed)
            os.rename(folder, doomed)
            sync_folder(root)
            delete_files(doomed)
        except OSError as error:
            raise CheckpointError(f"{folder}: the old checkpoint cannot be deleted: {error.strerror}") from error
        deleted.append(folder)
    return deleted


def remove_stale_staging(root: Path) -> list[Path]:
    """Delete the staging folders of saves that died; returns them. One rank calls it, with no save under way in `root`.

    A folder of that name with anything in it that no save writes, or a link, is left, with a warning.
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
            raise CheckpointError(f"{folder}: the leftover of a dead save cannot be deleted: {error.strerror}") from error
        deleted.append(folder)
    return deleted


def _committed(root: Path) -> list[Path]:
    """The folders named `checkpoint-{step}`, newest first."""
    steps = [(step_of(folder.name), folder) for folder in _folders(root)]
    return [folder for step, folder in sorted(((s, f) for s, f in steps if s is not None), reverse=True)]


def _folders(root: Path) -> list[Path]:
    """Folders under `root`, not links to folders."""
    try:
        with os.scandir(root) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def _is_ours(folder: Path) -> bool:
    """Whether the folder holds nothing but plain files with names that a save writes."""
    with os.scandir(folder) as entries:
        return all(entry.is_file(follow_symlinks=False) and _OUR_FILE.fullmatch(entry.name) for entry in entries)
