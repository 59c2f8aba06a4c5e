import errno
import json
import math
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.errors import UserError
from hecate.parallel.plan.sharding import ReshardGain
from hecate.parallel.values.units import Unit
from hecate.report.events import EvalScore, Move, Resharding, ShownAnswer, StepEvent, StepResult
from hecate.report.metrics import MetricsWriter, Record, eval_record, event_record, reshard_record, step_record

DOCS = Path(__file__).parents[3] / "docs" / "use" / "metrics.md"


def a_step(step: Any = 1, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "step": step,
        "epoch": 0.25,
        "epoch_samples": 400,
        "loss": 1.5,
        "aux_loss": 2.0,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "skipped": False,
        "tokens": 100,
        "step_seconds": 4.0,
        "imbalance": 1.25,
        "bytes_sent": 64,
        "calibrations": 3,
        "plan_modes": {Unit(10): "exact", Unit(2): "history"},
        "static_imbalance": 1.5,
        "copies": 4,
        "new_copies": 2,
        "parts": {"plan": 0.5, "forward": 1.0},
        "loads": {Unit(0): np.array([[1, 2], [3, 4]])},
    }
    values |= changes
    named = ("loss", "aux_loss", "grad_norm", "skipped", "loads", "bytes_sent")
    result = StepResult(*(values[name] for name in named), 16, (300, 200), 5)
    measured = {name: value for name, value in values.items() if name not in (*named, "step_seconds")}
    return step_record(StepEvent(result=result, seconds=values["step_seconds"], **measured))


def records(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_loads_are_summed_over_source_ranks() -> None:
    # Two ranks, layer 2: expert 0 gets 1 + 5, expert 1 gets 2 + 0, expert 2 gets 1 + 0; mean 3. Layer 10 is idle.
    record = a_step(loads={Unit(10): np.zeros((2, 2), dtype=np.int64), Unit(2): np.array([[1, 5], [2, 0], [1, 0]])})
    assert record["loads"] == {"2": [6, 2, 1], "10": [0, 0]}
    assert record["layer_balance"] == {"2": 2.0, "10": 1.0}
    assert list(record["loads"]) == ["2", "10"]


def test_tokens_per_second() -> None:
    assert a_step(tokens=100, step_seconds=4.0)["tokens_per_s"] == 25.0
    assert a_step(step_seconds=0.0)["tokens_per_s"] is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["loss", "aux_loss", "grad_norm", "learning_rate", "imbalance", "static_imbalance"])
def test_what_is_not_finite_is_null(field: str, bad: float) -> None:
    changes: dict[str, Any] = {field: bad}
    record = a_step(**changes)
    assert record[field] is None
    assert [name for name, value in record.items() if value is None] == [field]


def test_eval_record() -> None:
    scores = {"gcd": EvalScore(1.0, 0.25, 64), "text": EvalScore(math.nan, None, 3), "odd": EvalScore(2.0, math.inf, 0)}
    assert eval_record(7, scores, {"gcd": (ShownAnswer("4, 6?", "2", "3"),)}) == {
        "kind": "eval",
        "step": 7,
        "sources": {
            "gcd": {"loss": 1.0, "accuracy": 0.25, "samples": 64, "answers": [{"prompt": "4, 6?", "expected": "2", "answer": "3"}]},
            "text": {"loss": None, "accuracy": None, "samples": 3, "answers": []},
            "odd": {"loss": 2.0, "accuracy": None, "samples": 0, "answers": []},
        },
    }


