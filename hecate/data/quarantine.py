"""Write the samples that were skipped to a file of their own, so that the user can correct them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from hecate.data.files.formats import Fault
from hecate.errors import UserError
from hecate.io.durable import replace_file


def write_quarantine(path: str | Path, faults: Iterable[Fault]) -> None:
    """Write one JSON object {"file", "line", "reason", "raw"} per fault to the JSONL file `path`, replacing it.

    Bytes that are not UTF-8 are written in `raw` as \\xNN. Raises UserError if `path` cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(path), map(quarantined, faults), mode=0o600)  # it holds what the data hold
    except OSError as error:
        raise UserError(f"quarantine file {path} cannot be written: {error.strerror}") from error


def quarantined(fault: Fault) -> bytes:
    """The line of a fault in a quarantine file."""
    text = fault.raw.decode("utf-8", "backslashreplace").rstrip("\r\n")
    return json.dumps({"file": fault.file, "line": fault.line, "reason": fault.reason, "raw": text}).encode() + b"\n"


def faults_of(lines: Iterable[bytes]) -> Iterator[Fault]:
    """The faults of which `lines` are the lines of a quarantine file."""
    for line in lines:
        value = json.loads(line)
        yield Fault(value["file"], value["line"], value["reason"], raw=value["raw"].encode())
