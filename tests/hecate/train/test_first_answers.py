"""The answers that a person is shown are the first of each source, whichever rank has given them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hecate.data.evaluation import GenerationItem
from hecate.report.events import ShownAnswer
from hecate.train.first_answers import MOST_ANSWERS, MOST_CHARACTERS, cut, first_answers
from testing.ranks import run_ranks
from tests.hecate.train.in_process import ranks_of_default_group

TOKENIZER = SimpleNamespace(decode=lambda ids, skip_special_tokens: f" question {ids[0]} ")
# Sources of none, of fewer and of more questions than are shown; they begin on different ranks.
ASKED = [
    (name, GenerationItem([number], f"{name} wants {number}", "file", number))
    for name, size in (("a", 5), ("b", 2), ("c", 4))
    for number in range(size)
]
SAID = ["", "one", "zwei, größer \U0001f600", "<b>", *(f"said {place}" for place in range(4, 10)), "\U0001f600" * 2 * MOST_CHARACTERS]


def shown_on(rank: int, world: int) -> tuple[dict[str, tuple[ShownAnswer, ...]], dict[str, tuple[ShownAnswer, ...]]]:
    """Of all sources, and of sources without a question."""
    ranks = ranks_of_default_group(rank, world)
    return first_answers(ranks, TOKENIZER, ASKED, SAID[rank::world]), first_answers(ranks, TOKENIZER, [], [])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_rank_has_the_first_answers_of_each_source(world: int) -> None:
    wanted: dict[str, tuple[ShownAnswer, ...]] = {}
    for (name, item), said in zip(ASKED, SAID, strict=True):
        if len(wanted.get(name, ())) < MOST_ANSWERS:
            one = ShownAnswer(f"question {item.prompt_ids[0]}", item.answer_text, said)
            wanted[name] = (*wanted.get(name, ()), one)
    assert run_ranks(world, shown_on) == [(wanted, {})] * world


def test_a_long_text_says_how_much_of_it_is_cut() -> None:
    text = "a" * 5 + "b" * MOST_CHARACTERS
    assert cut("b" * MOST_CHARACTERS) == "b" * MOST_CHARACTERS
    assert cut(text) == "aaaaa" + "b" * (MOST_CHARACTERS - 5) + " [5 more characters]"
    assert cut(text, at_front=True) == "[5 characters before] " + "b" * MOST_CHARACTERS
    (shown,) = first_answers(
        SimpleNamespace(rank=0, world_size=1, all_sum=lambda values: values), TOKENIZER, ASKED[:1], ["\U0001f600" * 1234]
    )["a"]  # type: ignore[arg-type]
    assert shown.answer == "\U0001f600" * MOST_CHARACTERS + " [934 more characters]"
