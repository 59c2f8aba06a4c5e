"""Activation checkpointing: a decoder layer keeps its input and runs again in the backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from hecate.model.gated_ffn import decoder_layers
from hecate.model.moe_model import MoeModel


def checkpoint_activations(moe: MoeModel) -> None:
    """Checkpoint every decoder layer of the model, where gradients are wanted.

    Running a layer again repeats its collectives, in the same order on every rank, and counts no load twice. It runs to its end: stopping
    at the last tensor that is needed could leave out a collective on one rank that another still waits in.
    """

    current = moe.engine.current

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        # Asked for in the first run of a layer, so that the second one belongs to the same forward pass.
        return nullcontext(), current.set_to(current.required().again())

    for layer in decoder_layers(moe.model)[1]:
        plain = layer.forward

        def forward(*args: Any, _plain: Any = plain, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return _plain(*args, **kwargs)
            with set_checkpoint_early_stop(False):
                # Nothing of a layer draws from a random generator: dropout is a hash of token numbers.
                return checkpoint(_plain, *args, use_reentrant=False, context_fn=contexts, preserve_rng_state=False, **kwargs)

        layer.forward = forward
