"""A run that torch's elastic agent has started again goes on by itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hecate.checkpoint import good_checkpoints
from hecate.config import Config
from hecate.errors import USER_ERROR_EXIT, UserError
from hecate.ranks.launched import ERRORS_VARIABLE, error_file
from hecate.ranks.ranks import Ranks, restarts


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
        # The rank that asked says why. This one's launcher must know, too, or it would start the ranks again.
        if errors := os.environ.get(ERRORS_VARIABLE):
            error_file(Path(errors), ranks.rank).write_text("hecate: rank 0 has met a mistake, and says which", encoding="utf-8")
        sys.exit(USER_ERROR_EXIT)
    return config
