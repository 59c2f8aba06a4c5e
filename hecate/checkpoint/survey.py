"""Say which checkpoints a folder has and what one holds, without torch and without reading tensors."""

import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hecate.checkpoint.files import CheckpointError
from hecate.checkpoint.history import SET_ASIDE, committed, left_over
from hecate.checkpoint.manifest import COMMIT, MANIFEST, Manifest, read_manifest, step_of
from hecate.checkpoint.meta import saved_at
from hecate.io.strict_yaml import YamlError, parse_yaml


@dataclass(frozen=True)
class ListedCheckpoint:
    """A checkpoint, or what is left of one, as far as its manifest and the sizes of its files tell."""

    folder: Path
    step: int
    when: float
    """The time of the save by the manifest, or else of the commit or the last write, in seconds since 1970."""
    ranks: int | None
    """The number of ranks that have written the checkpoint; None: it is not known."""
    num_bytes: int
    """The bytes of all its files, as they are now."""
    state: str
    """The state: `whole` (its tensors were not read), `damaged`, or `unfinished save`."""
    reason: str
    """Why the checkpoint is not whole; empty: it is."""


def survey(root: Path) -> list[ListedCheckpoint]:
    """List the checkpoints in a run's folder, newest step first, damaged ones that were moved aside and unfinished saves among them."""
    found = [_listed(folder, step_of(folder.name) or 0) for folder in committed(root)]
    for folder in left_over(root):
        step = step_of(folder.name.split(".")[0]) or 0
        if SET_ASIDE in folder.name:
            state, reason = "damaged", "it was moved aside; its step was saved again"
        else:
            state, reason = "unfinished save", "a save is under way, or was broken off: the run deletes it when it goes on"
        found.append(ListedCheckpoint(folder, step, _when(folder), None, _bytes_in(folder), state, reason))
    return sorted(found, key=lambda checkpoint: (-checkpoint.step, checkpoint.folder.name))


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether the folder is, or was, a checkpoint, and not a run's folder with checkpoints in it."""
    return step_of(folder.name) is not None or any((folder / name).exists() for name in (MANIFEST, COMMIT))


def contents(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, as a JSON value. Only its manifest is read. Raises CheckpointError if that is not sound.

    What the run has written into the manifest is null where it is missing or of another kind than expected.
    """
    manifest = read_manifest(folder)
    meta = manifest.meta if isinstance(manifest.meta, dict) else {}
    config = _config_in(meta)
    owners = meta["owners"] if isinstance(meta.get("owners"), dict) else {}
    return {
        "folder": str(folder),
        "step": manifest.step,
        "when": saved_at(meta) or _when(folder),
        "ranks": manifest.world_size,
        "bytes": _bytes_in(folder),
        "files": {file: os.stat(folder / file).st_size for file in manifest.files},
        "tensors": _kinds(manifest),
        "experts": {unit: len(owner_E) for unit, owner_E in owners.items() if isinstance(owner_E, list)},
        "base_model": _at(config, "model", "name_or_path"),
        "family": _at(config, "moe", "family"),
        "max_steps": _at(config, "max_steps"),
        "tokens": meta.get("tokens"),
        "skipped": meta.get("skipped"),
        "sequences_per_step": meta.get("rows_per_step"),
    }


def _kinds(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Number, bytes and dtypes of the tensors of each kind: `owned` or `replicated`, and which tensor of the optimizer's state it is."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    dtypes: dict[str, set[str]] = {}
    for name, entry in manifest.tensors.items():
        owner, *rest = name.split("/")
        kind = f"{owner} {rest[-1]}" if len(rest) > 1 else f"{owner} parameters"
        counts[kind] += 1
        sizes[kind] += entry.num_bytes
        dtypes.setdefault(kind, set()).add(entry.dtype)
    return {kind: {"tensors": counts[kind], "bytes": sizes[kind], "dtypes": sorted(dtypes[kind])} for kind in sorted(counts)}


def _listed(folder: Path, step: int) -> ListedCheckpoint:
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return ListedCheckpoint(folder, step, _when(folder), None, _bytes_in(folder), "damaged", str(error).splitlines()[0])
    when = saved_at(manifest.meta) or _when(folder)
    return ListedCheckpoint(folder, step, when, manifest.world_size, _bytes_in(folder), "whole", "")


def _when(folder: Path) -> float:
    for path in (folder / COMMIT, folder):
        with contextlib.suppress(OSError):
            return path.lstat().st_mtime
    return 0.0


def _bytes_in(folder: Path) -> int:
    """Bytes of the plain files in a folder; what vanishes meanwhile does not count."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                total += entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else 0
    return total


def _config_in(meta: Mapping[str, Any]) -> object:
    try:
        return parse_yaml(meta["config"])
    except (KeyError, YamlError):
        return None


def _at(value: object, *keys: str) -> str | int | None:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str | int) else None
