"""The program that one rank of a training run is: `python -m hecate.train.rank_main CONFIG [KEY=VALUE ...]`.

Launchers start it, and `hecate train` becomes it under torchrun. The environment says which rank the process is
(`hecate.ranks.ranks.join_ranks`).
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hecate.errors import UserError
from hecate.io.process_end import run_and_end
from hecate.io.terminal import show_messages
from hecate.parallel.loops import jit
from hecate.ranks.gpu_allocator import gpu_allocator_defaults
from hecate.ranks.launcher_files import (
    ERRORS_VARIABLE,
    JOIN_VARIABLE,
    LOST_PEER_EXIT,
    MEETING_VARIABLE,
    STORE_VARIABLE,
    exit_with_user_error,
    leave_pid,
    own_number,
)
from hecate.ranks.processor import ONEDNN_SETTINGS

_log = logging.getLogger("hecate.train.rank_main")  # also where this module is the program


def preload() -> None:
    """Import what a rank needs, in a process that becomes one or that ranks are forked from. Starts no thread and uses no GPU.

    The fork server calls this once, for all ranks of a machine.

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


def main(arguments: Sequence[str]) -> None:
    """Train as one rank of a run.

    Args:
        arguments: the configuration's path, and key=value pairs that replace its values. After `--check` in front of them nothing is
            trained: the model's architecture is checked, which launchers do once, before the ranks.

    Raises:
        SystemExit: with status 2 after a user's mistake, whose text is printed; with LOST_PEER_EXIT if another rank was lost.
    """
    show_messages()
    try:
        if not arguments:
            raise UserError("a rank needs a configuration: python -m hecate.train.rank_main CONFIG [KEY=VALUE ...]")
        if arguments[0] == "--check":
            from hecate.config import load_config
            from hecate.train.preflight import check_architecture

            check_architecture(load_config(Path(arguments[1]), arguments[2:], claim_output=False))
        else:
            train_as_rank(Path(arguments[0]), arguments[1:])
    except UserError as error:
        exit_with_user_error(error)


def train_as_rank(config_path: Path, overrides: Sequence[str]) -> None:
    """Join the ranks that the environment describes, and train with them.

    Raises:
        UserError: the configuration, the data, the model or the disk is wrong.
        SystemExit: with LOST_PEER_EXIT if another rank was lost.
    """
    faulthandler.enable()  # gloo ends a process where two ranks' messages differ in size: this says in which collective
    if errors := os.environ.get(ERRORS_VARIABLE):
        leave_pid(Path(errors), own_number())
    os.environ.update(gpu_allocator_defaults(os.environ) | ONEDNN_SETTINGS | os.environ)  # plain torchrun has not set them
    from hecate import faults
    from hecate.config import load_config
    from hecate.train.preflight import check_machine

    config = load_config(config_path, overrides, claim_output=False)
    check_machine(config)
    preload()
    from hecate.elastic.local_membership import local_membership
    from hecate.elastic.restart import begin_or_resume
    from hecate.ranks.ranks import join_ranks, loss_in_words, lost_a_peer
    from hecate.train.loop import train

    try:
        faults.at("begin")
        fssdp, model = config.fssdp, config.model
        sharded, ctas = model.shard_non_experts, fssdp.max_ctas
        with join_ranks(fssdp.shard_size, model.tensor_parallel, sharded_layers=sharded, max_ctas=ctas) as ranks:
            if ranks.is_first:
                jit.say_with(_log.info)
            membership = local_membership(config, ranks)
            # Only one process may check that output_dir is free: a launcher of one machine has done it; else rank 0 of those that begin.
            checked = STORE_VARIABLE in os.environ and MEETING_VARIABLE not in os.environ
            claims = ranks.is_first and not checked and JOIN_VARIABLE not in os.environ
            config = begin_or_resume(config, ranks, claim=(lambda: load_config(config_path, overrides)) if claims else None)
            train(config, ranks, membership=membership, joins=JOIN_VARIABLE in os.environ)
    except RuntimeError as error:
        if not lost_a_peer(error):
            raise
        rank = os.environ.get("RANK", "0")
        _log.warning(f"hecate: rank {rank} stops because it lost another rank: {loss_in_words(error)}")
        sys.exit(LOST_PEER_EXIT)


if __name__ == "__main__":
    run_and_end(lambda: main(sys.argv[1:]))
