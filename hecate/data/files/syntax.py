"""Check data files before any rank is started, so that a broken line is reported within seconds, not after the model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hecate.config import DataSource
from hecate.config.files.paths import indexed_prefix
from hecate.data.content import check_mark
from hecate.data.files.formats import Fault, Sample, samples_of
from hecate.data.files.indexed_files import open_indexed
from hecate.data.files.user_features import UserFeatures
from hecate.errors import UserError


def check_answers(files: Iterable[DataSource]) -> None:
    """Check that the first record of each file is a conversation, whose answer a model can be asked for.

    Raises:
        UserError: it is a document.
    """
    for file in files:
        indexed = indexed_prefix(file.path) is not None
        first = None if indexed else next(samples_of(file), None)
        if indexed or (isinstance(first, Sample) and first.messages is None):
            raise no_answers(str(file.path))


def no_answers(path: str) -> UserError:
    """What is wrong with held-out documents and token ids where answers are to be generated."""
    return UserError(f"{path} holds documents, which have no answers to generate\n  use conversations, or set eval.generate=false")


def check_syntax(
    files: Iterable[DataSource], on_bad_sample: str, users: UserFeatures | None = None, cache: Path | None = None, *, routed: bool = False
) -> None:
    """Check every record of every file as far as that needs no tokenizer. If bad samples are to be skipped, check only that a file opens.

    Args:
        users: features that each sample's user must have; None: samples need no users.
        cache: the folder of tokenized data, which also says what has been checked before and found good; None: all are checked.
        routed: each sample must bring its routing.

    Raises:
        UserError: a file cannot be read, is empty or of no known format, or has a broken record.
    """
    for file in files:
        if prefix := indexed_prefix(file.path):
            open_indexed(prefix)
            continue
        mark = None if cache is None or on_bad_sample == "skip" else check_mark(file, users, cache, routed=routed)
        if mark is not None and mark.exists():
            continue
        _check(file, on_bad_sample, users, routed=routed)
        if mark is not None:
            with suppress(OSError):  # they are only checked again
                mark.touch()


def _check(file: DataSource, on_bad_sample: str, users: UserFeatures | None, *, routed: bool) -> None:
    for item in samples_of(file, users, routed=routed):
        if on_bad_sample == "skip":
            break
        if isinstance(item, Fault):
            raise bad_sample_error(item)


def bad_sample_error(fault: Fault) -> UserError:
    """Return the error that stops a run at a bad sample, with what the user can do about it."""
    return UserError(
        f"{fault.place}: {fault.reason}\n"
        "correct the sample, or set data.on_bad_sample: skip leaves all bad samples out, skip_long those that are too long, and truncate "
        "shortens those"
    )
