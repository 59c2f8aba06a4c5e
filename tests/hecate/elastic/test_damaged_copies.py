"""A copy of an expert that memory has changed is found, named, and restored from a sound one (`hecate.elastic.damaged_copies`)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hecate.apps.check.drill.armed import flip_a_bit
from hecate.apps.check.drill.tiny_training import Held
from hecate.elastic.damaged_copies import ALIKE, UNKNOWN, right_copies
from hecate.errors import UserError
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.elastic.losing import make_run


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


def right(digests: list[list[int]], changed: list[list[int]] | None = None) -> list[int]:
    """The right copies of experts, whose copies are given in rows."""
    digest_CN = np.array(digests).T
    return right_copies(digest_CN, np.array(changed).T != 0 if changed else np.zeros_like(digest_CN, dtype=bool)).tolist()


def test_of_three_copies_two_decide() -> None:
    assert right([[5, 5, 5], [7, 5, 5], [5, 7, 5], [5, 5, 7], [5, 6, 7]]) == [ALIKE, 1, 0, 0, UNKNOWN]


def test_of_two_copies_the_one_that_has_not_changed_is_right() -> None:
    assert right([[5, 7], [5, 7], [5, 7], [5, 7]], [[0, 0], [1, 0], [0, 1], [1, 1]]) == [UNKNOWN, 1, 0, UNKNOWN]


def test_a_copy_that_is_not_there_has_no_say() -> None:
    assert right([[5, 0, 0], [5, 0, 5], [0, 0, 0], [5, 0, 7]]) == [ALIKE, ALIKE, ALIKE, UNKNOWN]


def test_one_that_has_not_changed_outvotes_two_that_have() -> None:
    assert right([[5, 7, 7]], [[0, 1, 1]]) == [0]
    assert right([[5, 7, 7]], [[0, 0, 1]]) == [1], "the two untouched ones differ, and two are equal"


def damaged(rank: int, world: int, workshop: str, redundancy: int, where: str, before: int) -> tuple[list[str], list[str]]:
    """What differs from an undisturbed run after a bit has flipped on rank 1, in an expert or in a backup, and what was restored.

    Args:
        before: the step before which it flips, from 0.
    """
    whole = make_run(workshop, f"whole-{redundancy}-{where}-{before}", rank, world, f"fssdp.redundancy={redundancy}")
    run = make_run(
        workshop, f"flipped-{redundancy}-{where}-{before}", rank, world, f"fssdp.redundancy={redundancy}", "fssdp.verify_copies_steps=1"
    )
    for step in range(4):
        whole.train_one()
        if step == before and rank == 1:
            held = run.parts.optimizer.owned if where == "owner" else run.parts.optimizer.backups
            next(iter(held.values())).data.view(-1)[:1].view(torch.uint8)[-1] ^= 1
        run.train_one()
    return Held.by(whole.parts.optimizer).changed(Held.by(run.parts.optimizer)), run.copies.take_restored()


@pytest.mark.parametrize(
    ("redundancy", "where", "before"),
    [
        (1, "owner", 0),
        pytest.param(1, "owner", 2, marks=pytest.mark.slow),
        pytest.param(1, "backup", 2, marks=pytest.mark.slow),
        pytest.param(2, "owner", 2, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_copy_is_restored_and_the_step_done_again(workshop: str, redundancy: int, where: str, before: int) -> None:
    for changed, restored in run_ranks(3, damaged, workshop, redundancy, where, before):
        assert changed == []
        assert len(restored) == 1
        assert restored[0].endswith(" on rank 1")


def damaged_before(rank: int, world: int, workshop: str, redundancy: int, what: str) -> str:
    """What a save, or another change, says that comes after a flipped bit and a step."""
    run = make_run(workshop, f"{what}-{redundancy}", rank, world, f"fssdp.redundancy={redundancy}")
    run.train_one()
    if rank == 1:
        flip_a_bit(run.parts.optimizer)
    run.train_one()
    try:
        run.save() if what == "save" else run.reshard(100)
    except UserError as error:
        return str(error)
    return f"done; restored {run.copies.take_restored()}"


@pytest.mark.slow
def test_before_a_save_two_of_three_copies_decide_and_of_two_none_is_saved(workshop: str) -> None:
    assert {text.partition(" on ")[0] for text in run_ranks(3, damaged_before, workshop, 2, "save")} == {"done; restored ['0.2"}
    assert all("which one is not known, and nothing was saved" in text for text in run_ranks(3, damaged_before, workshop, 1, "save"))


@pytest.mark.slow
def test_before_experts_move_copies_are_compared(workshop: str) -> None:
    """New backups would be made of the owner's copy."""
    assert {text.partition(" on ")[0] for text in run_ranks(3, damaged_before, workshop, 2, "reshard")} == {"done; restored ['0.2"}
    assert all("which one is not known" in text for text in run_ranks(3, damaged_before, workshop, 1, "reshard"))
