from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hecate.errors import UserError
from hecate.parallel.values import traces
from hecate.parallel.values.traces import Trace, TraceWriter, load_trace, save_trace
from hecate.parallel.values.units import Unit
from tests.hecate.checkpoint.disk import Killed, watched_disk, write_half

DOCS = Path(__file__).parents[3] / "docs" / "use" / "traces.md"


def a_trace(**changes: Any) -> Trace:
    """Steps 3 and 5 of layers 0 (2 experts) and 4 (3 experts), two ranks of at most 4 tokens, one expert a token."""
    loads = [[[[1, 2, 0], [3, 0, 0]], [[1, 1, 1], [0, 0, 3]]], [[[4, 0, 0], [0, 0, 0]], [[0, 2, 2], [0, 0, 0]]]]
    values: dict[str, Any] = {
        "loads": np.array(loads).swapaxes(2, 3),
        "steps": (3, 5),
        "units": (Unit(0), Unit(4)),
        "num_experts": (2, 3),
        "top_k": 1,
        "tokens_per_rank": 4,
        "model": "tiny",
        "notes": {"data": ["a"]},
    }
    return Trace(**(values | changes))


def same(one: Trace, other: Trace) -> bool:
    facts = ("steps", "units", "num_experts", "top_k", "tokens_per_rank", "model", "notes")
    return np.array_equal(one.loads, other.loads) and all(getattr(one, name) == getattr(other, name) for name in facts)


def rewrite(path: Path, **arrays: Any) -> None:
    """The same file with other arrays; a dict stands for the header's changes."""
    with np.load(path) as old:
        kept = dict(old)
    if isinstance(arrays.get("header"), dict):
        header = json.loads(kept["header"].tobytes()) | arrays["header"]
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez(path, **(kept | arrays))