@pytest.mark.parametrize(
    ("record", "nested"),
    [
        (a_step(), ""),
        (eval_record(1, {"gcd": EvalScore(1.0, 0.5, 2)}), "sources"),
        (event_record(1, "saved"), ""),
        (reshard_record(1, Resharding(Move(2, 8), ReshardGain(saved=0.1, moving=0.2, steps=10), seconds=0.5)), ""),
    ],
    ids=["step", "eval", "event", "reshard"],
)
def test_the_documented_fields_are_those_written(record: Record, nested: str) -> None:
    section = DOCS.read_text().split(f'## `kind: "{record["kind"]}"`')[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| `([a-z_.*]+)` \|", section, re.MULTILINE))
    written = set(record) - {"kind", "step"}
    if nested:
        written |= {f"{nested}.*.{name}" for entry in record[nested].values() for name in entry}
    assert documented == written


def test_numpy_values_become_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m") as writer:
        writer.write(a_step(step=np.int64(3), loss=np.float32(0.5), tokens=np.int64(8), bytes_sent=np.int64(9), skipped=np.bool_(True)))
    [record] = records(tmp_path / "m")
    assert (record["step"], record["loss"], record["tokens"], record["bytes_sent"], record["skipped"]) == (3, 0.5, 8, 9, True)


def test_a_line_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m") as writer:
        for step in (1, 2):
            writer.write(event_record(step, "naïve\nline"))
            assert [record["step"] for record in records(tmp_path / "m")] == list(range(1, step + 1))


def test_opening_again_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        with MetricsWriter(tmp_path / "m") as writer:
            writer.write(event_record(step, "x"))
    assert [record["step"] for record in records(tmp_path / "m")] == [1, 2]


def test_a_killed_run_and_its_resume_read_as_one(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with MetricsWriter(path) as writer:
        for step in (1, 2, 3, 4):
            writer.write(a_step(step))
        writer.write(eval_record(4, {}))
    with open(path, "ab") as file:
        file.write(b'{"kind":"step","step":5,"lo')
    with MetricsWriter(path) as writer:
        assert writer.truncate_after(2) == 4
        writer.write(event_record(2, "resumed"))
        writer.write(a_step(3))
    assert [(record["kind"], record["step"]) for record in records(path)] == [("step", 1), ("step", 2), ("event", 2), ("step", 3)]
    assert os.listdir(tmp_path) == ["m"]


@given(steps=st.lists(st.integers(0, 9), max_size=8), cut=st.integers(0, 60), keep=st.integers(0, 9))
def test_torn_anywhere(tmp_path_factory: pytest.TempPathFactory, steps: list[int], cut: int, keep: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "m"
    with MetricsWriter(path) as writer:
        for step in steps:
            writer.write(event_record(step, "x"))
    whole = path.read_bytes()
    data = whole[: max(0, len(whole) - cut)]
    path.write_bytes(data)
    # A record is whole if all but its newline is there.
    count = sum(1 for end in [i for i, byte in enumerate(whole) if byte == ord("\n")] if end <= len(data))
    with MetricsWriter(path) as writer:
        writer.truncate_after(keep)
        writer.write(event_record(keep, "resumed"))
    assert [record["step"] for record in records(path)] == [*(step for step in steps[:count] if step <= keep), keep]


@pytest.mark.parametrize("torn", [b"\0\0\0", b"[1]", b"\xff", b'{"step":true}', b'{"kind":"event"}', b"\n"])
def test_a_last_line_that_is_no_record_goes(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / "m").write_bytes(b'{"kind":"event","step":1}\n' + torn)
    with MetricsWriter(tmp_path / "m") as writer:
        assert writer.truncate_after(9) == 1
    assert (tmp_path / "m").read_bytes() == b'{"kind":"event","step":1}\n'


@pytest.mark.parametrize("hole", [b"nonsense\n", b"\0" * 5000, b"\0" * 5000 + b"\n", b"\n\n", b'{"kind":"st\n'])
def test_a_file_with_a_hole_in_its_midst_is_set_aside_and_its_records_stay(tmp_path: Path, hole: bytes) -> None:
    """As a power cut leaves it, after which the checkpoints are whole, and nothing should keep them from being resumed."""
    path = tmp_path / "m.jsonl"
    lines = [b'{"kind":"step","step":%d}\n' % step for step in range(1, 8)]
    data = b"".join([*lines[:2], hole, *lines[3:]])
    path.write_bytes(data)
    (tmp_path / "m.damaged-1.jsonl").symlink_to("nowhere")
    with MetricsWriter(path) as writer:
        writer.truncate_after(6)
        assert writer.set_aside == tmp_path / "m.damaged-2.jsonl"
        # Zeros without a newline take the record after them, too.
        lost = [3] if hole.endswith(b"\n") else [3, 4]
        assert writer.steps_without_record(6, 1) == lost
        assert writer.steps_without_record(6, 2) == [step for step in lost if step % 2 == 0]
        writer.write(a_step(7))
    assert [record["step"] for record in records(path)] == [*(step for step in range(1, 7) if step not in lost), 7]
    assert (tmp_path / "m.damaged-2.jsonl").read_bytes() == data


def test_a_file_that_is_set_aside_is_not_cut_with_the_other(tmp_path: Path) -> None:
    """Where all that follows the hole is of later steps, cutting the file would be enough, and would cut both."""
    path = tmp_path / "m"
    data = b'{"kind":"step","step":1}\nnonsense\n{"kind":"step","step":9}\n'
    path.write_bytes(data)
    with MetricsWriter(path) as writer:
        assert writer.truncate_after(1) == 2
        writer.write(a_step(2))
        assert writer.set_aside is not None
        assert writer.set_aside.read_bytes() == data
    assert [record["step"] for record in records(path)] == [1, 2]


def test_what_was_written_before_a_sync_survives_a_power_cut(tmp_path: Path) -> None:
    synced: list[str] = []
    with (
        MetricsWriter(tmp_path / "m") as writer,
        mock.patch.object(os, "fsync", lambda at: synced.append(os.readlink(f"/proc/self/fd/{at}"))),
    ):
        writer.write(a_step(1))
        assert synced == []
        writer.sync()
    assert synced == [str(tmp_path / "m"), str(tmp_path)]


def test_killed_while_truncating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    data = b"".join(b'{"kind":"event","step":%d}\n' % step for step in (3, 1, 2))
    path.write_bytes(data)
    (tmp_path / "m.tmp").write_bytes(b"left by a run that was killed")
    writer = MetricsWriter(path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.truncate_after(1)
    assert path.read_bytes() == data
    with MetricsWriter(path) as again:
        assert again.truncate_after(1) == 2


def test_later_records_go_from_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsWriter(tmp_path / "m") as writer:
        for step in (1, 2, 3):
            writer.write(event_record(step, "x"))

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        monkeypatch.setattr("hecate.report.metrics.replace_file", full)
        assert writer.truncate_after(1) == 2
        assert writer.truncate_after(9) == 0
    assert [record["step"] for record in records(tmp_path / "m")] == [1]


def test_no_folder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="metrics cannot be written: No such file"):
        MetricsWriter(tmp_path / "missing" / "m")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_a_user_error() -> None:
    writer = MetricsWriter(Path("/dev/full"))
    with pytest.raises(UserError, match="/dev/full: metrics cannot be written: No space left"):
        writer.write(event_record(1, "x"))
    writer.close()


def test_a_link_in_its_place_is_not_written_through(tmp_path: Path) -> None:
    """Who hands a run's folder to somebody else could choose which of their files grows."""
    (tmp_path / "profile").write_text("as it was", encoding="utf-8")
    for target in ("profile", "not there yet"):
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        (tmp_path / "metrics.jsonl").symlink_to(target)
        with pytest.raises(UserError, match=r"metrics.jsonl: metrics cannot be written: "):
            MetricsWriter(tmp_path / "metrics.jsonl")
    assert (tmp_path / "profile").read_text(encoding="utf-8") == "as it was"
    assert not (tmp_path / "not there yet").exists()
