"""The server's step: what the mean of the clients' changes makes of the vector that they began with.

sgd      vector + learning_rate · mean change; with the learning rate 1 the mean of the clients' vectors (FedAvg)
adamw    AdamW's step, to which the mean change is the gradient with the other sign (FedAdam, arXiv 2003.00295, and FLASC's server)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hecate.apps.federate.section.settings import ServerConfig
from hecate.errors import UserError
from hecate.io.durable import replace_file
from hecate.io.plain_files import require_plain
from hecate.optim.adamw import AdamW
from hecate.optim.rule import Stepped

_VECTOR = "vector"


@dataclass(frozen=True, eq=False)
class ServerState:
    """Where the server stands between two rounds."""

    vector: Tensor
    """float32 or float64 [n]: what clients begin the next round with"""
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    """what adamw keeps, by the names of `AdamW.state_specs`; empty before its first step"""


def server_step(state: ServerState, mean_delta: Tensor, settings: ServerConfig) -> ServerState:
    """Return the state after a round. Nothing that is given is changed.

    Args:
        mean_delta: [n], the weighted mean of what clients have added to `state.vector`.
    """
    assert mean_delta.shape == state.vector.shape, (mean_delta.shape, state.vector.shape)
    if settings.optimizer == "sgd":
        return ServerState(state.vector + settings.learning_rate * mean_delta)
    vector = state.vector.clone()
    kept = {name: tensor.clone() for name, tensor in state.kept.items()} or {
        "exp_avg": torch.zeros_like(vector),
        "exp_avg_sq": torch.zeros_like(vector),
        "step": torch.zeros((), dtype=torch.float32),
    }
    rule = AdamW(weight_decay=settings.weight_decay)
    with torch.no_grad():
        rule.step([Stepped(_VECTOR, vector, -mean_delta.to(vector.dtype), kept, None)], settings.learning_rate)
    return ServerState(vector, kept)


def save_server(path: Path, state: ServerState) -> None:
    """Write the state as one safetensors file, which replaces an earlier one as a whole."""
    tensors = {_VECTOR: state.vector.contiguous(), **state.kept}
    replace_file(path, [save(tensors)])


def load_server(path: Path) -> ServerState:
    """Raises UserError: the file cannot be read, or is none that `save_server` has written."""
    try:
        require_plain(path)
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the state of the server cannot be read: {str(error)[:300]}\n  resume from an earlier round") from error
    vector = tensors.pop(_VECTOR, None)
    of_adamw = {} if vector is None else {"exp_avg": vector.shape, "exp_avg_sq": vector.shape, "step": ()}
    if (
        vector is None
        or vector.ndim != 1
        or not vector.is_floating_point()
        or (tensors and {name: tensor.shape for name, tensor in tensors.items()} != of_adamw)
    ):
        raise UserError(
            f"{path}: is not the state of a server; it has {', '.join(sorted(tensors))[:300] or 'nothing'}\n  resume another round"
        )
    return ServerState(vector, tensors)
