"""The exchanges that collectives are made of, by hand: two layers in one all-to-all, and messages that follow it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hecate.parallel.comm.exchanges import FirstExchange, SecondExchange
from hecate.parallel.transfer.routes import Moves
from hecate.parallel.transfer.transfer_plan import exchange_of
from testing.ranks import run_ranks
from tests.parallel.comm.collective_cases import world_group


def _two_layers(rank: int, world: int) -> None:
    """Layer 0: rank 0 sends expert 0 to 1 and 2, rank 2 sends expert 1 to 1. Layer 1, of other width: rank 1 sends expert 0 to 0."""
    first = exchange_of(Moves(np.array([[-1, 0, 0], [-1, 2, -1]])), rank)
    second = exchange_of(Moves(np.array([[1, -1, -1]])), rank)
    sent = [torch.full((len(part.sent.expert_M), width), 10.0 * rank) for part, width in ((first, 2), (second, 3))]
    exchange = FirstExchange([first, second], world_group())
    exchange.start(sent)
    exchange.wait()
    assert exchange.bytes_to == [[0, 8, 8], [12, 0, 0], [0, 8, 0]][rank]
    assert exchange.arrived(0).tolist() == [[], [[0.0, 0.0], [20.0, 20.0]], [[0.0, 0.0]]][rank]
    assert exchange.arrived(1).tolist() == [[[10.0, 10.0, 10.0]], [], []][rank]


def test_two_layers_in_one_exchange() -> None:
    run_ranks(3, _two_layers)


def _one_after_the_other(rank: int, world: int, through_host: bool) -> None:
    """Rank 0 sends to rank 1, which doubles and sends on to rank 2."""
    group = world_group()
    first = FirstExchange([exchange_of(Moves(np.array([[-1, 0, -1]])), rank)], group)
    onward = exchange_of(Moves(np.array([[-1, -1, 1]])), rank)
    second = SecondExchange(onward, group, torch.zeros(1, 4))
    second._through_host |= through_host  # as for GPU tensors on gloo
    first.start([torch.full((1 if rank == 0 else 0, 4), 7.0)])
    arrive = second.follow(first, lambda: 2 * first.arrived())
    arrive()
    assert second.bytes_to == [[0, 0, 0], [0, 0, 16], [0, 0, 0]][rank]
    assert second.buffer_MC.tolist() == [[], [], [[14.0] * 4]][rank]


@pytest.mark.parametrize("through_host", [False, True])
def test_what_follows_starts_when_the_first_has_arrived(through_host: bool) -> None:
    run_ranks(3, _one_after_the_other, through_host)


def _nothing(rank: int, world: int) -> None:
    """No rank sends anything: there is no collective, and nobody waits for rank 1, which does not take part."""
    if rank == 0:
        exchange = FirstExchange([exchange_of(Moves(np.full((2, 2), -1)), rank)], world_group())
        exchange.start([torch.empty(0, 3)])
        exchange.wait()
        assert exchange.work is None
        assert exchange.arrived().shape == (0, 3)


def test_an_exchange_of_nothing_is_no_collective() -> None:
    run_ranks(2, _nothing, timeout=20)
