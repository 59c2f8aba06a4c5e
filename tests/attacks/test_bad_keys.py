"""Every key of the schema misspelt, of another type, or outside its range: it is refused in time, and all keys are named at once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest

from hecate.config import ConfigError, load, load_config
from hecate.config.schema import LEAVES, RANGES
from testing.tiny_run import make_workshop

DECIDING = ("hub",)
"""keys that decide how others are read"""


def bad_values() -> Iterator[tuple[str, str]]:
    """(key, value) of many bad overrides."""
    for key, leaf in LEAVES.items():
        kinds = kinds_of(leaf.type)
        yield key[:-1] + ("x" if key[-1] != "x" else "y"), "1"
        yield key, "{a: {b: 1}}"
        if kinds <= {int, float, bool, type(None)}:
            yield key, "many"
        if kinds <= {int, float, type(None)}:
            yield key, ".nan"
            yield key, "true"
            yield key, "012"
            allowed = RANGES.get(key)
            if allowed is not None:
                yield key, f"{math.floor(allowed.low) - 1}"
                if allowed.high < math.inf:
                    yield key, f"{math.ceil(allowed.high) + 1}"
        if any(get_origin(kind) is Literal for kind in kinds) and str not in kinds:
            yield key, "nothing_of_the_kind"


def kinds_of(annotation: Any) -> set[Any]:
    """The arms of a union, or the annotation alone."""
    return set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else {annotation}


MADE = list(bad_values())
ONE_EACH = {key: value for key, value in MADE if key in LEAVES and key not in DECIDING}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def mistakes_of(workshop: Path, given: dict[str, str]) -> list[str]:
    """The keys that the refusal names."""
    values = {"output_dir": "runs/first"} | given
    with pytest.raises(ConfigError) as refusal:
        load_config(workshop / "config.yaml", [f"{key}={value}" for key, value in values.items()], claim_output=False)
    return [problem.key for problem in refusal.value.problems]


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_each_mistake_is_refused_by_its_key(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(MADE) >= 600
    seconds = []
    for key, value in MADE[::every]:
        started = time.perf_counter()
        named = mistakes_of(workshop, {key: value})
        seconds.append(time.perf_counter() - started)
        assert any(key.startswith(one) or one.startswith(key) for one in named), (key, value, named)
    assert (median if every > 1 else max)(seconds) < 1.0


@pytest.mark.parametrize("section", [*sorted({key.partition(".")[0] for key in ONE_EACH if "." in key}), ""])
def test_all_mistakes_of_a_section_are_named_at_once(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str) -> None:
    """ "": of all sections."""
    monkeypatch.chdir(tmp_path)
    given = {key: value for key, value in ONE_EACH.items() if not section or key.partition(".")[0] == section}
    named = mistakes_of(workshop, given)
    assert not [key for key in given if not any(one == key or one.startswith((f"{key}.", f"{key}[")) for one in named)]


def test_of_only_the_first_mistake_these_tests_would_fail(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "ConfigError", lambda problems: ConfigError(problems[:1]))
    with pytest.raises(AssertionError):
        test_all_mistakes_of_a_section_are_named_at_once(workshop, tmp_path, monkeypatch, "moe")
