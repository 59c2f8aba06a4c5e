"""What a run has left, wherever it is: in its folder, in a checkpoint, or in the folder of an adapter or a model."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hecate.adapters.export import form_named, what_to_give, write_form
from hecate.adapters.folder import read_adapter_config, refuse_existing
from hecate.adapters.format_table import format_of, read_adapter
from hecate.adapters.formats.whole_model import is_model_folder
from hecate.adapters.sets.merging import merge_adapters
from hecate.apps.answers.bake_user import bake_user
from hecate.apps.answers.checkpointed import best_left_by, is_checkpoint, newest_checkpoint, write_checkpointed
from hecate.checkpoint.history import OUTPUTS
from hecate.config import Config
from hecate.config.files.paths import ADAPTER_CONFIG
from hecate.data.files.user_features import read_user_features
from hecate.errors import UserError
from hecate.io.plain_files import refuse_links
from hecate.ranks.ranks import join_ranks

_log = logging.getLogger(__name__)

RUN_CONFIG = "config.yaml"


def find_trained(path: Path, *, says: bool = True) -> Path:
    """Return the folder that a path means: an adapter, adapters of several sources, a model, or a checkpoint.

    A run's folder means what the run left at its end, or its newest checkpoint if it has gone on since, or was stopped before. A best model
    that was left (load_best_model_at_end) is still meant where the newest checkpoint knows of no better one. A whole
    model does not say after which step it was written, so that it is taken even if the run has gone on.

    Args:
        says: whether standard error says which was taken.

    Raises:
        UserError: a run's folder has neither, or holds a link.
    """
    if not (path / RUN_CONFIG).is_file() or is_checkpoint(path) or (path / ADAPTER_CONFIG).is_file() or is_model_folder(path):
        return path
    refuse_links(path)
    left = next((path / name for name in OUTPUTS if (path / name).is_dir()), None)
    newest = newest_checkpoint(path)
    if left is None and newest is None:
        raise UserError(
            f"{path}: the run has left neither an adapter nor a checkpoint\n"
            "  it was stopped before its first checkpoint (save_steps); start it again"
        )
    after = _steps_of(left) if left is not None else None
    if left is not None and (newest is None or after is None or newest[1] <= after or after == best_left_by(path, newest[0])):
        taken = left
    else:
        assert newest is not None
        taken = newest[0]
    if says:
        _log.info(f"hecate: {path}: takes {taken.name}")
    return taken


def default_trained(config: Config) -> Path:
    """Return the folder with what a configuration's run has trained."""
    folder = Path(config.output_dir)
    return folder if (folder / RUN_CONFIG).is_file() else folder / config.moe.output_folder


def run_config_of(path: Path) -> Path | None:
    """Return the configuration of the run that a folder is, or that has left it; None: there is none."""
    holders = [path]
    if is_checkpoint(path) or path.name in OUTPUTS:
        holders.append(path.absolute().parent)
    elif (path / ADAPTER_CONFIG).is_file():  # of one source
        holders.append(path.absolute().parent.parent)
    return next((folder / RUN_CONFIG for folder in holders if (folder / RUN_CONFIG).is_file()), None)


def export(
    trained: Path, out: Path, *, to: str | None = None, user: str | None = None, features: Path | None = None, model: str | None = None
) -> list[str]:
    """Write what a run has trained to the new folder `out`; what the user should know, line by line.

    Args:
        to: one of `hecate.adapters.export.FORMS`; None: a checkpoint becomes what its run would have left.
        user, features: write the LoRA of one user.
        model: the base model, in place of the one that was trained on.

    Raises:
        UserError: there is nothing to export, a form cannot hold it, the base model cannot be read, or a file cannot be read or written.
    """
    if to is not None:
        form_named(to)
    if to is not None and (user is not None or features is not None):
        raise UserError("--to and --user were given: what an adapter is for one user is written for PEFT\n  leave --to out")
    refuse_existing(out)
    found = find_trained(trained)
    with _as_left(found, out, model) as left:
        if user is not None or features is not None or (to is None and not is_checkpoint(found) and not is_model_folder(left)):
            bake(left, out, user, features)
            return []
        if is_model_folder(left) or to is None:
            if not is_checkpoint(found):
                raise UserError(f"{left}: is a whole model already, which transformers and servers load as it is\n  copy the folder")
            if to not in (None, "mixtral"):
                raise UserError(f"{found}: was trained with whole experts, which are no adapter\n  give --to mixtral, or no --to")
            left.rename(out)
            return []
        return write_form(to, read_adapter(left).on(model), out)


def merge(
    given: Sequence[Path],
    out: Path,
    method: str,
    weights: Sequence[float] | None,
    model: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    **options: Any,
) -> list[str]:
    """Merge what runs have trained into the new folder `out` (`merge_adapters`); what the user should know, line by line.

    Args:
        given: folders of adapters, or of runs. One that holds the adapters of several sources means all of them.

    Raises:
        UserError: a folder holds no adapter, or as `merge_adapters`.
    """
    refuse_existing(out)
    folders: list[Path] = []
    for path in given:
        found = find_trained(path)
        if is_checkpoint(found):
            raise UserError(f"{found}: is a checkpoint, and adapters are merged\n  hecate export {found} -o FOLDER makes one of it")
        if not found.exists():
            raise UserError(f"{found}: no such folder\n  give the folder of a run, or of an adapter")
        folders += format_of(found).adapters_in(found)
    return merge_adapters(folders, out, method, weights, model, progress, **options)


def bake(trained: Path, out: Path, user: str | None, features: Path | None) -> None:
    """Write the plain LoRA that an adapter is for one user (`bake_user`).

    Raises:
        UserError: no user is given, it has no features, the adapter has no plain LoRA as its equal, or a file cannot be read or written.
    """
    if user is None or features is None:
        if user is not None or features is not None:
            raise UserError("--user and --features: the one needs the other\n  give both")
        raise UserError(f"{trained}: say in which form it is to be written\n  {what_to_give(read_adapter(trained))}")
    found = read_user_features(features)
    row = found.row(user)
    bake_user(trained, out, user, torch.from_numpy(found.values_UF[row].astype("float64")))


@contextmanager
def _as_left(found: Path, out: Path, model: str | None) -> Iterator[Path]:
    """What a run has left; of a checkpoint, what it would have left, in a folder beside `out` that is removed afterwards."""
    if not is_checkpoint(found):
        yield found
        return
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.absolute().parent) as staging, join_ranks() as ranks:
        yield write_checkpointed(found, Path(staging), ranks, model)


def _steps_of(left: Path) -> int | None:
    """The steps after which an adapter was written; None: it does not say."""
    folder = next((one for one in (left, *sorted(left.iterdir())) if (one / ADAPTER_CONFIG).is_file()), None)
    if folder is None:
        return None
    try:
        return int(read_adapter_config(folder)["hecate"]["extra"]["training"]["steps"])
    except (KeyError, TypeError, ValueError):
        return None
