"""The traces of several ranks become one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from hecate.report.timeline import merged_timeline, write_timeline


def trace(begun: int) -> dict[str, Any]:
    return {
        "baseTimeNanoseconds": begun,
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 7, "ts": 0, "args": {"name": "python"}},
            {"ph": "X", "name": "aten::mm", "pid": 7, "tid": 1, "ts": 10.0, "dur": 2.0},
            {"ph": "s", "name": "ac2g", "id": 3, "pid": 7, "tid": 1, "ts": 11.0},
        ],
    }


def test_ranks_stay_apart_on_one_axis_of_time() -> None:
    merged = merged_timeline({1: trace(5_000_000), 0: trace(2_000_000)})
    assert merged["baseTimeNanoseconds"] == 2_000_000
    name, product, arrow = merged["traceEvents"][3:]
    assert (name["pid"], name["args"]) == ("rank 1: 7", {"name": "rank 1: python"})
    assert (product["pid"], product["ts"]) == ("rank 1: 7", 3010.0), "it began 3 ms later"
    assert arrow["id"] == "1.3", "arrows of another rank have other numbers"
    assert merged["traceEvents"][1]["ts"] == 10.0


def test_files_are_merged_and_a_missing_one_is_named(tmp_path: Path) -> None:
    parts = {rank: tmp_path / f"part-{rank}" for rank in range(3)}
    for rank in (0, 2):
        parts[rank].write_bytes(gzip.compress(json.dumps(trace(0)).encode()))
    assert write_timeline(tmp_path / "all.json.gz", parts) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["all.json.gz"]
    merged = json.loads(gzip.decompress((tmp_path / "all.json.gz").read_bytes()))
    assert {event["pid"] for event in merged["traceEvents"]} == {"rank 0: 7", "rank 2: 7"}
