"""Whole trainings on mock GPUs: the losses, the scores and what is written are the CPU's, and the host waits where a table says.

Wrong devices, reads of memory that nothing has written, and tensors of the host in collectives or kernels are errors of the mock device.
What a real GPU does besides is not shown: streams beside each other, NCCL, the kernels' machine code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from tests.host_waits import expected_waits
from tests.mock_cuda import trainings
from tests.mock_cuda.runs import Runs, do
from tests.mock_cuda.trainings import EVALUATED, FULL, HECATE, MOE_LORA, SMALL, STEPS, Settings

TABLES: dict[str, tuple[int, Mapping[str, Settings]]] = {
    "one rank": (1, trainings.ONE_RANK),
    "two ranks": (2, trainings.TWO_RANKS),
    "policies": (2, trainings.OF_POLICIES),
    "three ranks": (3, trainings.THREE_RANKS),
    "four ranks": (4, trainings.FOUR_RANKS),
}
"""name -> number of ranks, and the trainings that they do"""
ASKED = tuple(case for case in trainings.ONE_RANK if case.endswith("-evaluated"))

_GOES_ON: Settings = (*HECATE, "lr_scheduler_type=constant", "warmup_ratio=0")
LASTING = {"mixlora": _GOES_ON, "full": (*FULL, *_GOES_ON), "moe_lora": (*MOE_LORA, *_GOES_ON, "moe.train_router=true")}
"""trainings whose rate of learning does not depend on the number of steps"""


class Done(Protocol):
    def __call__(self, table: str) -> tuple[Runs, Runs]:
        """The runs of a table on mock GPUs and on the CPU."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainings.make_folder(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def done(workshop: Path) -> Done:
    @cache
    def both(table: str) -> tuple[Runs, Runs]:
        world, cases = TABLES[table]
        return on_both(workshop, table.replace(" ", "-"), world, cases, asked=ASKED if table == "one rank" else ())

    return both


def on_both(
    workshop: Path,
    name: str,
    world: int,
    cases: Mapping[str, Settings],
    *,
    on_mock: Settings = (),
    asked: tuple[str, ...] = (),
    begun: tuple[Runs, Runs] | None = None,
    unwatched: int = 2,
) -> tuple[Runs, Runs]:
    """The same runs on mock GPUs and on the CPU.

    Args:
        name: of their folders.
        on_mock: settings that are others on mock GPUs.
        begun: the runs of both that these go on with.
        unwatched: the number of first steps of which nothing is noted.
    """
    mine = {case: trainings.overrides(settings, workshop) for case, settings in cases.items()}
    theirs = {case: trainings.overrides((*settings, *on_mock), workshop) for case, settings in cases.items()}
    folder = str(workshop / f"cpu-{name}")
    cpu = Runs(str(workshop / "config.yaml"), folder, world, False, mine, asked, seconds=590, unwatched=unwatched)
    mock = replace(cpu, folder=str(workshop / f"mock-{name}"), mock=True, overrides=theirs)
    return do(mock, begun and begun[0]), do(cpu, begun and begun[1])


def require_alike(mock: Runs, cpu: Runs, case: str, rounding: float = 1e-9) -> None:
    """Losses, norms, scores and everything written of both runs are equal within `rounding`, relative to each number or tensor.

    Where it is more than float32's, norms may differ by five times as much: a token whose best experts are nearly equal chooses another.
    """
    assert len(mock.losses(case)) == len(cpu.losses(case)) > 0
    for got, wanted in zip(mock.losses(case), cpu.losses(case), strict=True):
        assert got[:2] == pytest.approx(wanted[:2], rel=rounding), case
        assert got[2] == pytest.approx(wanted[2], rel=rounding if rounding < 1e-3 else 5 * rounding), case
    for got_of, wanted_of in zip(mock.evaluations(case), cpu.evaluations(case), strict=True):
        assert got_of.keys() == wanted_of.keys()
        for source, scores in wanted_of.items():
            assert known(got_of[source]) == pytest.approx(known(scores), rel=rounding), (case, source)
    got_tensors, wanted_tensors = mock.exported(case), cpu.exported(case)
    assert got_tensors.keys() == wanted_tensors.keys()
    for name, value in wanted_tensors.items():
        assert value.isfinite().all(), f"{case}: {name}"
        if rounding < 1e-8:  # AdamW makes a difference of its own of rounding in float32 or less, where a gradient is no more than that
            torch.testing.assert_close(
                got_tensors[name], value, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{case}: {name}: {text}"
            )


