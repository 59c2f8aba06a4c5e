"""Test how `benchmarks.following` reads a job's files, without running a job."""

from __future__ import annotations

from pathlib import Path

from benchmarks.following import Tail


def test_each_whole_line_comes_once(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    tail = Tail(path)
    assert list(tail.read()) == [], "it is not there yet"
    path.write_text("a\nb\nc", encoding="utf-8")
    assert list(tail.read()) == ["a", "b"]
    with open(path, "a", encoding="utf-8") as file:
        file.write("c\nd\ne\n")
    assert next(tail.read()) == "cc"
    assert next(tail.read()) == "d", "what was not taken comes the next time"
    tail.skip()
    assert list(tail.read()) == []


def test_of_a_file_put_in_its_place_only_what_is_new_comes(tmp_path: Path) -> None:
    """A run that goes back to a checkpoint cuts its records there, and writes the later ones anew."""
    path, other = tmp_path / "lines", tmp_path / "other"
    tail = Tail(path)
    path.write_text("1\n2\n3\n", encoding="utf-8")
    assert list(tail.read()) == ["1", "2", "3"]
    other.write_text("1\n2\n", encoding="utf-8")
    other.replace(path)
    assert list(tail.read()) == []
    with open(path, "a", encoding="utf-8") as file:
        file.write("3 again\n4\n")
    assert list(tail.read()) == ["3 again", "4"]
    other.write_text("1\n2\n3 again\n5\n", encoding="utf-8")
    other.replace(path)
    assert list(tail.read()) == ["5"], "written before anyone looked"


def test_a_file_that_is_cut_in_its_place_and_has_grown_beyond_its_length_since(tmp_path: Path) -> None:
    """As metrics.jsonl is by a run that goes back; between two looks it may have written more than it has cut."""
    path = tmp_path / "m"
    path.write_text("1\n2\n3\n", encoding="utf-8")
    tail = Tail(path)
    assert list(tail.read()) == ["1", "2", "3"]
    path.write_text("1\n2'\n3'\n4'\n", encoding="utf-8")
    assert list(tail.read()) == ["2'", "3'", "4'"]
