"""A recording is a summary; the rows from which a benchmark goes on are in a file beside it."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.plan_quality import MODES, compact
from benchmarks.report import as_json, finish, kept_rows, raw_file, recorded, spread
from hecate.parallel.planners import ROWS


def test_a_spread_counts_what_is_finite() -> None:
    assert spread([4.0, math.inf, 1.0]) == [2, 1.0, pytest.approx(2.0), 4.0]
    assert spread([math.inf]) == [0]


def test_a_recording_has_five_digits_and_a_row_a_line() -> None:
    text = as_json({"rows": [{"a": 1 / 3, "b": [123456.7, 8]}, {"a": math.inf}], "summary": {"x": 2.0}, "none": []})
    assert json.loads(text) == {"rows": [{"a": 0.33333, "b": [123460.0, 8]}, {"a": math.inf}], "summary": {"x": 2.0}, "none": []}
    assert '  {"a": 0.33333, "b": [123460.0, 8]},\n' in text


def test_a_benchmark_goes_on_with_the_rows_beside_its_recording(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    first = recorded([], {"case": 1}, lambda: [{"ms": 1 / 3}], path)
    finish("some", first, {}, path, kept=[{"cases": 1}])
    assert json.loads(path.read_text(encoding="utf-8"))["rows"] == [{"cases": 1}]
    rows = kept_rows(Namespace(resume=True, json=path))
    assert rows == first == recorded(rows, {"case": 1}, list, path)
    assert kept_rows(Namespace(resume=False, json=path)) == []
    raw_file(path).unlink()
    assert kept_rows(Namespace(resume=True, json=path)) == []


def test_plans_are_compared_over_the_workloads_of_a_case() -> None:
    modes = {f"{mode}_{what}": 1.0 for mode in MODES for what in ("ms", "imbalance", "planning_ms")}
    case = {"topology": "one", "experts": "full experts", "slots": 1}
    every = dict.fromkeys(ROWS, 4.0)
    rows = [
        {**case, "workload": name, **every, "auto": auto, "full": math.inf, "grouped_ep": 8.0, **modes}
        for name, auto in (("a", 2.0), ("b", 4.0))
    ]
    (found,) = compact(rows)
    assert case.items() <= found.items()
    assert found["grouped_ep / auto"] == [2, 2.0, pytest.approx(8**0.5), 4.0]
    assert found["full / auto"] == [0]
    assert found["auto / best other"][3] == 1.0
