"""Nodes of a file become values of the types that the schema gives, and each problem is reported where its value stands."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from hecate.config.typed import INVALID, Report, describe, read_sources, read_value, unique_pairs
from hecate.config.yaml_text import Mapping, Node, parse


def node_of(text: str) -> Node:
    node = parse(text)
    assert node is not None
    return node


def read(text: str, hint: Any, key: str = "seed") -> tuple[Any, list[tuple[str, str, int | None]]]:
    """The value, and the problems as (key, what, line)."""
    report = Report("run.yaml")
    value = read_value(node_of(text), hint, key, "run.yaml", report)
    return value, [(problem.key, problem.what, problem.line) for problem in report.problems]


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3),
        ("3", float, 3.0),
        ("no", bool, False),
        ("'no'", str, "no"),
        ("~", int | None, None),
        ("[1, 2]", int | tuple[int, ...] | None, (1, 2)),
        ("exact", Literal["history", "exact"], "exact"),
        ("${seed}", int, "${seed}"),
    ],
)
def test_a_value_takes_the_type_of_its_key(text: str, hint: Any, value: Any) -> None:
    found, problems = read(text, hint)
    assert problems == []
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("text", "hint", "problem"),
    [
        ("x", int | None, ("seed", "must be an integer or null, got x", 1)),
        ("\n\n- 1\n-\n  x", tuple[int, ...], ("seed[1]", "must be an integer, got x", 5)),
        ("exakt", Literal["history", "exact"], ("seed", "must be one of history, exact, got exakt", 1)),
        ("{a: 1}", str, ("seed", "must be text, got a mapping", 1)),
        ("${nowhere}", int, ("seed", "${nowhere} refers to no key", 1)),
        ("${data.train}", str, ("seed", "${data.train} refers to a list", 1)),
    ],
)
def test_a_value_of_another_type_is_no_value_and_one_problem(text: str, hint: Any, problem: tuple[str, str, int]) -> None:
    value, problems = read(text, hint)
    assert value is INVALID
    assert problems == [problem]


def test_sources_are_records_however_they_are_written() -> None:
    report = Report("run.yaml")
    texts = ("a.jsonl", "[a.jsonl]", "{path: a.jsonl}")
    assert [read_sources(node_of(text), "data.train", "run.yaml", report) for text in texts] == [({"path": "a.jsonl"},)] * 3
    assert read_sources(node_of("[a.jsonl, {path: b.jsonl, weight: 2}]"), "data.train", "run.yaml", report)[1] == {
        "path": "b.jsonl",
        "weight": 2.0,
    }
    assert report.problems == []


def test_a_problem_is_placed_at_the_nearest_value_that_encloses_it() -> None:
    report = Report("run.yaml", places={"data": ("run.yaml", 2), "data.train": ("run.yaml", 3), "data.train[1]": ("command line", None)})
    for key in ("data.seq_len", "data.train[0].path", "data.train[1].path", "model.dtype"):
        report.add(key, "is wrong")
    assert [(problem.source, problem.line) for problem in report.problems] == [
        ("run.yaml", 2),
        ("run.yaml", 3),
        ("command line", None),
        ("run.yaml", None),
    ]


def test_of_two_equal_keys_the_first_counts_and_the_second_is_reported() -> None:
    report, node = Report("run.yaml"), node_of("r: 1\nalpha: 2\nr: 3\n")
    assert isinstance(node, Mapping)
    assert [(name, value.line) for name, value in unique_pairs(node, "lora", "run.yaml", report)] == [("r", 1), ("alpha", 2)]
    assert [str(problem) for problem in report.problems] == [
        "run.yaml:3: lora.r: given twice, first in line 1\n    hint: keep one of the two"
    ]


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "an integer"),
        (float | None, "a number or null"),
        (tuple[str, ...], "a list"),
        (Literal["a"], "a (the only value)"),
        (Literal["a", "b"], "one of a, b"),
    ],
)
def test_types_in_words(hint: Any, words: str) -> None:
    assert describe(hint) == words
