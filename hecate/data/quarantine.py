"""Write the samples that were skipped to a file of their own, so that the user can correct them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from hecate.data.formats import Fault
from hecate.errors import UserError


def write_quarantine(path: str | Path, faults: Sequence[Fault], lines: Iterable[bytes]) -> None:
    """Write one JSON object {"file", "line", "reason", "raw"} per fault to the JSONL file `path`, replacing it.

    All faults are of one file, whose lines are `lines`. Bytes that are not UTF-8 are written in `raw` as \\xNN.
    Raises UserError if `path` cannot be written.
    """
    wanted = {fault.line: fault for fault in faults}
    assert len({fault.file for fault in faults}) == 1, faults
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as out:
            for number, raw in enumerate(lines, start=1):
                if number in wanted:
                    fault = wanted[number]
                    text = raw.decode("utf-8", "backslashreplace").rstrip("\r\n")
                    record = {"file": fault.file, "line": fault.line, "reason": fault.reason, "raw": text}
                    out.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(f"quarantine file {path} cannot be written: {error.strerror}") from error
