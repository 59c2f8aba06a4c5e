"""Lets a run whose ranks a launcher has started again go on from its last checkpoint."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hecate.checkpoint import good_checkpoints
from hecate.config import Config
from hecate.errors import USER_ERROR_EXIT, UserError
from hecate.ranks.launcher_files import ERRORS_VARIABLE, MEMBER_VARIABLE, STORE_VARIABLE, error_file
from hecate.ranks.ranks import Ranks, first_generation, restarts


def begin_or_resume(config: Config, ranks: Ranks, claim: Callable[[], object] | None) -> Config:
    """The configuration to train with. After a restart it has `resume=true` if there is a checkpoint. Every rank must call it.

    The ranks must agree on whether there was a restart. hecate's launchers inform all of them; torch's elastic agents count each its own
    restarts, and the agent of a new node has counted none.

    Args:
        claim: a function that raises UserError if the output folder is taken; None on ranks that do not check this. It is called only at
            the beginning of a run.
    """
    claimed = Path(os.environ[STORE_VARIABLE]).with_name("claimed") if STORE_VARIABLE in os.environ else None
    # The first rank says whether it is this run that begins again: one that was lost before it had claimed the folder has begun none.
    again = first_generation() > 0 and (claim is None or claimed is None or claimed.exists())
    if ranks.all_max(float(again and (ranks.is_first or restarts() > 0))):
        newest = next(good_checkpoints(Path(config.output_dir)), None) if ranks.is_first else None
        return replace(config, resume=ranks.all_max(float(newest is not None)) > 0)
    taken: UserError | None = None
    if claim is not None:
        try:
            claim()
        except UserError as error:
            taken = error
        else:
            if claimed:
                claimed.touch()
    # Agreed on before anybody raises: other ranks would wait in their next collective for one that has ended.
    if ranks.all_max(float(taken is not None)):
        if taken is not None:
            raise taken
        # The rank that checked prints the reason. This rank's launcher needs the error, too, or it would start the ranks again.
        if errors := os.environ.get(ERRORS_VARIABLE):
            number = int(os.environ.get(MEMBER_VARIABLE, ranks.rank))
            error_file(Path(errors), number).write_text("hecate: rank 0 found an error; see its message above", encoding="utf-8")
        sys.exit(USER_ERROR_EXIT)
    return config
