"""One timeline of all ranks, out of the Chrome traces that torch's profiler has written of each.

The format is the Trace Event Format, which ui.perfetto.dev and chrome://tracing show.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hecate.io.durable import replace_file
from hecate.io.plain_files import read_plain

Trace = Mapping[str, Any]
_MOST_BYTES = 1 << 30
"""of one rank's trace, unpacked"""


def merged_timeline(traces: Mapping[int, Trace]) -> dict[str, Any]:
    """Return one trace with the events of all ranks, each rank's processes under its name, on one axis of time.

    Times of a trace count from its own beginning, which it tells in nanoseconds of the host's clock; hosts whose clocks differ are shown
    shifted by that.

    Args:
        traces: rank -> what torch's profiler has exported.
    """
    begun = {rank: int(trace.get("baseTimeNanoseconds", 0)) for rank, trace in traces.items()}
    first = min(begun.values(), default=0)
    events: list[dict[str, Any]] = []
    for rank, trace in sorted(traces.items()):
        events += _events_of(rank, trace["traceEvents"], (begun[rank] - first) / 1000)
    return {"traceEvents": events, "displayTimeUnit": "ms", "baseTimeNanoseconds": first}


def _events_of(rank: int, events: Iterable[Mapping[str, Any]], later: float) -> Iterable[dict[str, Any]]:
    """The events of one rank.

    Args:
        later: microseconds to be added to their times.
    """
    for event in events:
        own = dict(event)
        if "pid" in own:
            own["pid"] = f"rank {rank}: {own['pid']}"
        if "id" in own:  # of arrows from the host's calls to the device's work, which are numbered in each trace anew
            own["id"] = f"{rank}.{own['id']}"
        if "ts" in own and own.get("ph") != "M":
            own["ts"] = own["ts"] + later
        if own.get("ph") == "M" and own.get("name") == "process_name":
            own["args"] = {"name": f"rank {rank}: {own.get('args', {}).get('name', '')}"}
        if own.get("ph") == "M" and own.get("name") == "process_sort_index":
            own["args"] = {"sort_index": rank}
        yield own


def _read(part: Path) -> Trace:
    """Raises OSError, EOFError, zlib.error or ValueError: it cannot be read, or has more than `_MOST_BYTES` when it is unpacked."""
    unpacking = zlib.decompressobj(wbits=31)
    data = unpacking.decompress(read_plain(part, _MOST_BYTES), _MOST_BYTES)
    if not unpacking.eof:
        raise ValueError("cut off, or too large")
    value: Trace = json.loads(data)
    if not 0 <= int(value.get("baseTimeNanoseconds", 0)) < 1 << 63:
        raise ValueError("it begins at no time")
    return value


def write_timeline(path: Path, parts: Mapping[int, Path]) -> list[int]:
    """Merge the ranks' traces into `path`, compressed, and delete them; returns the ranks whose trace is not there, or damaged.

    Args:
        parts: rank -> its trace. On a node that shares no disk with this one it is not found.
    """
    found: dict[int, Trace] = {}
    for rank, part in parts.items():
        # A trace that a killed rank has left is cut: it is none, and the others are shown without it.
        with suppress(OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            trace = _read(part)
            merged_timeline({rank: trace})
            found[rank] = trace
    replace_file(path, [gzip.compress(json.dumps(merged_timeline(found)).encode())], durable=False)
    for part in parts.values():
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return sorted(set(parts) - set(found))
