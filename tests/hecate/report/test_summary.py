import json
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.report.events import EvalScore
from hecate.report.summary import EVERY_RANK, TrainableRow, print_summary, training_report

Rows = list[list[str]]


@pytest.fixture
def cells_of(capsys: pytest.CaptureFixture[str]) -> Callable[[], Rows]:
    """The cells of the table's rows as printed."""

    def read() -> Rows:
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]

    return read


def test_before_and_after(cells_of: Callable[[], Rows]) -> None:
    before = {"chain_sum": EvalScore(4.0, 0.0, 64), "gcd": EvalScore(2.0, 0.5, 32)}
    after = {"chain_sum": EvalScore(1.0, 0.625, 64), "gcd": EvalScore(2.5, 0.25, 32)}
    print_summary(before, after, [])
    assert cells_of() == [
        ["chain_sum", "64", "4.000 → 1.000", "-75.0 %", "0.000 → 0.625"],
        ["gcd", "32", "2.000 → 2.500", "+25.0 %", "0.500 → 0.250"],
    ]


def test_what_was_not_measured_is_a_dash(cells_of: Callable[[], Rows]) -> None:
    print_summary(None, {"[b]text": EvalScore(1.0, None, 3)}, [])
    assert cells_of() == [["[b]text", "3", "1.000"]], "nothing was measured before, and no answers at all"
    print_summary(None, {"sums": EvalScore(1.0, 0.5, 3)}, [])
    assert cells_of() == [["sums", "3", "1.000", "0.500"]]
    print_summary({"text": EvalScore(2.0, None, 3)}, {"text": EvalScore(1.0, None, 3)}, [])
    assert cells_of() == [["text", "3", "2.000 → 1.000", "-50.0 %"]]
    print_summary({"gone": EvalScore(1.0, 0.5, 3), "zero": EvalScore(0.0, 0.5, 3)}, {"zero": EvalScore(1.0, None, 4)}, [])
    assert cells_of() == [["zero", "3 → 4", "0.000 → 1.000", "-", "0.500 → -"], ["gone", "3", "1.000 → -", "-", "0.500 → -"]]


@pytest.mark.parametrize("columns", ["20", "300"])
def test_width_100_whatever_the_environment_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    score = EvalScore(12345.678, 1.0, 1_000_000)
    print_summary({"t" * 64: score}, {"t" * 64: score}, [])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) == 100
    for number in ("1000000", "12345.678 → 12345.678", "+0.0 %", "1.000 → 1.000"):
        assert number in out, number
    assert out.count("t" * 10) >= 2, "the name goes on in the next line"


def test_facts_stay_in_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/runs/" + "folder/" * 30
    print_summary(None, {}, [("steps", "60"), ("adapter folder", path)])
    assert capsys.readouterr().out.splitlines() == ["steps           60", f"adapter folder  {path}"]


def experts(layer: int, counts: list[int], numel: int = 101_376) -> list[TrainableRow]:
    """`counts`: experts of each rank."""
    return [TrainableRow(f"layers.{layer}.experts", count, numel, 4 * numel, f"rank {rank}") for rank, count in enumerate(counts)]


def replicated(name: str, numel: int) -> TrainableRow:
    return TrainableRow(name, 1, numel, 4 * numel, EVERY_RANK)


def test_equal_layers_share_a_line() -> None:
    rows: list[TrainableRow] = []
    for layer in range(30):
        rows += experts(layer, [4, 4])
        rows.append(replicated(f"layers.{layer}.router", 4608))
        rows += [replicated(f"layers.{layer}.self_attn.{module}_proj.{matrix}", 9216) for module in "qv" for matrix in "AB"]
    text, value = training_report(rows)
    # 30 · 8 · 101,376 = 24,330,240; 30 · 4,608 = 138,240; 30 · 4 · 9,216 = 1,105,920; four bytes each.
    assert text.splitlines() == [
        "trains 25,574,400 parameters, 102.3 MB",
        "experts: 24,330,240 parameters, 97.3 MB",
        "  layers 0-29: 8 experts x 101,376 parameters, 4 on each of ranks 0-1",
        "routers: 138,240 parameters, 553.0 kB",
        "  layers 0-29: 1 router x 4,608 parameters",
        "attention adapters: 1,105,920 parameters, 4.4 MB",
        "  layers 0-29: q_proj, v_proj: 4 tensors, 36,864 parameters",
        "held by each rank",
        "  ranks 0-1: 12,165,120 parameters, 48.7 MB",
        "  every rank: 1,244,160 parameters, 5.0 MB",
    ]
    assert value["parameters"] == 25_574_400
    assert value["by_owner"]["rank 1"] == {"parameters": 12_165_120, "bytes": 48_660_480}


def test_layers_that_differ() -> None:
    rows = experts(10, [2, 1], 10) + experts(1, [1, 2], 10) + experts(2, [2, 1], 10) + experts(0, [2, 1], 10) + experts(9, [1, 0], 5)
    rows = [row for row in rows if row.count]
    assert training_report(rows)[0].splitlines()[2:6] == [
        "  layers 0, 2, 10: 3 experts x 10 parameters, 2 on rank 0, 1 on rank 1",
        "  layer 1: 3 experts x 10 parameters, 1 on rank 0, 2 on rank 1",
        "  layer 9: 1 expert x 5 parameters, 1 on rank 0",
        "held by each rank",
    ]


def test_many_owners_and_runs_are_cut_short() -> None:
    rows = [row for layer in range(0, 40, 2) for row in experts(layer, [1 + (layer // 2 + rank) % 11 for rank in range(11)], 10)]
    lines = training_report(rows)[0].splitlines()
    assert lines[2] == "  20 layers (0, 2, ..., 38): 66 experts x 10 parameters, owners differ by layer"


def test_a_rank_that_holds_as_much_as_is_replicated() -> None:
    lines = training_report([*experts(0, [1], 7), replicated("layers.0.router", 7)])[0].splitlines()
    assert lines[-2:] == ["  rank 0: 7 parameters, 28 bytes", "  every rank: 7 parameters, 28 bytes"]


ROWS = st.lists(
    st.builds(
        TrainableRow,
        name=st.builds("layers.{}.{}".format, st.integers(0, 99), st.sampled_from(["experts", "router", "self_attn.q_proj.A", "x"])),
        count=st.integers(1, 300),
        numel=st.integers(1, 10**9),
        bytes=st.integers(1, 10**10),
        owner=st.one_of(st.just(EVERY_RANK), st.builds("rank {}".format, st.integers(0, 400))),
    ),
    max_size=60,
)


@given(ROWS)
def test_any_report_is_short_and_complete(rows: list[TrainableRow]) -> None:
    text, value = training_report(rows)
    assert len(text.splitlines()) <= 25
    assert json.loads(json.dumps(value)) == value
    assert [TrainableRow(**row) for row in value["rows"]] == rows
    assert sum(share["bytes"] for share in value["by_owner"].values()) == sum(row.count * row.bytes for row in rows)
    totals = re.findall(r"^(?:experts|routers|(?:attention )?adapters): ([0-9,]+) parameters", text, re.MULTILINE)
    assert sum(int(total.replace(",", "")) for total in totals) == sum(row.count * row.numel for row in rows)
