"""What a configuration takes from a model that has experts: the hottest of them are those to which a run's recorded loads sent most."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hecate.config import load_config
from hecate.config.files.hottest import hottest_experts, with_experts_of_model
from hecate.errors import UserError
from hecate.parallel.values.traces import Trace, save_trace
from hecate.parallel.values.units import Unit

COUNTS = (4, 0, 5)
"""experts of each decoder layer; that in the middle has none"""
LOADS: dict[int, list[list[list[int]]]] = {
    # [steps][ranks][experts]; over all steps and ranks layer 0 has 8, 9, 3, 8, and layer 2 has 0, 6, 1, 6, 7
    0: [[[8, 0, 1, 1], [0, 2, 1, 1]], [[0, 3, 0, 3], [0, 4, 1, 3]]],
    2: [[[0, 1, 0, 3, 3], [0, 2, 0, 0, 2]], [[0, 1, 1, 2, 0], [0, 2, 0, 1, 2]]],
}


OWN = ("moe.num_experts=null", "moe.top_k=null")


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    """The folder that a run leaves: two files, one for each step."""
    folder = tmp_path / "loads"
    folder.mkdir()
    for step in (0, 1):
        table_LED = np.zeros((2, 5, 2), dtype=np.int32)
        for index, layer in enumerate(LOADS):
            for rank, counts in enumerate(LOADS[layer][step]):
                table_LED[index, : len(counts), rank] = counts
        trace = Trace(table_LED[None], (step + 1,), (Unit(0), Unit(2)), (4, 5), top_k=1, tokens_per_rank=10)
        save_trace(trace, folder / f"step-{step + 1:08d}.npz")
    return folder


@pytest.mark.parametrize(
    ("number", "wanted"),
    [(1, ((1,), (), (4,))), (2, ((0, 1), (), (1, 4))), (3, ((0, 1, 3), (), (1, 3, 4))), (4, ((0, 1, 2, 3), (), (1, 2, 3, 4)))],
)
def test_they_have_most_tokens_of_all_steps_and_ranks_and_equals_come_by_number(
    loads: Path, number: int, wanted: tuple[tuple[int, ...], ...]
) -> None:
    assert hottest_experts(loads, number, COUNTS) == wanted


def test_they_stand_in_the_configuration_by_number(loads: Path) -> None:
    given = ["model.name_or_path=mixtral-8x7b", "moe.family=moe_lora", *OWN, "lora.hottest_experts=2", f"lora.loads={loads}"]
    config = load_config("mixlora", given, claim_output=False, inputs=False)
    settled = with_experts_of_model(config, COUNTS, 2)
    assert (settled.lora.experts, settled.lora.hottest_experts, settled.lora.loads) == (((0, 1), (), (1, 4)), None, None)
    assert (settled.moe.num_experts, settled.moe.top_k) == (COUNTS, 2)
    assert with_experts_of_model(settled, COUNTS, 2) == settled


@pytest.mark.parametrize(
    ("folder", "number", "counts", "texts"),
    [
        ("loads", 2, (4, 5), ("has the loads of 2 layers (0 to 2) of 4 or 5 experts", "the model has 2 layers (0 to 1) of 4 or 5 experts")),
        ("loads", 2, (4, 0, 6), ("4 or 5 experts, but the model has 2 layers (0 to 2) of 4 or 6 experts",)),
        ("loads", 2, (4, 4, 5), ("the model has 3 layers (0 to 2) of 4 or 5 experts", "over the same base model")),
        ("loads", 5, COUNTS, ("lora.hottest_experts: 5, but the model has layers of 4 experts", "give 4 or less")),
        ("nowhere", 2, COUNTS, ("lora.loads: ", "nowhere: cannot be read: No such file", "trace: true")),
        (
            ".",
            2,
            COUNTS,
            (
                "lora.loads: ",
                "has no recorded loads",
            ),
        ),
    ],
)
def test_loads_that_do_not_fit_are_refused(loads: Path, folder: str, number: int, counts: tuple[int, ...], texts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        hottest_experts(loads.parent / folder, number, counts)
    assert all(text in str(caught.value) for text in texts), str(caught.value)
    assert len(str(caught.value).splitlines()) <= 8
