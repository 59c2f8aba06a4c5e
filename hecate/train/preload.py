"""Imports everything that a rank needs, at once."""

from __future__ import annotations

import atexit
import gc


def preload() -> None:
    """Import what a rank needs, in a process that becomes one or that ranks are forked from. Starts no thread and uses no GPU.

    The modules consist of half a million objects that are never freed. Garbage collection over them would take a third of the time, and
    would make a forked process copy memory that it shares otherwise.
    """
    gc.disable()
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, masking_utils, modeling_utils  # noqa: F401

        from hecate.elastic import local_membership, restart  # noqa: F401
        from hecate.train import loop  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()
    atexit.register(gc.unfreeze)  # nanobind would report objects that are frozen at the end as leaks
