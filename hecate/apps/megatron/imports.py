"""megatron-core without its advice: on a machine without Transformer Engine and Apex it warns of both six times, and of what we build."""

from __future__ import annotations

import logging
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util

from hecate.errors import UserError, install_hint

_WARNINGS = ("Transformer Engine and Apex are not installed", "Apex is not installed", "full scope is deprecated")
_LAYER_LOGGER = "megatron.core.transformer.transformer_layer"


_NO_WHEEL = (3, 14)
"""the first Python that megatron-core has no wheel for, as in pyproject.toml"""


def require_megatron() -> None:
    """Raises UserError: megatron-core is not installed."""
    if util.find_spec("megatron") is None or util.find_spec("megatron.core") is None:
        mend = install_hint("megatron")
        if sys.version_info >= _NO_WHEEL:
            mend = f"it has no wheel for Python {platform.python_version()}: use Python 3.11 to 3.13"
        raise UserError(f"model.front_end=megatron: the package megatron-core is not installed\n  {mend}")


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress the warnings of the first import of Megatron's modules, and of building a model of them, during the block.

    Raises:
        UserError: it is not installed.
    """
    require_megatron()
    logger = logging.getLogger(_LAYER_LOGGER)
    with warnings.catch_warnings():
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        logger.addFilter(_not_of_our_layer)
        try:
            yield
        finally:
            logger.removeFilter(_not_of_our_layer)


def _not_of_our_layer(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Unknown MLP type")