def known(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that an evaluation without answers has not found out."""
    return {name: value for name, value in scores.items() if value is not None}


def require_waits(step: Mapping[str, Any], wanted: Mapping[str, int]) -> None:
    assert "H2D pageable" not in step["kinds"]
    assert step["waits"] == wanted


def test_one_rank_waits_in_few_places_and_its_adapter_is_scored(workshop: Path) -> None:
    """Triton's kernels are interpreted. Two layers, one micro-step: nothing waits for a layer, for the batch or for its attention."""
    evaluated = (*EVALUATED, "eval.on_start=false", "eval.max_samples=1", "eval.max_new_tokens=1")
    short = (*SMALL, *trainings.WIDE_HEADS, *evaluated, "max_steps=2", "moe.num_experts=3")
    mock, cpu = on_both(workshop, "short", 1, {"mixlora": short}, on_mock=("kernels=triton",), unwatched=1)
    require_alike(mock, cpu, "mixlora", rounding=1e-5)
    assert len(mock.evaluations("mixlora")) == 1
    (step,) = mock.steps("mixlora", rank=0)
    assert {"shrink_kernel", "gated_kernel", "outer_kernel"} <= set(step["launches"]), "Triton kernels did not run"
    assert step["launches"]["lora_shrink_kernel"] == 2 * 2 * 4, "of two layers' four projections, in both passes"
    in_kernels = {"aten::bitwise_xor", "aten::__rshift__", "aten::searchsorted"}
    assert not in_kernels & set(step["operators"]), "torch makes dropout's masks, or sorts assignments"
    assert step["launches"]["flex_attention"] == 2, "a layer's attention was computed in another way"
    require_waits(step, expected_waits(layers=2, micro_steps=1))
    assert "hecate: topology: 1 x Mock H100 on 1 node" in mock.log(rank=0)
    assert "does not know the card 'Mock H100'" in mock.log(rank=0), "topology: auto did not read the device's name"
    assert "peak GPU memory, reserved" in mock.log(rank=0)
    assert "hecate: topology:" not in cpu.log(rank=0)


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_a_training_is_the_cpus(done: Done, table: str) -> None:
    mock, cpu = done(table)
    wrong = {}
    for case in TABLES[table][1]:
        try:
            require_alike(mock, cpu, case, rounding=2e-2 if "bf16" in case else 1e-5 if "flex" in case else 1e-9)
        except AssertionError as error:
            wrong[case] = str(error)
    assert not wrong, wrong


@pytest.mark.slow
def test_what_was_written_is_evaluated_and_answers(done: Done) -> None:
    """The answers are computed in bfloat16 on a GPU and in float32 on a CPU, so that they may be others, or end before their first word."""
    mock, cpu = done("one rank")
    for case in ASKED:
        assert _figures(mock.answered(case)["printed"]) == _figures(cpu.answered(case)["printed"])
        assert any(source == "up.eval" for _, source, *_ in _figures(mock.answered(case)["printed"]))
        assert isinstance(mock.answered(case)["answer"], str)


def _figures(table: str) -> list[list[str]]:
    """The cells of a printed table's rows, without its head, which names a folder."""
    return [[cell.strip() for cell in line.split("│")] for line in table.splitlines() if line.startswith("│")]


@pytest.fixture(scope="module")
def begun(workshop: Path) -> tuple[Runs, Runs]:
    """Two steps of each kind of experts on two ranks."""
    cases = {kind: (*settings, "max_steps=2") for kind, settings in LASTING.items()}
    return on_both(workshop, "begun", 2, cases)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_a_checkpoint_of_two_ranks_is_resumed_by_another_number(workshop: Path, begun: tuple[Runs, Runs], world: int) -> None:
    resumed = {kind: (*settings, "resume=true") for kind, settings in LASTING.items()}
    mock, cpu = on_both(workshop, f"resumed-by-{world}", world, resumed, begun=begun)
    for kind in LASTING:
        assert len(mock.losses(kind)) == STEPS, "the run did not go on from its checkpoint"
        require_alike(mock, cpu, kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "world", "waits"), [("two ranks", 2, trainings.WAITS_OF_TWO_RANKS), ("four ranks", 4, trainings.WAITS_OF_FOUR_RANKS)]
)
def test_ranks_wait_where_the_table_says(done: Done, table: str, world: int, waits: dict[str, dict[str, Any]]) -> None:
    """For the counts of rows where tokens travel, and for the loads where they are planned from: once a layer and micro-step each."""
    mock, _ = done(table)
    wrong = {}
    for case, facts in waits.items():
        wanted = expected_waits(**{"layers": 2, "micro_steps": 2, "torch_path": True, **facts})
        for rank in range(world):
            for step in mock.steps(case, rank):
                if step["waits"] != wanted or "H2D pageable" in step["kinds"]:
                    wrong[case, rank] = (step["waits"], step["kinds"], dict(wanted))
    assert not wrong, wrong


@pytest.mark.slow
def test_interpreted_kernels_give_the_cpus_losses(workshop: Path) -> None:
    mock, cpu = on_both(workshop, "interpreted", 1, trainings.INTERPRETED, on_mock=("kernels=triton",))
    for case in trainings.INTERPRETED:
        require_alike(mock, cpu, case, rounding=1e-5)
        step = mock.steps(case, rank=0)[-1]
        assert step["launches"], f"{case}: Triton kernels did not run"
        require_waits(step, expected_waits(layers=2, micro_steps=1))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in trainings.FOUR_RANKS if "leaders" in case or "slices" in case])
def test_gathers_take_the_route_that_the_training_is_there_for(done: Done, case: str) -> None:
    mock, _ = done("four ranks")
    (wanted,) = (route for word, route in trainings.ROUTES.items() if word in case)
    assert {route for step in mock.steps(case, rank=1) for route in step["routes"]} == {wanted}


@pytest.mark.slow
def test_ranks_on_gloo_share_gpus(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks on two mock GPUs, whose gloo has no messages of GPU tensors, over leaders and in slices."""
    monkeypatch.setenv("HECATE_COLLECTIVES", "gloo")
    monkeypatch.setenv("MOCK_GPUS", "2")
    cases = {case: trainings.FOUR_RANKS[case] for case in ("mixlora-leaders", "mixlora-slices")}
    mock, cpu = on_both(workshop, "shared", 4, cases)
    for case in cases:
        require_alike(mock, cpu, case)
