"""Training as a function: `train(config)` from a script, under torchrun and in a notebook."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from hecate.config import Config, load_config
from hecate.elastic.restart import begin_or_resume
from hecate.errors import UserError
from hecate.io.one_writer import one_writer
from hecate.model.causal_head import TokenLoss
from hecate.parallel.loops import jit
from hecate.ranks.gpu_allocator import gpu_allocator_defaults
from hecate.ranks.processor import ONEDNN_SETTINGS
from hecate.ranks.ranks import join_ranks, ranks_from_environment
from hecate.train import loop
from hecate.train.caller import Callback, Caller, Result
from hecate.train.preflight import check_machine

__all__ = ["Callback", "Result", "TokenLoss", "train"]

_log = logging.getLogger(__name__)


def train(
    config: str | os.PathLike[str] | Config,
    overrides: Sequence[str] = (),
    *,
    callbacks: Sequence[Callback] = (),
    loss: TokenLoss | None = None,
) -> Result:
    """Train as `hecate train CONFIG KEY=VALUE ...` does, in this process, and return what came of it.

    The process is the only rank, or under torchrun one of its job; then every rank must make the same call. No process is started:
    callbacks and losses are functions of this program, which other processes could get only pickled. `hecate.io.terminal.show_messages`
    has the run's lines printed. SIGINT, as an interrupt of a notebook's cell, ends the run after the step under way, with a checkpoint.

    Args:
        config: the path of a YAML file, the name of a preset, or what `hecate.config.load_config` has returned; with several ranks, with
            its `claim_output=False`.
        overrides: "section.key=value"; none beside a `Config`.
        callbacks: are called on rank 0.
        loss: of label tokens, in place of their cross-entropy: (logits [N, vocabulary], labels int64 [N]) -> losses [N], differentiable.
            Evaluations stay by cross-entropy, so that runs can be compared.

    Raises:
        UserError: the configuration, the data, the model or the disk is wrong.
        RuntimeError: another rank was lost.
    """
    if strangers := [type(one).__name__ for one in callbacks if not isinstance(one, Callback)]:
        raise UserError(f"callbacks: {strangers[0]} is no hecate.api.Callback\n  derive its class from that, and give objects of it")
    os.environ.update(gpu_allocator_defaults(os.environ) | ONEDNN_SETTINGS | os.environ)
    alone = ranks_from_environment() is None
    if isinstance(config, Config):
        if overrides:
            raise UserError("overrides: a Config has its values already\n  give them to load_config")
        loaded = config
    else:
        loaded = load_config(config, overrides, claim_output=alone)
    if alone and (loaded.nproc or 1) > 1:
        raise UserError(
            f"nproc: {loaded.nproc} ranks, but this program is one process, which is one rank\n"
            f"  start it by torchrun --nproc-per-node {loaded.nproc}, or set nproc=1"
        )
    check_machine(loaded)
    fssdp, model = loaded.fssdp, loaded.model
    sharded, ctas = model.shard_non_experts, fssdp.max_ctas
    with ExitStack() as stack:
        if alone:
            stack.enter_context(one_writer(loaded.output_dir))
        ranks = stack.enter_context(join_ranks(fssdp.shard_size, model.tensor_parallel, sharded_layers=sharded, max_ctas=ctas))
        if ranks.is_first:
            jit.say_with(_log.info)
        loaded = begin_or_resume(loaded, ranks, (lambda: _require_free(loaded)) if ranks.is_first else None)
        caller = Caller(callbacks if ranks.is_first else (), loss)
        loop.train(loaded, ranks, caller=caller)
    assert caller.result is not None
    return caller.result


def _require_free(config: Config) -> None:
    """Raises UserError: another run has written to output_dir."""
    folder = Path(config.output_dir)
    if not config.resume and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"output_dir: {folder} exists and is not empty\n  choose another, or pass resume=true")
