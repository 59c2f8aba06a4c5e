"""What is called out of the order of a training step is refused in words."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hecate.engine.engine import Engine
from hecate.engine.evaluation import EvaluationPass
from hecate.engine.protocol import ExpertEngine, TrainingPass
from hecate.engine.shards import ExpertShards
from hecate.engine.step import MicroStep, StepLedger
from hecate.experts.forward_pass import ForwardPass, OrderError
from hecate.parallel.values.units import Unit
from tests.hecate.experts.making import HIDDEN, engine

TOKENS, EXPERTS = 4, 3


def output(forward: ForwardPass) -> torch.Tensor:
    x = torch.ones(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(TOKENS, 1, dtype=torch.float64)
    return forward.experts(0, x, torch.zeros(TOKENS, 1, dtype=torch.int64), weight, torch.arange(TOKENS)).sum()


@pytest.fixture
def made(one_rank: dist.ProcessGroup) -> Engine:
    return engine({0: EXPERTS})


def train(made: ExpertEngine, number: int, micro_steps: int) -> dict[Unit, list[int]]:
    step = made.begin_step(number, micro_steps)
    for _ in range(micro_steps):
        micro: TrainingPass = step.begin_micro_step()
        micro.backward(output(micro))
    return {layer: loads_ED[:, 0].tolist() for layer, loads_ED in step.finish().items()}


def test_steps_and_evaluations_follow_each_other(made: Engine) -> None:
    assert isinstance(made.shards, ExpertShards)
    assert train(made, 0, 2) == {0: [2 * TOKENS, 0, 0]}
    with made.evaluation() as evaluation:
        assert isinstance(evaluation, EvaluationPass)
        assert evaluation.again() is evaluation
        output(evaluation)
    assert train(made, 1, 1) == {0: [TOKENS, 0, 0]}
    assert made.current.now is None


def test_a_step_begins_when_the_one_before_is_finished(made: Engine) -> None:
    made.begin_step(5)
    with pytest.raises(OrderError, match="step 5 is not finished"):
        made.begin_step(6)
    with pytest.raises(OrderError, match="step 5 is not finished"):
        made.evaluation()


def test_a_failed_step_is_forgotten_when_ranks_join_anew(made: Engine) -> None:
    made.begin_step(5).begin_micro_step()
    chunks = {0: {expert: parameter.detach() for (_, expert), parameter in made.shards.named_parameters().items()}}
    made.rejoin(made.shards.config.topology, made.shards.groups, made.shards.owners, chunks)
    assert train(made, 5, 1) == {0: [TOKENS, 0, 0]}


def test_no_step_begins_within_an_evaluation(made: Engine) -> None:
    with made.evaluation():
        with pytest.raises(OrderError, match="an evaluation is under way"):
            made.begin_step(0)
        with pytest.raises(OrderError, match="an evaluation is under way"):
            made.evaluation()


def test_as_many_micro_steps_as_were_said(made: Engine) -> None:
    step = made.begin_step(3, 2)
    with pytest.raises(OrderError, match="0 of its 2 micro-steps"):
        step.finish()
    for done in range(2):
        micro = step.begin_micro_step()
        with pytest.raises(OrderError, match=f"micro-step {done} of step 3 has had no backward pass"):
            step.begin_micro_step()
        with pytest.raises(OrderError, match=f"{done} of its 2 micro-steps"):
            step.finish()
        micro.backward(output(micro))
    with pytest.raises(OrderError, match="begun with 2 micro-steps, and all have run"):
        step.begin_micro_step()
    step.finish()
    with pytest.raises(OrderError, match="step 3 is finished already"):
        step.finish()
    with pytest.raises(OrderError, match="step 3 is finished"):
        step.begin_micro_step()
    with pytest.raises(OrderError, match="at least one"):
        StepLedger(made.shards, 4, 0)


def test_a_micro_step_ends_with_its_backward_pass(made: Engine) -> None:
    step = made.begin_step(0, 2)
    first: MicroStep = step.begin_micro_step()
    assert made.current.required() is first
    first.backward(output(first))
    with pytest.raises(OrderError, match="outside of a training step and of an evaluation"):
        made.current.required()
    for late in (first, first.again()):
        with pytest.raises(OrderError, match="micro-step 0 of step 0 is over"):
            output(late)
    step.begin_micro_step()
    with pytest.raises(OrderError, match="micro-step 0 of step 0 is over"):
        first.backward(torch.zeros((), requires_grad=True))
