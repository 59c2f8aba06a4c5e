"""Keys that choose the model that is kept need evaluations, and a number that those have."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecate.config import ConfigError
from hecate.config.rules.best_model import check_best_model
from tests.hecate.config.making import MINIMAL, load

EVALUATED = ("data.eval=b.jsonl", "eval_steps=5")


def problem(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(MINIMAL, *overrides)
    assert len(error.value.problems) == 1
    return str(error.value)


@pytest.mark.parametrize("ask", ["metric_for_best_model=loss", "load_best_model_at_end=true", "early_stopping_patience=3"])
def test_each_needs_evaluations_in_the_midst_of_the_run(folder: Path, ask: str) -> None:
    assert load(MINIMAL, ask, *EVALUATED).best_metric == "loss"
    assert load(MINIMAL, ask, "data.eval_share=0.1", "eval_steps=5").best_metric == "loss"
    key = ask.partition("=")[0]
    assert f"{key}: needs evaluations, but data.eval is empty" in problem(ask)
    assert f"{key}: needs evaluations before the end of the run" in problem(ask, EVALUATED[0])


def test_without_any_no_model_is_the_best(folder: Path) -> None:
    assert load(MINIMAL, *EVALUATED).best_metric is None
    assert "early_stopping_threshold: is read with early_stopping_patience only" in problem("early_stopping_threshold=0.1", *EVALUATED)


def test_transformers_name_of_the_loss_is_that_of_the_mean_of_all_sources(folder: Path) -> None:
    config = load(MINIMAL, "data.eval=[a.jsonl,b.jsonl]", "eval_steps=5", "metric_for_best_model=eval_loss")
    assert config.best_metric == "loss"


@pytest.mark.parametrize("metric", ["loss", "exact", "a.loss", "a.exact", "b.loss", "b.exact"])
def test_every_number_of_an_evaluation_is_known(folder: Path, metric: str) -> None:
    given = ("data.eval_share=0.1", "eval.generate=true", f"metric_for_best_model={metric}")
    assert load(MINIMAL, *EVALUATED, *given).best_metric == metric


@pytest.mark.parametrize(
    ("metric", "more", "there_are"),
    [
        ("a.loss", (), "there are loss, b.loss; exact shares come with eval.generate=true"),
        ("exact", (), "there are loss, b.loss; exact shares come with eval.generate=true"),
        ("eval_exact", ("eval.generate=true",), "there are loss, exact, b.loss, b.exact"),
        ("c.loss", ("data.eval_share=0.5",), "there are loss, b.loss, a.loss; exact"),
    ],
)
def test_others_are_refused_with_those_that_there_are(folder: Path, metric: str, more: tuple[str, ...], there_are: str) -> None:
    found = problem(*EVALUATED, *more, f"metric_for_best_model={metric}")
    assert f"metric_for_best_model: no evaluation has the number {metric}" in found
    assert there_are in found


def test_an_item_of_data_eval_with_the_name_of_one_of_data_train_takes_the_place_of_its_share(folder: Path) -> None:
    text = MINIMAL.replace("a.jsonl", "[a.jsonl, b.jsonl]")
    data = load(text, "data.eval=[{path: b.jsonl, name: a}]", "data.eval_share=0.25").data
    assert [source.name for source in data.held_out] == ["b"]
    assert [(source.name, source.path) for source in data.evaluated] == [("a", "b.jsonl"), ("b", "b.jsonl")]
    assert not load(text, "data.eval_share=0").data.held_out
    assert not load(text).data.held_out


@pytest.mark.parametrize("share", ["1", "-0.1", "2"])
def test_a_share_leaves_something(folder: Path, share: str) -> None:
    assert "data.eval_share: must be >= 0 and < 1" in problem(f"data.eval_share={share}")


def test_keys_that_have_a_problem_already_are_passed_over() -> None:
    problems: list[str] = []
    check_best_model({"load_best_model_at_end": True, "data.eval": ()}, lambda key, what, hint: problems.append(key))
    assert not problems
