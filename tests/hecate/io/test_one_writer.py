"""Two runs never write to one folder at the same time."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from hecate.errors import UserError
from hecate.io.one_writer import one_writer

HOLDS = """
import sys
from hecate.io.one_writer import one_writer
with one_writer(sys.argv[1]):
    print("has it", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_writer_until_its_process_ends_in_whatever_way(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        with pytest.raises(UserError, match="another run is writing to it"), one_writer(str(folder)):
            pass
        (folder / "metrics.jsonl").touch()
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with one_writer(str(folder)):
        pass
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"], "no lock is left in it"


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), one_writer(str(tmp_path / "a" / "b")):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir: .*file/run: Not a directory"), one_writer(str(tmp_path / "file" / "run")):
        pass


def test_where_a_folder_cannot_be_locked_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hecate.io.one_writer.fcntl.flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with one_writer(str(tmp_path)):
        pass
    assert "cannot be locked (No locks available), so nothing keeps another run out" in capsys.readouterr().err