def of_unit(trace: Trace, index: int) -> np.ndarray:
    """int [steps, the unit's experts, source ranks]"""
    return trace.loads[:, index, : trace.num_experts[index]]


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "loads.npz"
    save_trace(a_trace(), path)
    assert same(load_trace(path), a_trace())
    assert list(tmp_path.iterdir()) == [path]
    assert of_unit(a_trace(), 0).tolist() == [[[1, 3], [2, 0]], [[4, 0], [0, 0]]]
    first = path.read_bytes()
    save_trace(a_trace(), path)
    assert path.read_bytes() == first


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    save_trace(a_trace(), tmp_path / "loads.npz")
    with np.load(tmp_path / "loads.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["header", "loads"]
        header = json.loads(arrays["header"].tobytes())
        assert (arrays["header"].dtype, arrays["loads"].shape) == (np.uint8, (2, 2, 2, 3))
        assert arrays["loads"][0].tolist() == [[[1, 2, 0], [3, 0, 0]], [[1, 1, 1], [0, 0, 3]]], "[layers, source ranks, experts]"
    assert header == {
        "version": 1,
        "steps": [3, 5],
        "layers": [0, 4],
        "num_experts": [2, 3],
        "top_k": 1,
        "tokens_per_rank": 4,
        "model": "tiny",
        "notes": {"data": ["a"]},
    }
    assert re.findall(r"^\| `(\w+)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE) == list(header)


def test_units_of_one_layer_have_loads_of_their_own(tmp_path: Path) -> None:
    """A layer's FFN is written as its number, as ever; another place of the layer with its name."""
    units = (Unit(2), Unit(2, "self_attn.q_proj"))
    path = tmp_path / "loads"
    ours = writer(path)
    ours.append(1, {units[1]: np.array([[1, 0], [0, 2]]), units[0]: np.array([[3, 3], [0, 1]])})
    ours.save()
    with np.load(path / "step-00000001.npz", allow_pickle=False) as arrays:
        assert json.loads(arrays["header"].tobytes())["layers"] == [2, "2.self_attn.q_proj"]
    resumed = writer(path, after=1)
    resumed.append(2, {unit: np.zeros((2, 2), dtype=np.int64) for unit in units})
    resumed.save()
    trace = load_trace(path)
    assert trace.units == units
    assert trace.loads[0].tolist() == [[[3, 3], [0, 1]], [[1, 0], [0, 2]]]


def test_no_damage_goes_unseen(tmp_path: Path) -> None:
    """Each byte turned over, and each beginning of the file: refused, or without effect (a date, an unused field of zip)."""
    path = tmp_path / "loads.npz"
    save_trace(a_trace(), path)
    whole = path.read_bytes()
    damaged = [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(len(whole))]
    refused = []
    for data in [*damaged, *(whole[:size] for size in range(0, len(whole), 7))]:
        path.write_bytes(data)
        try:
            assert same(load_trace(path), a_trace())
        except UserError as error:
            refused.append(str(error))
    assert all(text.startswith(f"{path}: ") for text in refused)
    assert len(refused) > len(whole) / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"header": {"version": 2}}, "version 2"),
        ({"header": {"version": None}}, "no version"),
        ({"header": np.frombuffer(b"[1]", dtype=np.uint8)}, "no version"),
        ({"header": np.frombuffer(b"{", dtype=np.uint8)}, "not a trace"),
        ({"header": {"more": 1}}, "header"),
        ({"header": {"steps": 3}}, "header"),
        ({"header": {"steps": [3, 3]}}, "steps must ascend, got 3, 3"),
        ({"header": {"steps": [3, True]}}, "steps must be numbers"),
        ({"header": {"layers": [0, "4.mlp.up_proj", 5]}}, "do not fit 2 steps, 3 layers"),
        ({"header": {"layers": [0, "4"]}}, "layers must be numbers, or units"),
        ({"header": {"layers": [0, "four.up_proj"]}}, "layers must be numbers, or units"),
        ({"header": {"layers": [0, None]}}, "layers must be numbers, or units"),
        ({"header": {"layers": [0, -1]}}, "layers must be numbers >= 0"),
        ({"header": {"layers": [4, 0]}}, "layers must ascend"),
        ({"header": {"layers": [0]}}, "do not fit 2 steps, 1 layers"),
        ({"header": {"num_experts": [2, 4]}}, "do not fit"),
        ({"header": {"num_experts": [3, 2]}}, "loads exceed"),  # layer 4 has load on its third expert
        ({"header": {"top_k": 0}}, "top_k must be"),
        ({"header": {"tokens_per_rank": 2}}, "loads exceed"),
        ({"header": {"model": 1}}, "model must be text"),
        ({"loads": np.zeros((2, 2, 2, 3))}, "int32 or int64"),
        ({"loads": np.zeros((2, 2, 3), dtype=np.int64)}, "int32 or int64"),
        ({"loads": np.zeros((2, 2, 0, 3), dtype=np.int64)}, "int32 or int64"),
        ({"loads": np.full((2, 2, 2, 3), -1)}, "negative"),
        ({"loads": np.full((2, 2, 2, 3), 4) * (np.arange(3) < 2)}, "loads exceed top_k 1"),  # 8 assignments of 4 tokens
        ({"loads": np.array([{"an": "object"}], dtype=object)}, "not a trace"),
    ],
    ids=str,
)
def test_what_is_no_trace_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "loads.npz"
    save_trace(a_trace(), path)
    rewrite(path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_trace(path)
    assert str(caught.value).startswith(str(path))


def test_an_array_that_fits_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "loads.npz"
    save_trace(a_trace(), path)
    with zipfile.ZipFile(path) as old:
        header = old.read("header.npy")
    with zipfile.ZipFile(path, "w") as new:
        new.writestr("header.npy", header)
        with new.open("loads.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (2**40, 2, 2, 3)})
    with pytest.raises(UserError, match="damaged"):
        load_trace(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "text").write_text("loads", encoding="utf-8")
    for name in ("one.npy", "other.npz", "text"):
        with pytest.raises(UserError, match="not a trace"):
            load_trace(tmp_path / name)
    for name in ("nothing", "."):
        with pytest.raises(UserError, match="cannot be read"):
            load_trace(tmp_path / name)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "loads.npz"
    save_trace(a_trace(), path)
    (tmp_path / "loads.npz.tmp").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        save_trace(a_trace(model="other"), path)
    assert load_trace(path).model == "tiny"


def writer(path: Path, after: int = 0) -> TraceWriter:
    return TraceWriter(path, top_k=1, tokens_per_rank=4, model="tiny", notes={}, after=after)


def loads_of(step: int) -> dict[Unit, np.ndarray]:
    """Layer 7 before layer 2, which has an expert less."""
    return {Unit(7): np.array([[0, 0], [1, 0], [step % 4, 0]]), Unit(2): np.array([[step % 3, 0], [0, 2]])}


def test_a_writer_keeps_all_steps(tmp_path: Path) -> None:
    path = tmp_path / "loads"
    ours = writer(path)
    ours.save()
    assert not path.exists(), "nothing to write"
    ours.append(1, loads_of(1))
    ours.save()
    assert load_trace(path).steps == (1,)
    ours.append(2, loads_of(2))
    ours.append(4, loads_of(4))
    ours.save()
    trace = load_trace(path)
    assert (trace.steps, trace.units, trace.num_experts, trace.top_k, trace.model) == ((1, 2, 4), (Unit(2), Unit(7)), (2, 3), 1, "tiny")
    assert trace.loads.dtype == np.int32
    assert trace.loads.tolist()[1] == [[[2, 0], [0, 2], [0, 0]], [[0, 0], [1, 0], [2, 0]]]
    with pytest.raises(AssertionError):
        ours.append(4, loads_of(4))


@pytest.mark.parametrize("after", [2, 3, 9])
def test_a_resumed_writer_goes_on_after_its_step(tmp_path: Path, after: int) -> None:
    path = tmp_path / "loads"
    first = writer(path)
    for step in (1, 2, 3, 4):
        first.append(step, loads_of(9))
    first.save()
    resumed = writer(path, after)
    resumed.append(after + 1, loads_of(after + 1))
    resumed.save()
    trace = load_trace(path)
    assert trace.steps == (*range(1, min(after, 4) + 1), after + 1)
    assert of_unit(trace, 0)[-1].tolist() == loads_of(after + 1)[Unit(2)].tolist()
    assert (trace.loads[:-1] == trace.loads[0]).all()


def test_a_new_run_does_not_read_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "loads"
    path.mkdir()
    (path / "step-00000001.npz").write_bytes(b"garbage")
    (path / "step-00000007.npz").write_bytes(b"garbage")
    (tmp_path / "loads.npz").write_bytes(b"an earlier version's")
    with pytest.raises(UserError, match="not a trace"):
        writer(path, after=1)
    fresh = writer(path)
    fresh.append(2, loads_of(1))
    fresh.save()
    assert load_trace(path).steps == (2,)
    assert sorted(tmp_path.rglob("*.npz")) == [path / "step-00000002.npz"]


@pytest.mark.parametrize(
    "other",
    [
        {Unit(2): np.zeros((2, 2)), Unit(8): np.zeros((3, 2))},
        {Unit(2): np.zeros((3, 2)), Unit(7): np.zeros((3, 2))},
    ],
    ids=["layers", "experts"],
)
def test_another_runs_file_is_not_gone_on_with(tmp_path: Path, other: dict[Unit, np.ndarray]) -> None:
    path = tmp_path / "loads"
    first = writer(path)
    first.append(1, loads_of(1))
    first.save()
    with pytest.raises(UserError, match="other layers or experts"):
        writer(path, after=1).append(2, other)


def test_a_run_that_goes_on_with_more_ranks(tmp_path: Path) -> None:
    """A rank that was not there has sent nothing."""
    path = tmp_path / "loads"
    first = writer(path)
    first.append(1, loads_of(1))
    first.save()
    on_three = {unit: np.concatenate([loads_ED, loads_ED[:, :1]], axis=1) for unit, loads_ED in loads_of(2).items()}
    later = writer(path, after=1)
    later.append(2, on_three)
    later.save()
    trace = load_trace(path)
    for index, unit in enumerate(trace.units):
        assert (of_unit(trace, index)[0] == np.pad(loads_of(1)[unit], ((0, 0), (0, 1)))).all()
        assert (of_unit(trace, index)[1] == on_three[unit]).all()


def recorded(path: Path, saves: list[list[int]], after: int = 0) -> TraceWriter:
    """A writer that has appended the steps of each list, and saved after each."""
    ours = writer(path, after)
    for steps in saves:
        for step in steps:
            ours.append(step, loads_of(step))
        ours.save()
    return ours


def content(path: Path) -> dict[int, list[Any]]:
    """step -> loads"""
    trace = load_trace(path)
    return dict(zip(trace.steps, trace.loads.tolist(), strict=True))


def bytes_of_each_save(folder: Path, saves: int) -> list[int]:
    """The bytes of the files that each save has made or replaced, of one step each."""
    ours, seen, written = writer(folder / "loads"), set(), []
    for step in range(1, saves + 1):
        ours.append(step, loads_of(step))
        ours.save()
        files = {(path.stat().st_ino, path.stat().st_mtime_ns): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        written.append(sum(size for key, size in files.items() if key not in seen))
        seen |= files.keys()
    return written


def test_a_save_writes_the_steps_since_the_last_one_alone(tmp_path: Path) -> None:
    """However long a run is, its hundredth checkpoint writes as many bytes of loads as its first."""
    written = bytes_of_each_save(tmp_path, 100)
    assert max(written) <= 1.1 * written[0], written
    assert len(content(tmp_path / "loads")) == 100


def test_what_is_written_is_not_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that saves at its end alone writes, too, when so many loads wait: here those of three steps."""
    monkeypatch.setattr(traces, "MOST_WAITING_BYTES", 3 * 2 * 3 * 2 * 4)
    ours, kept = writer(tmp_path / "loads"), []
    for step in range(1, 11):
        ours.append(step, loads_of(step))
        kept.append(
            sum(one.nbytes for value in vars(ours).values() if isinstance(value, list) for one in value if isinstance(one, np.ndarray))
        )
    assert 0 < max(kept) < 3 * 2 * 3 * 2 * 4, kept
    ours.save()
    assert list(content(tmp_path / "loads")) == list(range(1, 11))


def test_a_run_that_goes_back_has_no_step_twice(tmp_path: Path) -> None:
    """Back from step 6 to a checkpoint in the middle of a chunk, and to the end of one."""
    path = tmp_path / "loads"
    before = content(recorded(path, [[1, 2], [3, 4], [5, 6]]).folder)
    recorded(path, [[4, 9]], after=3)
    after = content(path)
    assert list(after) == [1, 2, 3, 4, 9]
    assert all(after[step] == before[step] for step in after if step < 9)
    recorded(path, [[5]], after=4)
    assert list(content(path)) == [1, 2, 3, 4, 5]
    with pytest.raises(AssertionError):
        writer(path, after=4).append(4, loads_of(4))


def test_a_file_of_an_earlier_version_goes_on_as_a_folder(tmp_path: Path) -> None:
    path, old = tmp_path / "loads", tmp_path / "loads.npz"
    save_trace(load_trace(recorded(tmp_path / "other", [[1, 2, 3]]).folder), old)
    wanted = content(old)
    recorded(path, [[3]], after=2)
    assert content(path) == wanted
    assert not old.exists()
    save_trace(a_trace(steps=(8, 9)), old)
    recorded(tmp_path / "loads", [[1]], after=0)
    assert (list(content(path)), old.exists()) == ([1], False), "a new run"


@pytest.mark.parametrize("old_file", [False, True], ids=["folder", "an earlier version's file"])
def test_whatever_a_save_is_killed_in_the_trace_is_the_beginning_of_a_run(tmp_path: Path, old_file: bool) -> None:
    """A run went back from step 6 to 3, and its next save is killed before each operation of the disk, or in the middle of a write. What is
    left is read, and a run that goes back to 3 once more has all of it."""
    before, after = [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5]
    for fatal in range(1, 200):
        folder = tmp_path / str(fatal)
        folder.mkdir()
        path = folder / "loads"
        if old_file:
            save_trace(load_trace(recorded(folder / "other", [before]).folder), folder / "loads.npz")
        else:
            recorded(path, [[1], [2, 3, 4], [5], [6]])
        ours = writer(path, after=3)
        ours.append(4, loads_of(4))
        ours.append(5, loads_of(5))

        def die(number: int, operation: str, args: tuple[Any, ...], fatal: int = fatal) -> None:
            if number == fatal:
                if operation == "write":
                    write_half(args)
                raise Killed

        try:
            with watched_disk(die):
                ours.save()
        except Killed:
            readable = path if not (folder / "loads.npz").exists() else folder / "loads.npz"
            left = list(content(readable))
            assert left in (before[: len(left)], after), left
            assert left[:3] == [1, 2, 3]
            recorded(path, [[4, 5]], after=3)
        else:
            break
        assert list(content(path)) == after
        assert not list(folder.rglob("*.tmp"))
    assert list(content(path)) == after
    assert 8 < fatal < 199


def test_a_rank_with_more_tokens_than_there_were_to_be(tmp_path: Path) -> None:
    """Shares change while a run lasts, when a rank is lost or is slow; a rank then has more tokens than the 4 that the writer was told."""
    ours = writer(tmp_path / "loads")
    ours.append(1, {Unit(0): np.array([[5, 0], [1, 1]])})
    ours.save()
    assert load_trace(tmp_path / "loads").tokens_per_rank == 6
    ours.append(2, {Unit(0): np.array([[1, 0], [1, 1]])})
    ours.save()
    assert load_trace(tmp_path / "loads").tokens_per_rank == 6


def test_a_folder_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recorded loads"):
        load_trace(tmp_path)
    save_trace(a_trace(), tmp_path / "step-00000003.npz")
    for changes, message in (({"steps": (4, 6)}, "steps must ascend"), ({"steps": (6, 7), "top_k": 2}, "different top_k")):
        save_trace(a_trace(**changes), tmp_path / "step-00000006.npz")
        with pytest.raises(UserError, match=f"{tmp_path}: damaged: .*{message}"):
            load_trace(tmp_path)
