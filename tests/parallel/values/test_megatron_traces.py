from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hecate.errors import UserError
from hecate.parallel.values.megatron_traces import load_megatron_trace
from hecate.parallel.values.traces import load_trace, save_trace
from hecate.parallel.values.units import Unit


def record(rank: int, *tokens: list[int], step: int = 0, layer: int = 1, **changes: Any) -> dict[str, Any]:
    values = {"step": step, "layer": layer, "rank": rank, "num_tokens": len(tokens), "topk": 2, "top_indices": list(tokens)}
    return values | changes


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in records), encoding="utf-8")
    return path


def test_a_folder_with_a_file_per_rank(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    # Rank 1 has two tokens in step 0, none in step 7; its indices are flat once. Layer 3 comes before layer 1.
    write(
        folder / "router_trace_rank1.jsonl",
        record(1, [0, 2], [2, 3], layer=3),
        record(1, layer=1, num_tokens=2, top_indices=[1, 2, 1, 0]),
        record(1, step=7),
        record(1, step=7, layer=3),
    )
    write(
        folder / "router_trace_rank0.jsonl",
        *(record(0, [3, 0], step=step, layer=layer, stage="pre_dispatch", block="decoder") for step in (0, 7) for layer in (1, 3)),
    )
    trace = load_megatron_trace(folder, 4, model="moe")
    assert (trace.steps, trace.units, trace.num_experts) == ((0, 7), (Unit(1), Unit(3)), (4, 4))
    assert (trace.top_k, trace.tokens_per_rank, trace.model) == (2, 2, "moe")
    assert trace.loads.swapaxes(2, 3).tolist() == [
        [[[1, 0, 0, 1], [1, 2, 1, 0]], [[1, 0, 0, 1], [1, 0, 2, 1]]],
        [[[1, 0, 0, 1], [0, 0, 0, 0]], [[1, 0, 0, 1], [0, 0, 0, 0]]],
    ]
    save_trace(trace, tmp_path / "loads.npz")
    assert (load_trace(tmp_path / "loads.npz").loads == trace.loads).all()


def test_micro_batches_are_summed_and_other_blocks_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path / "trace.jsonl",
        record(0, [0, 1]),
        record(0, [1, 2], block="mtp", mtp_idx=0),
        record(0, [1, 2], [1, 0]),
    )
    trace = load_megatron_trace(path, 3)
    assert trace.loads.tolist() == [[[[2], [3], [1]]]]
    assert trace.tokens_per_rank == 3


BAD_RECORDS: list[tuple[dict[str, Any], str]] = [
    ({"step": -1}, "step must be a number >= 0, got -1"),
    ({"rank": "0"}, "rank must be"),
    ({"layer": None}, "layer must be"),
    ({"topk": 0}, "topk must be a number >= 1"),
    ({"num_tokens": True}, "num_tokens must be"),
    ({"topk": 1, "top_indices": [[1]]}, "topk is 1, but 2 in the records before"),
    ({"num_tokens": 2}, "must be 2 lists of 2 experts"),
    ({"top_indices": [[1, 2], [1]]}, "must be 1 lists of 2 experts"),
    ({"top_indices": [[1.0, 2.0]]}, "must be 1 lists of 2 experts"),
    ({"top_indices": []}, "must be 1 lists of 2 experts"),
    ({"top_indices": None}, "must be 1 lists of 2 experts"),
    ({"num_tokens": 0, "top_indices": 5}, "must be 0 lists of 2 experts"),
    ({"top_indices": [[1, 4]]}, "expert 4 is not one of 0 to 3"),
    ({"top_indices": [[-1, 2]]}, "expert -1 is not one of 0 to 3"),
    ({"top_indices": [[2, 2]]}, "token 0 has the same expert twice"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_RECORDS, ids=str)
def test_a_bad_record_is_named_by_file_and_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "trace.jsonl", record(0, [0, 1]), record(0, [1, 2], layer=2) | changes)
    with pytest.raises(UserError) as caught:
        load_megatron_trace(path, 4)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


def test_an_expert_twice_in_a_token(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl", record(0, [0, 1, 2], [3, 0, 3], topk=3))
    with pytest.raises(UserError, match=r"trace\.jsonl:1: token 1 has the same expert twice among its 3"):
        load_megatron_trace(path, 4)


@pytest.mark.parametrize("line", ['{"step": 0, "lay', "[]", "", "[" * 100_000, "\xff"])
def test_a_line_that_is_no_object(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "trace.jsonl", record(0, [0, 1]))
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError) as caught:
        load_megatron_trace(path, 4)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    everything = [record(rank, [0, 1], step=step, layer=layer) for step in (0, 1) for layer in (2, 5) for rank in (0, 1)]
    load_megatron_trace(write(tmp_path / "all.jsonl", *everything), 2)
    for index, gone in enumerate(everything):
        path = write(tmp_path / "some.jsonl", *everything[:index], *everything[index + 1 :])
        with pytest.raises(UserError) as caught:
            load_megatron_trace(path, 2)
        assert str(caught.value).splitlines()[1:] == [f"  step {gone['step']}, layer {gone['layer']}, rank {gone['rank']}: 0 of 1"]
    path = write(tmp_path / "more.jsonl", *everything, everything[0])
    with pytest.raises(UserError, match="step 0, layer 2, rank 1: 1 of 2") as caught:
        load_megatron_trace(path, 2)
    assert len(str(caught.value).splitlines()) == 4
    path = write(tmp_path / "far.jsonl", *everything, record(2**31 - 1, [0, 1], step=1))
    with pytest.raises(UserError, match="rank 2: 0 of 1") as caught:
        load_megatron_trace(path, 2)
    assert len(str(caught.value).splitlines()) == 5


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_megatron_trace(tmp_path / "nothing.jsonl", 4)
    with pytest.raises(UserError, match=r"no \*.jsonl file"):
        load_megatron_trace(tmp_path, 4)
    with pytest.raises(UserError, match="no record"):
        load_megatron_trace(write(tmp_path / "empty.jsonl"), 4)
