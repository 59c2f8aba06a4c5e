"""Where the server stands before a round, from the files of the rounds before it, and the messages that it sends down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hecate.apps.federate.client import ClientPlan, write_message
from hecate.apps.federate.codec import encode
from hecate.apps.federate.plans import begins_anew, rank_of, round_folder
from hecate.apps.federate.records import RoundRecord
from hecate.apps.federate.section.settings import rounds_of
from hecate.apps.federate.server import begun_with
from hecate.apps.federate.server_optimizer import ServerState, load_server
from hecate.apps.federate.vectors import Pairs, VectorShape, flat, new_pairs, pairs_of, read_pairs
from hecate.config import Config

SERVER_STATE = "server.safetensors"
"""in the folder of a round: the state of the server's optimizer after it"""


@dataclass(frozen=True)
class ServerBefore:
    """What the server has before a round."""

    shape: VectorShape
    """of the widest client"""
    pairs: Pairs | None
    """its adapter; None: clients begin anew"""
    state: ServerState | None
    """of its optimizer; None: the aggregate is the next adapter as it is"""
    stacked: int
    """where clients begin anew: the number of terms of the last round's result"""


def server_before(config: Config, shape: VectorShape, number: int, done: Sequence[RoundRecord]) -> ServerBefore:
    """Return where the server stands before a round.

    Args:
        done: the rounds before it.

    Raises:
        UserError: a file of the last round cannot be read.
    """
    before = round_folder(config, number - 1)
    if begins_anew(config):
        return ServerBefore(shape, None, None, stacked_rank(config, done[-1]) if done else 0)
    settings = rounds_of(config).server
    steps = (settings.optimizer, settings.learning_rate) != ("sgd", 1.0)
    if steps:
        state = ServerState(flat(new_pairs(shape), shape)) if number == 1 else load_server(before.path / SERVER_STATE)
        return ServerBefore(shape, pairs_of(state.vector, shape), state, 0)
    return ServerBefore(shape, new_pairs(shape) if number == 1 else read_pairs(before.union, shape), None, 0)


def stacked_rank(config: Config, record: RoundRecord) -> int:
    """Return the number of terms that the clients of a round have together."""
    return sum(rank_of(config, client) for client in rounds_of(config).clients if client.name in record.weights)


def send_down(config: Config, number: int, server: ServerBefore, plans: Mapping[str, ClientPlan]) -> dict[str, Tensor | None]:
    """Write the messages to the clients, by their plans. Return each one's vector, from which the server counts its changes, by name.

    Raises:
        UserError: the disk fails.
    """
    begun: dict[str, Tensor | None] = {}
    for name, plan in plans.items():
        begun[name] = None if server.pairs is None else begun_with(server.pairs, server.shape, plan.shape)
        vector = begun[name]
        if vector is not None:
            assert plan.down is not None
            write_message(plan.down, encode(vector, rounds_of(config).codec.down))
        elif plan.merging is not None:
            write_message(plan.merging.down, _stacked_message(config, number, server))
    return begun


def _stacked_message(config: Config, number: int, server: ServerBefore) -> bytes:
    stacked = server.shape.of_rank(server.stacked, 1.0)
    return encode(flat(read_pairs(round_folder(config, number - 1).union, stacked), stacked), 1.0)


def size_of(path: Path) -> int:
    """Return the bytes of a message; 0: nothing was sent."""
    return path.stat().st_size if path.exists() else 0
