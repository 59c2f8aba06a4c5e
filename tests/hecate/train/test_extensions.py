"""What extensions are asked for in a step, and that a step without them executes none of their code."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist

from hecate import faults
from hecate.engine.ordered_step import begin_ordered_step
from hecate.experts.forward_pass import OrderError, PassTokens
from hecate.model.causal_head import LanguageModelHead
from hecate.model.moe_model import MoeModel
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables
from hecate.parallel.values.summation import SumOrder
from hecate.report.events import DenseWork, StepResult
from hecate.train.extensions.copies import BackupGradients, ComparedCopies
from hecate.train.extensions.extension import Moment, StepExtension
from hecate.train.extensions.fault_places import FaultPlaces
from hecate.train.extensions.from_config import step_extensions
from hecate.train.extensions.rank_figures import RankFigures
from hecate.train.steps.passes import forward_loss
from hecate.train.steps.passes_in_order import PassesInOrder
from hecate.train.steps.step import StepBatches, StepRules, train_step
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.elastic.losing import make_run
from tests.hecate.equivalence_cases import AUX_COEF, MAX_NORM, MICRO_STEPS, WEIGHT_DECAY, Case, micro_batch, rows_of, sharded

Trained = tuple[MoeModel, LanguageModelHead, ExpertOptimizer]
ONE_PASS = ["forward", "loss", "forwarded", "backpropagated"]
ALL = ["step", "planned", *ONE_PASS * MICRO_STEPS, "reduce", "reduced", "gradients", "norm", "optimizer", "stepped"]


def trained(world: int) -> Trained:
    moe, head = sharded(Case("full", 4, 2, "balanced"), world)
    return moe, head, ExpertOptimizer(Trainables.of(moe), AdamW(weight_decay=WEIGHT_DECAY), LearningRate(1e-2), torch.device("cpu"))


def one_step(run: Trained, extensions: Sequence[StepExtension], rank: int = 0, world: int = 1) -> StepResult:
    batches = [micro_batch(0, micro, range(0)) for micro in range(MICRO_STEPS)]
    labels = sum(int((batch.targets != -100).sum()) for batch in batches)
    own = StepBatches(number=0, micro_batches=[rows_of(batch, rank, world) for batch in batches], num_labels=labels)
    return train_step(*run, own, StepRules(aux_coef=AUX_COEF, max_grad_norm=MAX_NORM), extensions)


class Noted(StepExtension):
    """Notes the moments, and what was at hand."""

    def __init__(self) -> None:
        self.moments: list[str] = []
        self.subjects: dict[str, Any] = {}

    def at(self, moment: Moment, subject: Any = None) -> None:
        self.moments.append(moment)
        self.subjects[moment] = subject


def test_moments_come_in_their_order(one_rank: dist.ProcessGroup) -> None:
    run, noted = trained(1), Noted()
    before = [parameter.detach().clone() for parameter in run[2].owned.values()]
    result = one_step(run, [noted])
    assert noted.moments == ALL
    assert set(ALL) == set(get_args(Moment)), "a moment that no step comes to, or one that is not named"
    assert noted.subjects["step"] == 0
    assert noted.subjects["gradients"] is run[2]
    assert noted.subjects["reduce"].keys() == result.loads.keys()
    assert any(not torch.equal(one, now) for one, now in zip(before, run[2].owned.values(), strict=True)), "the step changed nothing"


def test_a_step_without_extensions_executes_none_of_their_code(one_rank: dist.ProcessGroup) -> None:
    run = trained(1)
    called: set[str] = set()

    def look(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and "train/extensions" in (name := frame.f_code.co_filename):
            called.add(name)

    for extensions, wanted in (((), False), ([Noted()], True)):
        called.clear()
        sys.setprofile(look)
        try:
            one_step(run, extensions)
        finally:
            sys.setprofile(None)
        assert bool(called) is wanted, called


def test_the_step_is_small_enough_to_be_read() -> None:
    assert len(inspect.signature(train_step).parameters) <= 6
    assert len(inspect.getsource(train_step).splitlines()) <= 60


def figures_of_ranks(rank: int, world: int) -> list[Any]:
    run, found = trained(world), []
    for asks in ((False, False), (rank == 1, False)):
        result = one_step(run, [RankFigures(lambda asks=asks: asks, DenseWork(rank + 5, 0.5 * rank))], rank, world)  # type: ignore[misc]
        found.append((result.asked, result.work_before))
    return found


def test_what_one_rank_asks_for_all_are_told() -> None:
    works = (DenseWork(5, 0.0), DenseWork(6, 0.5))
    for found in run_ranks(2, figures_of_ranks):
        assert found == [((False, False), works), ((True, False), works)]


def test_faults_come_to_the_places_of_a_step_only_when_armed(one_rank: dist.ProcessGroup) -> None:
    run, seen = trained(1), list[str]()
    faults.arm(lambda place, _subject: seen.append(place))
    try:
        one_step(run, [FaultPlaces()])
    finally:
        faults.arm(None)
    of_step = [one for one in seen if one in ALL]
    assert of_step == [one for one in ALL if one in get_args(faults.Place)]
    assert not faults.armed()


def test_copies_are_compared_before_anything_changes(one_rank: dist.ProcessGroup) -> None:
    run = trained(1)
    before = [parameter.detach().clone() for parameter in run[2].owned.values()]

    def refuse() -> None:
        assert all(parameter.grad is not None for parameter in run[2].owned.values())
        raise ArithmeticError("copies differ")

    with pytest.raises(ArithmeticError, match="copies differ"):
        one_step(run, [ComparedCopies(refuse)])
    assert all(torch.equal(one, now) for one, now in zip(before, run[2].owned.values(), strict=True))


def test_backups_are_sent_gradients_while_the_replicated_ones_are_summed(
    one_rank: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, noted = trained(1), Noted()

    class Sent:
        def wait(self) -> None:
            noted.moments.append("arrived")

    def send(_engine: object, _optimizer: object, loads: dict[Any, Any], backups: int) -> Sent:
        assert loads.keys() == run[0].layers.keys()
        assert backups == 2
        noted.moments.append("sent")
        return Sent()

    monkeypatch.setattr("hecate.train.extensions.copies.send_gradients", send)
    one_step(run, [BackupGradients(run[0].engine, run[2], 2), noted])
    at = noted.moments.index("sent")
    assert noted.moments[at : at + 4] == ["sent", "reduce", "arrived", "reduced"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def kinds(rank: int, world: int, workshop: str, given: Sequence[str]) -> list[str]:
    run = make_run(workshop, "extensions", rank, world, *given)
    return [type(one).__name__ for one in step_extensions(run.parts, 0, run.parts.stream.next_step(), run.additions)]


def test_a_run_has_the_extensions_that_it_is_configured_with(workshop: Path) -> None:
    assert run_ranks(1, kinds, str(workshop), ()) == [[]]
    assert run_ranks(2, kinds, str(workshop), ("fssdp.redundancy=1",)) == [["BackupGradients"]] * 2


def test_a_micro_step_in_order_ends_with_its_last_pass(one_rank: dist.ProcessGroup) -> None:
    """Two passes of a rank that has two groups of sequences."""
    moe, head, _ = trained(1)
    sums = PassesInOrder(SumOrder((range(2),)))
    assert sums.micro_steps(4) == 2
    step = begin_ordered_step(moe.engine, 0, 1, sums.order)
    passes = step.begin_passes([PassTokens(), PassTokens()], [0, 1])
    assert [(one.position, one.ends) for one in passes] == [(0, False), (1, True)]
    for done, one in enumerate(passes):
        with pytest.raises(OrderError, match="0 of its 1 micro-steps"):
            step.finish()
        with moe.engine.current.set_to(one):
            loss = forward_loss(head, micro_batch(0, done, range(0)))
        one.backward(loss)
    assert step.finish().keys() == moe.layers.keys()
