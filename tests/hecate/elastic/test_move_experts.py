"""Experts move only to owners that all ranks agree on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hecate.elastic.move_experts import refuse_different_owners
from hecate.errors import UserError
from hecate.parallel.units import Unit
from testing.ranks import run_ranks


def planned(rank: int, _world: int, differ: bool) -> str:
    store = SimpleNamespace(device=torch.device("cpu"))
    shards = SimpleNamespace(groups=SimpleNamespace(world=dist.group.WORLD), stores={Unit(0): store})
    engine: Any = SimpleNamespace(shards=shards)
    owners = {Unit(layer): np.array([0, 1, layer % 2]) for layer in range(5)}
    if differ and rank == 1:
        owners[Unit(2)] = np.array([1, 0, 0])
        owners[Unit(4)] = np.array([0, 1, 1])
    try:
        refuse_different_owners(engine, owners)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("differ", [False, True])
def test_every_rank_names_the_layers_whose_owners_differ(differ: bool) -> None:
    texts = run_ranks(2, planned, differ)
    assert texts[0] == texts[1]
    assert ("experts of layer 2, 4, so" in texts[0]) is differ
    assert ("resume from the last checkpoint" in texts[0]) is differ
