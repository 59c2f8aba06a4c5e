"""Experts move only to owners that all ranks agree on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hecate.elastic import move_experts
from hecate.elastic.move_experts import refuse_different_owners
from hecate.errors import UserError
from hecate.parallel.values.units import Unit
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


@pytest.mark.parametrize("pays", [False, True])
def test_owners_are_compared_before_any_expert_moves(monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    """Also by a rank that would move nothing: another may have come to new owners."""

    def differ(_engine: object, owners: dict[Unit, np.ndarray]) -> None:
        raise UserError(f"they differ: {[owner_E.tolist() for owner_E in owners.values()]}")

    better = ([np.array([[1, 0]])], 1.0) if pays else None
    monkeypatch.setattr(move_experts, "better_owners", lambda *_: better)
    monkeypatch.setattr(move_experts, "refuse_different_owners", differ)
    shards = SimpleNamespace(
        plans=SimpleNamespace(inputs=lambda for_owners: [([Unit(0)], None)]),
        config=SimpleNamespace(planner=None),
        owners={Unit(0): np.array([0, 1])},
    )
    engine: Any = SimpleNamespace(shards=shards)
    with pytest.raises(UserError, match=r"they differ: \[\[1, 0\]\]" if pays else r"they differ: \[\[0, 1\]\]"):
        move_experts.reshard_if_it_pays(engine, None, 10)  # type: ignore[arg-type]
