"""The first few questions of each held-out source with what the model has said to them, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hecate.data.evaluation import GenerationItem
from hecate.ranks.ranks import Ranks
from hecate.report.events import ShownAnswer

MOST_ANSWERS = 3
"""of a source"""
MOST_CHARACTERS = 300
"""of each text"""
_MOST_BYTES = 4 * (MOST_CHARACTERS + 50)
"""of a text with what is said of its cut, in UTF-8"""


def first_answers(
    ranks: Ranks, tokenizer: Any, asked: Sequence[tuple[str, GenerationItem]], answers: Sequence[str]
) -> dict[str, tuple[ShownAnswer, ...]]:
    """By source, its first `MOST_ANSWERS` questions and their answers. Every rank must call it, and all return the same.

    Args:
        asked: sources and their questions, the same on every rank.
        answers: of this rank, to asked[rank :: world size].
    """
    places: dict[str, list[int]] = {}
    for place, (source, _) in enumerate(asked):
        if len(of_source := places.setdefault(source, [])) < MOST_ANSWERS:
            of_source.append(place)
    chosen = [place for of_source in places.values() for place in of_source]
    if not chosen:
        return {}
    # Each row is zero on all ranks but the one that has its answer: the sum is everyone's.
    bytes_NB = torch.zeros(len(chosen), _MOST_BYTES, dtype=torch.uint8)
    for row, place in enumerate(chosen):
        if place % ranks.world_size == ranks.rank:
            text = cut(answers[place // ranks.world_size]).encode()
            bytes_NB[row, : len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    said = {place: bytes(row).rstrip(b"\0").decode() for place, row in zip(chosen, ranks.all_sum(bytes_NB).tolist(), strict=True)}
    return {
        source: tuple(ShownAnswer(_prompt(tokenizer, asked[at][1]), cut(asked[at][1].answer_text), said[at]) for at in of_source)
        for source, of_source in places.items()
    }


def cut(text: str, *, at_front: bool = False) -> str:
    """The first `MOST_CHARACTERS` of a text, or its last ones, and how many more there are."""
    more = len(text) - MOST_CHARACTERS
    if more <= 0:
        return text
    return f"[{more:,} characters before] {text[more:]}" if at_front else f"{text[:MOST_CHARACTERS]} [{more:,} more characters]"


def _prompt(tokenizer: Any, item: GenerationItem) -> str:
    """The question is at the end of a prompt, behind what a system or a template says to each."""
    return cut(str(tokenizer.decode(item.prompt_ids, skip_special_tokens=True)).strip(), at_front=True)
