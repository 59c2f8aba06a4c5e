"""The texts that RecLoRA is compared on, and what `benchmarks.reclora` makes of its runs."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from benchmarks.reclora import auc, seconds_of_steps, summary, verdict
from tests.rooms import ROOT

FILMS = ("Heat", "Fargo", "Alien", "Brazil", "Tron")


@pytest.fixture(scope="module")
def movielens() -> Iterator[ModuleType]:
    """The example's program, which is in no package."""
    spec = importlib.util.spec_from_file_location("movielens", ROOT / "examples" / "reclora" / "movielens.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Forty ratings of five films by four users, not in the order of time."""
    columns = ("movieId", "title", "year", "genres", "userId", "rating", "timestamp")
    rows = [(n % 5 + 1, FILMS[n % 5], 1990 + n % 5, "Drama|War", n % 4 + 1, 1 + n * 7 % 5, 1000 + n) for n in range(40)]
    path = tmp_path / "ratings.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([columns, *(rows[n * 7 % 40] for n in range(40))])
    return path


def test_a_user_is_known_only_by_what_came_before(movielens: ModuleType, table: Path) -> None:
    ratings = movielens.read_ratings(table)
    assert ratings.time_N.tolist() == list(range(1000, 1040))
    for n in range(40):
        before = [m for m in range(n) if ratings.user_N[m] == ratings.user_N[n]]
        seen = np.flatnonzero(ratings.history_NH[n])
        assert ratings.history_NH[n][seen].tolist() == [ratings.film_N[m] for m in before]
        assert ratings.liked_NH[n][seen].tolist() == [1 + ratings.liked_N[m] for m in before]
    parts = [ratings.part(name).tolist() for name in ("train", "validation", "test")]
    assert parts == [list(range(32)), list(range(32, 36)), list(range(36, 40))]


def test_a_text_names_films_that_the_user_rated_and_asks_for_one(movielens: ModuleType, table: Path) -> None:
    """The last rating: number 39, of Tron by user 4, whose ratings were numbers 3, 7, 11 and so on."""
    ratings = movielens.read_ratings(table)
    text = movielens.text_of(ratings, torch.eye(len(ratings.titles)), 39)
    assert text["user"] == f"4@1039-{ratings.film_N[39]}"
    system, question, answer = (turn["content"] for turn in text["messages"])
    assert (system, answer) == ("Answer Yes or No.", "Yes" if 1 + 39 * 7 % 5 >= 4 else "No")
    assert question.endswith("Will this user like Tron (1994) (Drama, War)?")
    liked, disliked = question.partition(" Disliked: ")[::2]
    named = {title for title in ratings.titles if title in liked}
    assert named == {f"{FILMS[n % 5]} ({1990 + n % 5})" for n in range(3, 39, 4) if 1 + n * 7 % 5 >= 4}
    assert all(title in disliked for title in (f"{FILMS[n % 5]} ({1990 + n % 5})" for n in range(3, 39, 4) if 1 + n * 7 % 5 < 4))


def test_both_aucs_are_the_share_of_pairs_in_order(movielens: ModuleType) -> None:
    random = np.random.default_rng(0)
    score_N, positive_N = random.integers(0, 6, 50).astype(float), random.random(50) < 0.4
    pairs = [(p, n) for p in score_N[positive_N] for n in score_N[~positive_N]]
    expected = sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs)
    assert movielens.auc(score_N, positive_N) == pytest.approx(expected)
    assert auc(torch.tensor(score_N), torch.tensor(positive_N).double()) == pytest.approx(expected)


@pytest.mark.parametrize("system", ["reclora", "reclora_factors"])
@pytest.mark.parametrize(
    ("lora", "said"),
    [((0.79, 0.79), "met (2 of 3 seeds)"), ((0.79, 0.801), "missed (2 of 3 seeds)"), ((0.797, 0.797), "missed (2 of 3 seeds)")],
)
def test_reclora_must_be_better_with_each_seed_and_by_enough_on_average(system: str, lora: tuple[float, float], said: str) -> None:
    rows = [{"system": system, "seed": seed, "auc": 0.8} for seed in (1, 2)]
    assert verdict(system, summary(rows, {"test_texts_auc": 0.9})).endswith("open, no seed has both")
    rows += [{"system": "lora", "seed": seed, "auc": one} for seed, one in zip((1, 2), lora, strict=True)]
    found = summary(rows, {"test_texts_auc": 0.9})
    assert verdict(system, found).endswith(said)
    other = "reclora" if system == "reclora_factors" else "reclora_factors"
    assert verdict(other, found).endswith("open, no seed has both")


def test_the_seconds_of_a_run_that_went_on_are_those_of_all_its_steps(tmp_path: Path) -> None:
    steps = [(1, 2.0), (2, 9.0), (2, 3.0)]
    lines = [{"kind": "step", "step": step, "step_seconds": seconds} for step, seconds in steps] + [{"kind": "event", "step": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert seconds_of_steps(tmp_path) == 5.0
