"""The secret of a job on several nodes: where it comes from, and which files are not taken."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from hecate.errors import UserError
from hecate.launch.job_secret import job_secret


def test_the_first_node_makes_the_file_and_all_read_the_same(tmp_path: Path) -> None:
    file, found = tmp_path / "token", []
    threads = [threading.Thread(target=lambda: found.append(job_secret(file))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found[0]) == 64
    assert file.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["token"], "nothing else is left"
    assert job_secret(tmp_path / "other" if (tmp_path / "other").touch(0o600) else file) == found[0]


def test_the_variable_takes_the_place_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HECATE_TOKEN", raising=False)
    with pytest.raises(UserError, match="--token-file: several nodes need a secret") as caught:
        job_secret(None)
    assert len(str(caught.value).splitlines()) <= 8
    monkeypatch.setenv("HECATE_TOKEN", "a" * 32)
    assert job_secret(None) == b"a" * 32
    monkeypatch.setenv("HECATE_TOKEN", "short")
    with pytest.raises(UserError, match="HECATE_TOKEN: a secret has 32 to"):
        job_secret(None)


def test_files_that_others_may_know_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    job_secret(file)
    file.chmod(0o640)
    with pytest.raises(UserError, match="other users can read the secret; mend it with: chmod 600"):
        job_secret(file)
    file.chmod(0o600)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(UserError, match="it belongs to another user"):
        job_secret(file)


@pytest.mark.parametrize("content", ["", "x" * 31, "x" * 2000, "x\x1b" * 32, "\u00fc" * 40])
def test_what_is_no_secret_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="a secret has 32 to"):
        job_secret(file)


@pytest.mark.parametrize("kind", ["pipe", "folder", "no folder"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "token"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file = tmp_path / "missing" / "token"
    with pytest.raises(UserError, match="--token-file"):
        job_secret(file)
