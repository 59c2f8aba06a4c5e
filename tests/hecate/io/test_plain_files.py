"""What is no plain file, or too large, is refused with a reason, and nothing is waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hecate.io.plain_files import open_plain, read_plain, read_plain_text, require_plain


def test_a_plain_file_and_a_link_to_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("ä".encode())
    (tmp_path / "b").symlink_to("a")
    assert read_plain(tmp_path / "b", 2) == "ä".encode()
    assert read_plain_text(tmp_path / "b", 2) == "ä"
    with open_plain(tmp_path / "a") as file:
        assert file.read(1) == b"\xc3"


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, words in {"pipe": "pipe", "device": "device", "loop": "symbolic links", "a\0b": "of such a name", ".": "directory"}.items():
        with pytest.raises(OSError, match=words):
            read_plain(tmp_path / name)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    os.truncate(tmp_path / "a", 1 << 40)
    for check in (
        lambda: read_plain(tmp_path / "a"),
        lambda: require_plain(tmp_path / "a"),
        lambda: require_plain(tmp_path / "a", 1 << 39),
    ):
        with pytest.raises(OSError, match="it has 1099511627776 bytes"):
            check()
    require_plain(tmp_path / "a", 1 << 40)
    assert read_plain("/proc/self/cmdline", 1 << 60)  # whose size is said to be 0; no memory is taken for what may be there
    with pytest.raises(OSError, match="at most 3"):
        read_plain("/proc/self/cmdline", 3)
