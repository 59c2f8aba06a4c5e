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

from tests.host_waits import expected_waits
from tests.mock_cuda import trainings
from tests.mock_cuda.runs import Runs, do
from tests.mock_cuda.trainings import EVALUATED, SMALL, Settings

TABLES: dict[str, tuple[int, Mapping[str, Settings]]] = {
    "one rank": (1, trainings.ONE_RANK),
    "two ranks": (2, trainings.TWO_RANKS),
    "policies": (2, trainings.OF_POLICIES),
    "three ranks": (3, trainings.THREE_RANKS),
    "four ranks": (4, trainings.FOUR_RANKS),
}
"""name -> number of ranks, and the trainings that they do"""
ASKED = tuple(case for case in trainings.ONE_RANK if case.endswith("-evaluated"))


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
) -> tuple[Runs, Runs]:
    """The same runs on mock GPUs and on the CPU.

    Args:
        name: of their folders.
        on_mock: settings that are others on mock GPUs.
        begun: the runs of both that these go on with.
    """
    mine = {case: trainings.overrides(settings, workshop) for case, settings in cases.items()}
    theirs = {case: trainings.overrides((*settings, *on_mock), workshop) for case, settings in cases.items()}
    cpu = Runs(str(workshop / "config.yaml"), str(workshop / f"cpu-{name}"), world, False, mine, asked, seconds=590)
    mock = replace(cpu, folder=str(workshop / f"mock-{name}"), mock=True, overrides=theirs)
    return do(mock, begun and begun[0]), do(cpu, begun and begun[1])


def require_alike(mock: Runs, cpu: Runs, case: str, rounding: float = 1e-6) -> None:
    """Losses, norms, scores and everything written of both runs are equal within `rounding`, relative to each number or tensor."""
    assert len(mock.losses(case)) == len(cpu.losses(case)) > 0
    for got, wanted in zip(mock.losses(case), cpu.losses(case), strict=True):
        assert got == pytest.approx(wanted, rel=rounding), case
    for got_of, wanted_of in zip(mock.evaluations(case), cpu.evaluations(case), strict=True):
        assert got_of.keys() == wanted_of.keys()
        for source, scores in wanted_of.items():
            assert got_of[source] == pytest.approx(scores, rel=rounding), (case, source)
    tensors = mock.exported(case)
    assert tensors.keys() == cpu.exported(case).keys()
    for name, value in cpu.exported(case).items():
        difference = float((tensors[name].double() - value.double()).abs().max())
        assert difference <= 10 * rounding * float(value.abs().max()), f"{case}: {name} differs by {difference}"


def require_waits(step: Mapping[str, Any], wanted: Mapping[str, int]) -> None:
    assert "H2D pageable" not in step["kinds"]
    assert step["waits"] == wanted


def test_one_rank_waits_in_few_places_and_what_it_writes_answers(workshop: Path) -> None:
    """Triton's kernels are interpreted. Two layers, one micro-step: nothing waits for a layer, or for the batch."""
    short = (*SMALL, "max_steps=3")
    mock, cpu = on_both(workshop, "short", 1, {"waits": short, "answers": (*short, *EVALUATED, "max_steps=1")}, on_mock=("kernels=triton",))
    require_alike(mock, cpu, "waits", rounding=1e-5)
    (step,) = mock.steps("waits", rank=0)
    assert {"shrink_kernel", "gated_kernel", "outer_kernel"} <= set(step["launches"]), "Triton kernels did not run"
    require_waits(step, expected_waits(layers=2, micro_steps=1))


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_a_training_is_the_cpus(done: Done, table: str) -> None:
    mock, cpu = done(table)
    wrong = {}
    for case in TABLES[table][1]:
        try:
            require_alike(mock, cpu, case)
        except AssertionError as error:
            wrong[case] = str(error)
    assert not wrong, wrong


@pytest.mark.slow
def test_what_was_written_is_evaluated_and_answers_as_on_the_cpu(done: Done) -> None:
    mock, cpu = done("one rank")
    for case in ASKED:
        assert mock.answered(case) == cpu.answered(case)
        assert "up.eval" in mock.answered(case)["printed"]


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
