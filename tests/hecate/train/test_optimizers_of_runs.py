"""Runs with every optimizer end with the same bits when they stop and go on with other ranks, and when a rank is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hecate.config import load_config
from hecate.ranks.sockets import tcp_sockets
from hecate.train.training import Training
from testing.ranks import run_ranks
from testing.tiny_run import STEPS, make_workshop
from tests.hecate.elastic.losing import DEATH_STEP, VICTIM, Dead, die_in, regroup, steps_until
from tests.hecate.train.in_process import Losses, ranks_of_default_group, settings_of, train_until

ORDERED = (
    "deterministic=true",
    "model.dtype=float32",
    "micro_batch_size=3",
    "lora.r=128",  # of matrices of 4,096 numbers and more
    "weight_decay=0.1",
    "lr_scheduler_type=wsd",
    "lr_scheduler_kwargs.decay_ratio=0.5",
)
OTHERS = {"muon": "0.1", "adamw_8bit": "1e-3", "adafactor": "0.3", "lion": "1e-3"}
"""with a learning rate"""
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


@pytest.mark.parametrize("optim", [pytest.param(optim, marks=slow if optim in ("adafactor", "lion") else ()) for optim in OTHERS])
def test_two_ranks_then_three_then_one_end_with_the_bits_of_two(workshop: str, optim: str) -> None:
    whole = run_ranks(2, train_until, workshop, f"{optim}-whole", STEPS, (*ORDERED, f"optim={optim}", f"learning_rate={OTHERS[optim]}"))[0]
    parts: Losses = []
    for world, until in ((2, 2), (3, 4), (1, STEPS)):
        resume = ("resume=true",) if parts else ()
        parts += run_ranks(
            world, train_until, workshop, optim, until, (*ORDERED, f"optim={optim}", f"learning_rate={OTHERS[optim]}", *resume)
        )[0]
    assert parts == whole
    assert whole[0][0] - whole[-1][0] > 1e-3, "it must have learnt, or nothing was shown"
    assert (Path(workshop) / f"runs/{optim}/checkpoint-4/rank-00002-of-00003.safetensors").is_file()


def with_a_loss(rank: int, world: int, workshop: str, optim: str, phase: str) -> Losses:
    """Losses of a run on three ranks, of which one is lost unless `phase` is empty."""
    losses: dict[int, tuple[float, float, float]] = {}
    settings = settings_of(
        workshop, f"{optim}-{phase or 'undisturbed'}", (*ORDERED, f"optim={optim}", f"learning_rate={OTHERS[optim]}", "fssdp.redundancy=1")
    )
    ranks = replace(ranks_of_default_group(rank, world), connections=frozenset(tcp_sockets()))
    run = Training(load_config(f"{workshop}/config.yaml", settings, claim_output=False), ranks)
    steps_until(run, DEATH_STEP, losses)
    if rank == VICTIM and phase:
        die_in(phase)
    try:
        steps_until(run, STEPS, losses)
    except Dead:
        run.ranks.leave()
        return []
    except RuntimeError:
        regroup(run, f"{workshop}/{optim}-{phase}-store", rank - (rank > VICTIM), world - 1)
        assert run.run_state.step == DEATH_STEP
        steps_until(run, STEPS, losses)
    return [losses[step] for step in sorted(losses)]


@pytest.mark.parametrize("optim", [pytest.param(optim, marks=slow if optim in ("adafactor", "lion") else ()) for optim in OTHERS])
def test_backups_take_over_from_a_lost_rank(workshop: str, optim: str) -> None:
    whole = run_ranks(3, with_a_loss, workshop, optim, "")[0]
    survivors = run_ranks(3, with_a_loss, workshop, optim, "backward")
    assert survivors[0] == survivors[2] == whole
    assert survivors[VICTIM] == []
