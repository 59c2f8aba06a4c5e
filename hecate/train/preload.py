"""All that a rank imports, at once."""

from __future__ import annotations

import atexit
import gc


def preload() -> None:
    """Import what a rank needs, in a process that is to be one, or that ranks are forked from. Starts no thread, touches no GPU.

    Modules bring half a million objects that stay. The garbage collector's passes over them, useless as they are, would be a third of the
    time; and a forked process would get its own copy of what it shares otherwise.
    """
    gc.disable()
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, masking_utils, modeling_utils  # noqa: F401

        from hecate.elastic import local_group, restart  # noqa: F401
        from hecate.train import loop  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else what stays frozen to the end is taken for leaked by nanobind, which says so at length
