"""Events and orders survive a way through JSON, and the texts of torch and Ray are turned into values."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from hecate.launch.foreign_texts import JoinProblem, join_problem, worker_failure
from hecate.launch.ray_job.messages import (
    Assignment,
    Begin,
    CheckpointSaved,
    Interrupt,
    Join,
    Leave,
    LeftGeneration,
    Outcome,
    PartBuilt,
    Ping,
    Prepare,
    Prepared,
    Replan,
    StepsDone,
    StepTotals,
    Stop,
    TakeGpus,
    TrainingEnded,
    WorkerEvent,
    WorkerLost,
    WorkerOrder,
    WorkerUp,
    event_from_json,
    message_json,
    order_from_json,
)

ASSIGNMENT = Assignment(generation=2, rank=1, world_size=2, nodes=("a", "b"), topology=None, resume=True)
TOTALS = StepTotals(step=4, loss=1.5, tokens_per_s=9.0, imbalance=1.25, bytes_sent=80, loads={"0": [3, 4]})
EVENTS: list[WorkerEvent] = [
    WorkerUp(pid=1, host="h", gpus=None, versions={"torch": "2"}),
    Prepared(),
    PartBuilt(step=3, max_steps=9, sequences=(2, 1), owned=(4, 2), topology="nodes: []"),
    TOTALS,
    StepsDone(step=4, dense_tokens=10, dense_seconds=0.5, step_seconds=0.25),
    CheckpointSaved(step=4, path="/runs/x/checkpoint-4"),
    LeftGeneration(generation=1),
    TrainingEnded(generation=1, outcome=Outcome.FAILED, text="Traceback\n  x\nValueError: boom\n"),
    WorkerLost(text="gone", cannot_import=True),
]
ORDERS: list[WorkerOrder] = [
    TakeGpus(gpus="0,1"),
    Begin(assignment=ASSIGNMENT),
    Prepare(),
    Join(assignment=ASSIGNMENT),
    Leave(),
    Interrupt(generation=1),
    Replan(generation=1, number=2, flops=(1e9, 2e9), sequences=(1, 2), reshard=True),
    Stop(),
    Ping(),
]


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_every_message_comes_back_as_it_was() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(WorkerEvent))
    assert {type(order) for order in ORDERS} == set(get_args(WorkerOrder))
    assert [event_from_json(through_json(message_json(event))) for event in EVENTS] == EVENTS
    assert [order_from_json(through_json(message_json(order))) for order in ORDERS] == ORDERS


def test_codes_are_unique() -> None:
    kinds = (*get_args(WorkerEvent), *get_args(WorkerOrder))
    assert len({kind.code for kind in kinds}) == len(kinds)


@pytest.mark.parametrize(
    "raw",
    [
        {},
        [],
        {"code": "begin"},
        {"code": "nothing"},
        {"code": "stop", "more": 1},
        {"code": "begin", "assignment": {"rank": 1}},
        {"code": "up", "pid": 1},
    ],
)
def test_anything_else_is_refused(raw: Any) -> None:
    with pytest.raises(ValueError, match=r"code|field|argument|order"):
        order_from_json(raw)


def test_an_event_is_no_order() -> None:
    with pytest.raises(ValueError, match="is no order"):
        order_from_json(message_json(Prepared()))
    with pytest.raises(ValueError, match="is no event"):
        event_from_json(message_json(Stop()))


def test_the_reason_of_an_end_is_its_last_line() -> None:
    assert TrainingEnded(generation=0, outcome=Outcome.FAILED, text="Traceback\nValueError: boom\n").reason == "ValueError: boom"
    assert TrainingEnded(generation=0, outcome=Outcome.FINISHED).reason == ""


def test_texts_of_ray() -> None:
    missing = worker_failure(
        RuntimeError("\x1b[36mray::Worker\x1b[39m\nTraceback\n  x\nModuleNotFoundError: No module named 'hecate'\nmore")
    )
    assert (missing.text, missing.cannot_import) == ("ModuleNotFoundError: No module named 'hecate'", True)
    died = worker_failure(RuntimeError("The actor died\nbecause its node has died"))
    assert (died.text, died.cannot_import) == ("The actor died because its node has died", False)
    assert worker_failure(RuntimeError()).text == "RuntimeError"
    assert join_problem(RuntimeError("x"), "rpc: Unauthenticated") is JoinProblem.WRONG_TOKEN
    assert join_problem(RuntimeError("Version mismatch: 2.50"), "") is JoinProblem.OTHER_VERSIONS
    assert join_problem(RuntimeError("x"), "") is JoinProblem.OTHER
