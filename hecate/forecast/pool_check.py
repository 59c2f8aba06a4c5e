"""Checks the sizes of pools before any process of a job starts."""

from __future__ import annotations

from hecate.config import Config
from hecate.errors import UserError
from hecate.parallel.expert_kinds import POOLED_SOURCES


def check_pools(config: Config) -> None:
    """Check that the model's sizes allow the configured pools. What else is wrong with a model is left to those who load it.

    Raises:
        UserError: they do not.
    """
    if config.lora.pairs not in POOLED_SOURCES:
        return
    from hecate.forecast.run_shape import base_shape_of, pool_shapes  # takes seconds to import, which other runs need not wait for

    try:
        base, of_model = base_shape_of(config)
    except UserError:
        return
    pool_shapes(base, of_model)
