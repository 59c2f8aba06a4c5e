"""Durable files are new files, whole or not there; folders are deleted with what a save left in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from hecate.io.durable import (
    delete_files,
    make_folder,
    new_folder,
    put_in_place,
    replace_file,
    replace_output,
    successor_of,
    sync_folder,
    write_durable,
)


def test_blocks_become_one_new_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert write_durable(path, [b"ab", memoryview(b"cde")]) == 5
    sync_folder(tmp_path)
    assert path.read_bytes() == b"abcde"
    with pytest.raises(FileExistsError):
        write_durable(path, [b"x"])
    assert path.read_bytes() == b"abcde"


def test_a_folder_is_deleted_with_its_files_but_never_with_a_subfolder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(b"x")
    delete_files(folder)
    delete_files(folder)
    assert not folder.exists()
    (folder / "inner").mkdir(parents=True)
    with pytest.raises(OSError):
        delete_files(folder)
    assert (folder / "inner").exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for durable in (True, False):
        replace_file(path, [b"ab", b"c"], durable=durable)
        assert path.read_bytes() == b"abc"

        def broken() -> Iterator[bytes]:
            yield b"x"
            raise OSError("the disk refuses")

        with pytest.raises(OSError, match="refuses"):
            replace_file(path, broken(), durable=durable)
        assert path.read_bytes() == b"abc"
        assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_an_output_is_written_where_its_name_leads(tmp_path: Path) -> None:
    (tmp_path / "here").symlink_to(tmp_path / "there")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("file", "here", "pipe"):
        replace_output(tmp_path / name, [b"ab", b"c"])
    assert (os.read(reader, 9), (tmp_path / "there").read_bytes(), (tmp_path / "file").read_bytes()) == (b"abc",) * 3
    os.close(reader)
    assert (tmp_path / "here").is_symlink()
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(IsADirectoryError):
        replace_output(tmp_path, [b"x"])


def test_a_folder_is_there_whole_or_not_at_all_also_after_an_interrupt(tmp_path: Path) -> None:
    def begun_and(error: BaseException) -> None:
        with new_folder(tmp_path / "folder") as staging:
            (staging / "file").write_text("a")
            raise error

    for error in (OSError("the disk refuses"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            begun_and(error)
        assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "folder") as staging:
        (staging / "file").write_text("a")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchanged", "renamed"])
def test_a_folder_that_is_replaced_is_there_until_the_other_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    if not exchanges:  # as on a file system that cannot exchange names
        monkeypatch.setattr("hecate.io.durable.ctypes.CDLL", lambda *_, **__: object())
    folder = tmp_path / "adapter"
    for content in ("first", "second", "third"):
        (tmp_path / "adapter.tmp-left").mkdir()
        new = successor_of(folder)
        assert not (tmp_path / "adapter.tmp-left").exists(), "by a process that was killed"
        with new_folder(new) as staging:
            (staging / "file").write_text(content)
        put_in_place(new, folder)
        assert (folder / "file").read_text() == content
        assert os.listdir(tmp_path) == ["adapter"]


def test_a_kill_after_the_exchange_leaves_the_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter"
    (folder / "old").mkdir(parents=True)
    new = successor_of(folder)
    new.mkdir()
    monkeypatch.setattr("hecate.io.durable.shutil.rmtree", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        put_in_place(new, folder)
    assert os.listdir(folder) == []
    monkeypatch.undo()
    successor_of(folder)
    assert os.listdir(tmp_path) == ["adapter"], "the next process removes the old one"


def test_a_new_folder_and_those_above_it_keep_their_names_after_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("hecate.io.durable.sync_folder", synced.append)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert sorted(set(synced)) == [tmp_path, tmp_path / "a"]
    monkeypatch.chdir(tmp_path)
    make_folder(Path("runs/x"))
    assert {str(one.absolute()) for one in synced} >= {str(tmp_path), str(tmp_path / "runs")}
