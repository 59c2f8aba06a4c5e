"""A bias that balances experts, moved after each step by the loads of all ranks: the same on any ranks, after any loss, in any file."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hecate.adapters.formats.mixlora import FORMAT
from hecate.adapters.mixlora.description import MixLoraDescription
from hecate.ranks.ranks import connect
from hecate.train.steps import step as step_module
from hecate.train.steps.step_totals import Totals, exchange_totals
from hecate.train.training import Training
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.elastic.losing import DEATH_STEP, Dead, make_run, regroup
from tests.hecate.train.in_process import ranks_of_default_group

STEPS, RATE = 5, 0.003
BALANCING = ("moe.router_aux_loss_coef=0", f"moe.router={{score: sigmoid, bias: balancing, bias_rate: {RATE}}}")


def make_balancing(workshop: str, name: str, rank: int, world: int, *overrides: str) -> Training:
    return make_run(workshop, name, rank, world, *BALANCING, *overrides)


def biases(run: Training) -> dict[str, list[float]]:
    return {name: buffer.tolist() for name, buffer in run.parts.optimizer.buffers.items()}


def steps_until(run: Training, until: int) -> list[list[float]]:
    """Loss and norm of each step; the biases follow the loads."""
    seen = []
    while run.run_state.step < until:
        before = biases(run)
        result = run.train_one().result
        for unit, load_ED in result.loads.items():
            load_E = torch.from_numpy(load_ED.sum(1)).double()
            wanted = torch.tensor(before[f"layers.{unit}.router.bias"], dtype=torch.float64) + RATE * torch.sign(load_E.mean() - load_E)
            assert biases(run)[f"layers.{unit}.router.bias"] == wanted.tolist()
        seen.append([result.loss, result.grad_norm])
    return seen


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


Outcome = tuple[list[list[float]], dict[str, list[float]]]


def whole(rank: int, world: int, workshop: str, micro_steps: int = 2) -> Outcome:
    """Eight sequences a step, whatever the number of ranks and of micro-steps."""
    changes = [f"gradient_accumulation_steps={micro_steps}"]
    run = make_balancing(workshop, f"whole-{world}-{micro_steps}", rank, world, *changes)
    run.parts.stream.sequences_per_step = 8
    run.plan_for(run.parts.moe.engine.shards.config.topology)
    return steps_until(run, STEPS), biases(run)


@pytest.fixture(scope="module")
def on_four(workshop: str) -> Outcome:
    return run_ranks(4, whole, workshop)[0]


def same(one: Outcome, other: Outcome) -> None:
    assert one[1] == other[1], "the biases differ"
    assert torch.tensor(one[0]).sub(torch.tensor(other[0][-len(one[0]) :])).abs().max() <= 1e-10


def test_the_bias_does_not_depend_on_the_number_of_ranks(workshop: str, on_four: Outcome) -> None:
    assert all(any(values) for values in on_four[1].values()), "no bias has moved"
    for outcome in (*run_ranks(1, whole, workshop), *run_ranks(2, whole, workshop)):
        same(outcome, on_four)


@pytest.mark.slow
def test_the_bias_does_not_depend_on_the_number_of_micro_steps(workshop: str, on_four: Outcome) -> None:
    for micro_steps in (1, 4):
        same(run_ranks(1, whole, workshop, micro_steps)[0], on_four)


def resumed(rank: int, world: int, workshop: str) -> Outcome:
    first = make_balancing(workshop, "resumed", rank, world)
    steps_until(first, 2)
    first.save()
    run = make_balancing(workshop, "resumed", rank, world, "resume=true")
    assert biases(run) == biases(first)
    return steps_until(run, STEPS), biases(run)


@pytest.mark.slow
def test_a_checkpoint_holds_the_bias(workshop: str, on_four: Outcome) -> None:
    for outcome in run_ranks(4, resumed, workshop):
        same(outcome, on_four)


def half_stepped(rank: int, world: int, workshop: str) -> Outcome | None:
    """Rank 1 dies with the norm of a step, which rank 0 has taken and the others have not: they take it after it."""
    run = make_balancing(workshop, "half", rank, world, "fssdp.redundancy=1")
    steps_until(run, DEATH_STEP)

    def fail(*shares: Any) -> Totals:
        totals = exchange_totals(*shares)
        if rank > 0:
            raise Dead if rank == 1 else RuntimeError("a peer is lost")
        return totals

    try:
        with mock.patch.object(step_module, "exchange_totals", fail):
            steps_until(run, STEPS)
    except (Dead, RuntimeError):
        if rank == 1:
            run.ranks.leave()
            return None
        regroup(run, f"{workshop}/half-store", rank - (rank > 1), world - 1)
    return steps_until(run, STEPS), biases(run)


@pytest.mark.slow
def test_a_step_that_is_taken_later_moves_the_bias_too(workshop: str, on_four: Outcome) -> None:
    for outcome in run_ranks(4, half_stepped, workshop):
        if outcome is not None:
            same(outcome, on_four)


def grown(rank: int, world: int, workshop: str) -> Outcome:
    """A third rank, which has loaded alone, joins two that have trained two steps."""
    ranks_of_default_group(rank, world).leave()
    if rank == 2:
        connect(dist.HashStore(), 0, 1)
        run = make_balancing(workshop, "grown", 0, 1)
        run.state = None
    else:
        connect(dist.FileStore(f"{workshop}/grown-two", 2), rank, 2)
        run = make_balancing(workshop, "grown", rank, 2)
        run.parts.stream.sequences_per_step = 8
        steps_until(run, 2)
    regroup(run, f"{workshop}/grown-three", (rank + 1) % 3, 3)
    return steps_until(run, STEPS), biases(run)


@pytest.mark.slow
def test_a_rank_that_comes_new_gets_the_bias(workshop: str, on_four: Outcome) -> None:
    for outcome in run_ranks(3, grown, workshop):
        same(outcome, on_four)


def exported(rank: int, world: int, workshop: str) -> None:
    run = make_balancing(workshop, "exported", rank, world)
    steps_until(run, 2)
    trained = biases(run)
    folder = run.parts.output.replace(Path(run.parts.config.output_dir), run.parts.moe, run.ranks)
    run.ranks.barrier()
    read = FORMAT.read(folder)
    assert isinstance(read.description, MixLoraDescription)
    assert read.description.router_buffers == ("bias",)
    for buffer in run.parts.optimizer.buffers.values():
        buffer.zero_()
    FORMAT.load(read, run.parts.base, run.parts.moe)
    for name, values in trained.items():
        assert biases(run)[name] == pytest.approx(values, abs=1e-8)


def test_an_adapter_holds_the_bias(workshop: str) -> None:
    run_ranks(2, exported, workshop)
