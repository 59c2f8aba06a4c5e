"""Plain values are read as PyYAML reads them; all else is one error."""

from __future__ import annotations

import pytest

from hecate.io.strict_yaml import YamlError, parse_yaml


def test_plain_values_and_aliases_are_read() -> None:
    assert parse_yaml("a: [1, 2.5, x, null, true]\nb: &b {c: 1}\nd: [*b, *b]\n") == {
        "a": [1, 2.5, "x", None, True],
        "b": {"c": 1},
        "d": [{"c": 1}, {"c": 1}],
    }
    assert parse_yaml("") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: 2001-99-99", "month"),
        ("a: " + "9" * 5000, "a number of 5000 characters"),
        ("a: 1" + ":59" * 40_000, "line 1: a number of 120001 characters"),
        ("a: 1" + ":59" * 40_000 + ".5", "line 1: a number of 120003 characters"),
        ("a: !!int x", "invalid literal"),
        ("a: " + "[" * 100_000, "32 levels"),
        ("a: &a [*a]", "within what it repeats"),
        ("\n".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9) if n else 'a'}]" for n in range(9)), "200000 values"),
        ("a: [", "expected"),
        ("a: 1\n---\nb: 2", "single document"),
        ("? [a]\n: b", "unhashable"),
        ("a: \0", "special characters"),
        ("a: 1\nb: {c: 2,\n    c: 3}", "line 3: c is given twice"),
    ],
)
def test_all_else_is_refused(text: str, words: str) -> None:
    with pytest.raises(YamlError, match=words):
        parse_yaml(text)
