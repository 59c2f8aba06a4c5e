"""Hostile and changed files of every kind are read or refused; and what a reader would do wrong is noticed."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hecate.apps.check.drill.outcome import DrillCase
from hecate.errors import UserError
from tests.attacks.fuzz import data_files, file_kinds, hostile, model_files, run_files
from tests.attacks.fuzz.cases import KINDS, fuzz_cases
from tests.attacks.fuzz.file_kinds import FileKind
from tests.attacks.fuzz.guard import TooLong, watched
from tests.attacks.fuzz.mutants import RawText, changed_bytes, changed_value, json_text
from tests.rooms import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: /proc and fork")
VALUE = {"a": [1, 2.5, "b", None, {"c": True}], "d": {"e": "f"}}


def test_changes_are_those_of_their_seed_and_leave_the_value_as_it_was() -> None:
    before = json.dumps(VALUE)
    first, again = ([changed_value(VALUE, random.Random(seed)) for seed in range(300)] for _ in range(2))
    assert [json_text(value) for _, value in first] == [json_text(value) for _, value in again]
    assert json.dumps(VALUE) == before
    texts = {json_text(value) for _, value in first}
    assert len(texts) > 150
    assert any("NaN" in text for text in texts)
    assert any(text.count('"a":') == 2 for text in texts), "no name is given twice"
    assert any(len(text) > 100_000 for text in texts), "nothing is huge"
    data = [changed_bytes(b"abcdefgh" * 9, random.Random(seed))[1] for seed in range(100)]
    assert data == [changed_bytes(b"abcdefgh" * 9, random.Random(seed))[1] for seed in range(100)]
    assert len(set(data)) > 60


def test_text_of_values_that_json_does_not_have() -> None:
    assert json_text({"a": [RawText("1e999"), float("inf"), None]}) == '{"a": [1e999, Infinity, null]}'


def _refuses(folder: Path) -> None:
    raise UserError(f"{folder / 'a'}: no")


def _opens_outside(folder: Path) -> None:
    os.close(os.open("/dev/null", os.O_RDONLY))


def _takes_memory(folder: Path) -> None:
    assert len(bytearray(300 << 20))


def _starts(folder: Path) -> None:
    subprocess.run(["true"], check=True)


def _names_nothing(folder: Path) -> None:
    raise UserError("no")


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (_refuses, "refused"),
        (lambda folder: {}["a"], "KeyError"),
        (_names_nothing, "does not name the file"),
        (_opens_outside, "/dev/null was opened"),
        (_takes_memory, "MiB, more than 96"),
        (_starts, "did subprocess.Popen"),
    ],
)
def test_what_a_reader_does_wrong_is_noticed(tmp_path: Path, read: Callable[[Path], object], words: str) -> None:
    kind = FileKind(name="a", file="a", write=lambda folder: (folder / "a").write_bytes(b"abc"), read=read, closed=True)
    (case,) = fuzz_cases(tmp_path / "fuzz", 3, (kind,))  # the sound example is not read, so that nothing is changed
    assert words in case.problem


def test_an_endless_loop_ends() -> None:
    def run() -> None:
        with watched(0.1):
            while True:
                pass

    with pytest.raises(TooLong, match=r"0\.1 s"):
        run()


def test_a_changed_file_that_is_read_wrongly_is_a_case_of_its_own(tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        path = folder / "a.json"
        try:
            value = json.loads(path.read_bytes()) if path.is_file() and path.stat().st_size < 2**20 and not path.is_symlink() else None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: no JSON") from error
        if value is not None:
            value["d"]["e"].upper()

    kind = FileKind(name="a", file="a.json", write=lambda folder: (folder / "a.json").write_text(json.dumps(VALUE)), read=read, form="json")
    cases = fuzz_cases(tmp_path / "fuzz", 60, (kind,))
    assert len(cases) == 1 + 9 + 60
    assert cases[0] == DrillCase("a: as it was written")
    wrong = {case.problem.split()[0] for case in cases if case.problem}
    assert wrong <= {"KeyError", "TypeError", "AttributeError"}
    assert wrong


def test_kinds_have_names_of_their_own_and_each_list_counts() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names) >= 60
    assert all(isinstance(kind, file_kinds.FileKind) for module in (model_files, data_files, run_files) for kind in module.KINDS)
    assert len({one.name for one in hostile.HOSTILE}) == len(hostile.HOSTILE)


@pytest.mark.parametrize(
    ("mutants", "given"), [pytest.param(2, ["quick"], id="two of each"), pytest.param(150, [], id="150 of each", marks=pytest.mark.slow)]
)
@pytest.mark.timeout(1800)
def test_hostile_and_changed_files_are_read_or_refused(mutants: int, given: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # of a short name, since the length of refusals is judged
        command = [sys.executable, "-m", "tests.attacks.fuzz.run", folder, str(mutants), *given]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = re.fullmatch(r"(\d+) hostile files, (\d+) changed ones, \d+ MiB at most", done.stdout.splitlines()[-1])
    assert numbers, done.stdout
    assert int(numbers[1]) >= 60
    assert int(numbers[2]) >= len(KINDS) * mutants
