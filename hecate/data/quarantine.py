"""Write the samples that were skipped to a file of their own, so that the user can correct them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from hecate.data.formats import Fault
from hecate.errors import UserError
from hecate.io.durable import replace_file


def write_quarantine(path: str | Path, faults: Sequence[Fault], lines: Iterable[bytes]) -> None:
    """Write one JSON object {"file", "line", "reason", "raw"} per fault to the JSONL file `path`, replacing it.

    All faults are of one file, whose lines are `lines`. Bytes that are not UTF-8 are written in `raw` as \\xNN.
    Raises UserError if `path` cannot be written.
    """
    wanted = {fault.line: fault for fault in faults}
    assert len({fault.file for fault in faults}) == 1, faults
    records = (_record(wanted[number], raw) for number, raw in enumerate(lines, start=1) if number in wanted)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(path), records)
    except OSError as error:
        raise UserError(f"quarantine file {path} cannot be written: {error.strerror}") from error


def _record(fault: Fault, raw: bytes) -> bytes:
    """The line of a fault in the quarantine file."""
    text = raw.decode("utf-8", "backslashreplace").rstrip("\r\n")
    return json.dumps({"file": fault.file, "line": fault.line, "reason": fault.reason, "raw": text}).encode() + b"\n"
