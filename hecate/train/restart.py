"""A run that torch's elastic agent has started again goes on by itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hecate.checkpoint import good_checkpoints
from hecate.config import Config
from hecate.errors import USER_ERROR_EXIT, UserError
from hecate.train.ranks import Ranks, restarts


def begin_or_resume(config: Config, ranks: Ranks, claim: Callable[[], object] | None) -> Config:
    """The configuration to train with: after a restart, with `resume` where there is a checkpoint. Every rank must call it.

    A rank cannot tell alone: an agent counts its own restarts, and one on a node that has come new has none.

    Args:
        claim: raises UserError if the output folder is taken; called on the ranks that have one, before a run's beginning only.
    """
    if ranks.all_max(float(restarts())):
        there = next(good_checkpoints(Path(config.output_dir)), None) if ranks.is_first else None
        return replace(config, resume=ranks.all_max(float(there is not None)) > 0)
    taken: UserError | None = None
    if claim is not None:
        try:
            claim()
        except UserError as error:
            taken = error
    if ranks.all_max(float(taken is not None)):
        if taken is not None:
            raise taken
        sys.exit(USER_ERROR_EXIT)  # the rank that asked says why
    return config
