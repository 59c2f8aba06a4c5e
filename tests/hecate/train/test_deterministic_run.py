"""With `deterministic: true` a run ends with the same bits at every number of ranks, wherever experts are and whenever they move."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.train.in_process import train_until

STEPS = 3
SEQUENCES = 12
"""of a micro-step, which 1, 2, 3 and 4 ranks share out evenly"""
ALWAYS = ("model.dtype=float32", "deterministic=true", "max_grad_norm=0.5", "lora.dropout=0.1")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


def trained(workshop: str, name: str, world: int, *overrides: str, until: int = STEPS, share: int | None = None) -> tuple[object, dict[str, str]]:
    """The losses and norms of a run's steps, and the digests of everything in its checkpoint by name: parameters and moments."""
    given = (*ALWAYS, f"micro_batch_size={share or SEQUENCES // world}", *overrides)
    steps = run_ranks(world, train_until, workshop, name, until, given)
    assert all(of_rank == steps[0] for of_rank in steps)
    manifest = json.loads((Path(workshop) / f"runs/{name}/checkpoint-{until}/manifest.json").read_text())
    digests = {name: entry["xxh3_128"] for name, entry in manifest["tensors"].items()}
    assert any(name.endswith("/exp_avg_sq") for name in digests)
    return steps[0], digests


@pytest.fixture(scope="module")
def alone(workshop: str) -> tuple[object, dict[str, str]]:
    return trained(workshop, "alone", 1)


@pytest.mark.parametrize(("world", "policy"), [(2, "static_ep"), (3, "hecate_paper"), (4, "auto")])
def test_any_number_of_ranks(workshop: str, alone: object, world: int, policy: str) -> None:
    assert trained(workshop, f"{policy}-{world}", world, f"fssdp.policy={policy}") == alone
