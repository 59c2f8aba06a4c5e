"""A fault strikes its rank, step, place and call, and no other."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hecate.apps.check.drill.armed import Armed, Injected, carry_out, flip_a_bit, from_text, not_struck, to_text
from hecate.apps.check.drill.disk import watched_disk


def strikes(armed: Armed, step: int, places: list[str]) -> list[int]:
    """Which of a step's places were struck: those whose scalar has become 7."""
    armed("step", step)
    subjects = [torch.zeros(1) for _ in places]
    for place, subject in zip(places, subjects, strict=True):
        armed(place, subject)  # type: ignore[arg-type]
    return [number for number, subject in enumerate(subjects) if subject.item() == 7]


def test_a_fault_strikes_once_where_it_says() -> None:
    places = ["forward", "loss", "forward", "loss"]
    second = Injected(action="fill", place="loss", rank=1, step=2, call=2, value=7)
    for step in (1, 2, 3):
        assert strikes(Armed([second], 1), step, places) == ([3] if step == 2 else [])
        assert strikes(Armed([second], 0), step, places) == []
    each = Injected(action="fill", place="loss", call=0, value=7)
    assert strikes(Armed([each], 5), 9, places) == [1, 3]


def test_faults_travel_as_text() -> None:
    given = [Injected(action="kill", place="norm", rank=3, step=2), Injected(action="sleep", place="save", value=0.5)]
    assert from_text(to_text(given)) == given


def test_what_is_seen_on_the_way_is_written_down(tmp_path: Path) -> None:
    armed = Armed([Injected(action="sleep", place="norm", step=4)], 2, tmp_path / "trace")
    for step in (3, 4):
        armed("step", step)
        armed("norm", None)
    lines = [json.loads(line) for line in (tmp_path / "trace").read_text(encoding="utf-8").splitlines()]
    assert [(one["what"], one["step"], one["rank"]) for one in lines] == [("step", 3, 2), ("step", 4, 2), ("sleep", 4, 2)]


def test_a_fault_that_has_struck_does_not_strike_again_in_ranks_that_were_started_anew(tmp_path: Path) -> None:
    first, second = (Injected(action="sleep", place="norm", rank=2, step=step) for step in (4, 5))
    assert not_struck([first, second], tmp_path / "trace") == [first, second]
    armed = Armed([first], 2, tmp_path / "trace")
    armed("step", 4)
    armed("norm", None)
    assert not_struck([first, second], tmp_path / "trace") == [second]


def test_a_full_disk_still_deletes() -> None:
    full = Injected(action="fail", place="file", value=float(errno.ENOSPC))
    carry_out(full, "unlink")
    with pytest.raises(OSError, match="No space left"):
        carry_out(full, "write")


def test_what_a_fault_does_to_numbers() -> None:
    hidden = torch.ones(2, 3, requires_grad=True)
    carry_out(Injected(action="scale", place="experts", value=4.0), hidden)
    assert hidden.tolist() == [[4.0] * 3] * 2
    carry_out(Injected(action="one_expert", place="router", value=2), hidden)
    assert hidden.argmax(1).tolist() == [2, 2]

    parameter = nn.Parameter(torch.ones(4))
    optimizer = SimpleNamespace(owned={"0.1": parameter}, replicated={})
    parameter.grad = torch.zeros(4)
    carry_out(Injected(action="fill", place="gradients", value=9.0), optimizer)
    assert parameter.grad.tolist() == [9.0, 0, 0, 0]
    before = parameter.detach().clone()
    flip_a_bit(optimizer)
    assert (parameter != before).tolist() == [True, False, False, False]
    flip_a_bit(optimizer)
    assert torch.equal(parameter, before)


def test_only_operations_on_wanted_paths_are_counted(tmp_path: Path) -> None:
    seen: list[tuple[int, str]] = []
    real = os.open
    with watched_disk(lambda number, operation, _args: seen.append((number, operation)), only=lambda path: "mine" in path):
        for name in ("mine", "other"):
            descriptor = os.open(tmp_path / name, os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, b"a")
            os.fsync(descriptor)
            os.close(descriptor)
        os.unlink(tmp_path / "mine")
    assert seen == [(1, "open"), (2, "write"), (3, "fsync"), (4, "unlink")]
    assert os.open is real


@pytest.mark.parametrize("bits", [torch.float64, torch.float32, torch.bfloat16])
def test_a_flipped_bit_is_a_small_change_or_another_sign(bits: torch.dtype) -> None:
    parameter = nn.Parameter(torch.full((2,), 1.5, dtype=bits))
    flip_a_bit(SimpleNamespace(owned={"0.1": parameter}))
    assert parameter[0] != 1.5
    assert torch.isfinite(parameter).all()
