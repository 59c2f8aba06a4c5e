"""Take what reads like a special token in a sample's texts, such as <|im_end|>, for plain text (`data.split_special_tokens`).

In each such text a mark is put after the first character before the chat template is rendered. Where the rendering has a mark, the
tokenizer's text is cut, so that it sees no special token there; those that the template itself writes stay what they are. A tokenizer that
puts a mark of its own before a text, as SentencePiece's do, puts one where the text is cut, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MARK = "\ue001"
"""A character of Unicode's private use, so that no template writes it."""


def marked(messages: Sequence[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """The messages with a mark in each special token that their texts hold; roles stay as they are."""
    special = sorted(filter(None, tokenizer.get_added_vocab()), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, special))) if special else None
    return [{key: value if key == "role" else _marked(value, pattern) for key, value in message.items()} for message in messages]


def cuts(text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]], tuple[int, ...]]:
    """A rendering without its marks, the spans in it, and where it is to be cut."""
    places = [place for place, character in enumerate(text) if character == _MARK]
    moved = [(start - sum(place < start for place in places), end - sum(place < end for place in places)) for start, end in spans]
    return text.replace(_MARK, ""), moved, tuple(place - number for number, place in enumerate(places))


def tokens_of_pieces(tokenizer: Any, text: str, cut: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The tokens of a text that is cut at these places, [n], and their character ranges in it, [n, 2]."""
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, end in zip((0, *cut), (*cut, len(text)), strict=True):
        found = tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=False, verbose=False)
        ids += found["input_ids"]
        offsets += [(start + first, start + last) for first, last in found["offset_mapping"]]
    return np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int64).reshape(-1, 2)


def _marked(value: Any, special: re.Pattern[str] | None) -> Any:
    if isinstance(value, str):
        return value if special is None else special.sub(lambda found: found[0][:1] + _MARK + found[0][1:], value)
    if isinstance(value, list):
        return [_marked(item, special) for item in value]
    return {key: _marked(item, special) for key, item in value.items()} if isinstance(value, dict) else value
