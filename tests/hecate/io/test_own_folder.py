"""Folders that this user alone can write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hecate.io.own_folder import ours_alone


def test_a_folder_is_trusted_only_where_nobody_else_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"
    for mode, trusted in ((0o700, True), (0o755, True), (0o775, False), (0o777, False), (0o1777, False)):
        folder.mkdir(exist_ok=True)
        folder.chmod(mode)
        assert ours_alone(folder) is trusted
    folder.chmod(0o700)
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    assert not ours_alone(folder)
