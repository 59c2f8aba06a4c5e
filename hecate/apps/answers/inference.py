"""Using what a run has left, an adapter, a checkpoint or a whole model: evaluation, by one rank or several, and answers, in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hecate.apps.answers.compare import Questions, compare, figures_json, show_figures
from hecate.apps.answers.opened import Opened, open_trained
from hecate.config import Config
from hecate.data.files.user_features import UserFeatures, read_user_features
from hecate.errors import UserError
from hecate.io.durable import replace_output
from hecate.io.terminal import show_text
from hecate.model.base import BaseChoice
from hecate.ranks.ranks import join_ranks


def evaluate_models(config: Config | None, names: Sequence[str], questions: Questions, json_path: Path | None = None) -> None:
    """Print what models make of held-out data and questions, side by side; see `hecate.apps.answers.compare.compare`.

    Args:
        json_path: a file that gets all figures; -: standard output, in place of the table.

    Raises:
        UserError: as `compare`; or the file cannot be written.
    """
    with join_ranks() as ranks:
        found = compare(config, names, questions, ranks)
        if not ranks.is_first:
            return
        if json_path == Path("-"):
            show_text(figures_json(found))
            return
        show_figures(found)  # before the file, which may fail
        if json_path is not None:
            try:
                replace_output(json_path, [figures_json(found).encode() + b"\n"])
            except OSError as error:
                raise UserError(f"{json_path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def answering(trained: Path, *, model: str | None = None, user: str | None = None, features: Path | None = None) -> Iterator[Opened]:
    """Open what was trained, for answers.

    Args:
        model: the base model, in place of the one that was trained on.
        user: the id of the user who asks, for adapters that decide by users; None: each prompt says it.
        features: the file with the users' features.

    Raises:
        UserError: as `open_trained`; or the user has no features, or none were given.
    """
    users = _asking(user, features)
    with join_ranks() as ranks:
        yield open_trained(trained, ranks, BaseChoice(model), users)


def _asking(user: str | None, features: Path | None) -> UserFeatures | None:
    """The features among which those of the user are; None: none are given. Raises UserError: a user is given without them."""
    if features is None:
        if user is not None:
            raise UserError("--user was given without --features FILE.npz; an adapter that decides by users needs both")
        return None
    found = read_user_features(features)
    if user is not None:
        found.row(user)
    return found
