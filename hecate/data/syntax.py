"""Read data files before any process is started: a broken line is then found in a second, not after the model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hecate.config import DataSource
from hecate.config.paths import indexed_prefix
from hecate.data.formats import Fault, read_samples
from hecate.data.indexed_files import open_indexed
from hecate.errors import UserError


def check_syntax(files: Iterable[DataSource], on_bad_sample: str) -> None:
    """Refuse what no tokenizer is needed to see. Where bad samples are to be skipped, a file is only begun.

    Raises:
        UserError: a file cannot be read, is empty or of no known format, or has a broken line.
    """
    for file in files:
        if prefix := indexed_prefix(file.path):
            open_indexed(prefix)
            continue
        for item in read_samples(file.path, file.format):
            if on_bad_sample == "skip":
                break
            if isinstance(item, Fault):
                raise bad_sample_error(item.file, item.line, item.reason)


def bad_sample_error(path: str | Path, line: int, reason: str) -> UserError:
    return UserError(
        f"{path}:{line}: {reason}\nmend it, or set data.on_bad_sample: skip leaves bad samples out, truncate cuts too long ones"
    )
