"""Which TCP connections of a process are its rank's: those to a port on which some rank listens, however many ports there are."""

from __future__ import annotations

import json
import socket

import torch

from hecate.parallel.cluster.mesh import make_mesh
from hecate.ranks.groups import expert_groups
from hecate.ranks.ranks import Ranks, _of_gloo
from hecate.ranks.sockets import tcp_sockets
from testing.ranks import run_ranks

PORTS = 12


def _found(rank: int, world: int) -> int:
    """Rank 0 listens on many ports, and rank 1 connects to each; what both then find."""
    ranks = Ranks(rank, world, torch.device("cpu"), expert_groups(make_mesh(world)))
    before = tcp_sockets()
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(PORTS)] if rank == 0 else []
    ports = json.loads(
        ranks.broadcast_from(0, json.dumps([server.getsockname()[1] for server in listening]).encode() if listening else None)
    )
    made = [socket.create_connection(("127.0.0.1", port)) for port in ports] if rank == 1 else [server.accept()[0] for server in listening]
    other = socket.create_server(("127.0.0.1", 0))
    stranger = socket.create_connection(other.getsockname())
    ranks.barrier()
    new = {connection for connection in tcp_sockets() - before if connection.local[1] != other.getsockname()[1]}
    found = _of_gloo(ranks, new)
    for opened in (*made, *listening, other, stranger):
        opened.close()
    return len(found)


def test_a_connection_to_any_port_of_a_rank_is_its_own() -> None:
    assert run_ranks(2, _found) == [PORTS, PORTS]
