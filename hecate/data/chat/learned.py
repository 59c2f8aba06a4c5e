"""Which characters of a rendered conversation are learned: the turns of some roles, and the marks that end turns.

A turn is learned from behind its header: an answer from the end of the generation prompt, another turn from its text. The mark is the added
token that the chat template writes behind an answer, such as <|im_end|>.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hecate.config import DataSource
from hecate.data.chat.conversations import Message, Span, TemplateRefusal, render, rendering, turn_mark

_TEXT, _NEXT = "\ue002", "\ue003"
"""What stands for the text of a turn and for that of the next one; of Unicode's private use, so that no template writes it."""


@dataclass(frozen=True)
class LearnedTurns:
    """Which turns of a source's conversations are learned."""

    roles: tuple[str, ...] = ("assistant",)
    eos: str = "turn"
    """At which turns the mark is learned (`data.train_on_eos`)."""
    mark: str | None = None
    """The mark; None: the template writes none, or it is not needed."""

    def of(self, messages: Sequence[Message], given: int = 0, marks: Sequence[bool | None] = ()) -> list[int]:
        """The indices of the messages that are learned: those that say so themselves, or else those of the roles behind the prompt.

        Args:
            given: how many messages are a prompt.
            marks: what the messages say; those behind its end say nothing.
        """
        said = [*marks, *[None] * (len(messages) - len(marks))]
        of_role = [turn >= given and message["role"] in self.roles for turn, message in enumerate(messages)]
        return [turn for turn, mark in enumerate(said) if (of_role[turn] if mark is None else mark)]


def learned_turns(source: DataSource, tokenizer: Any) -> LearnedTurns:
    """What a source says of its turns, with the mark of the tokenizer's chat template."""
    rule = LearnedTurns(("assistant",) if source.roles_to_train is None else source.roles_to_train, source.train_on_eos or "turn")
    return replace(rule, mark=turn_mark(tokenizer)) if getattr(tokenizer, "chat_template", None) else rule


def render_learned(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any], turns: Sequence[int], rule: LearnedTurns
) -> tuple[str, dict[int, Span], list[Span]]:
    """Return the conversation as one string, the span of each learned turn with the mark behind it, and the spans that are learned.

    Args:
        turns: the indices of the messages that are learned, in order.

    Raises:
        TemplateRefusal: as `render`; or where a turn stands, or its mark, cannot be told.
    """
    answers = [turn for turn in turns if messages[turn]["role"] == "assistant"]
    whole, spans = render(tokenizer, messages, tools=tools, turns=answers)
    found = dict(zip(answers, spans, strict=True))
    for turn in turns:
        if turn not in found:
            found[turn] = _text_span(tokenizer, messages, tools, turn, whole, rule.mark)
    return whole, found, _learned_spans(whole, found, rule)


def _learned_spans(whole: str, found: Mapping[int, Span], rule: LearnedTurns) -> list[Span]:
    if rule.eos == "turn":
        return [found[turn] for turn in sorted(found)]
    if rule.mark is None:
        raise TemplateRefusal(f"it ends answers with no token of their own, which train_on_eos: {rule.eos} is about; use turn")
    learned = []
    for turn, (start, end) in sorted(found.items()):
        at = whole.rfind(rule.mark, start, end)
        kept = at < 0 or (rule.eos == "last" and turn == max(found)) or rule.eos == "all"
        learned.append((start, end if kept else at))
    if rule.eos == "all":
        learned += [place.span() for place in re.finditer(re.escape(rule.mark), whole)]
    return learned


def _text_span(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any], turn: int, whole: str, mark: str | None) -> Span:
    """Where the text of a turn that is no answer stands, with the mark behind it if the template writes one before the next turn's text.

    Raises:
        TemplateRefusal: the rendering does not have it as it is.
    """
    stand_ins: dict[int, str] = {turn: _TEXT, turn + 1: _NEXT}
    written = rendering(tokenizer, [message | _content_of(stand_ins, index) for index, message in enumerate(messages)], tools)
    before, found, behind = written.partition(_TEXT)
    behind = behind.partition(_NEXT)[0]
    tail = behind[: behind.find(mark) + len(mark)] if mark is not None and mark in behind else ""
    for text in dict.fromkeys((messages[turn]["content"], messages[turn]["content"].strip())):
        if found and whole.startswith(before + text + tail):
            return len(before), len(before) + len(text) + len(tail)
    raise TemplateRefusal(
        f"where the text of message {turn + 1}, of the {messages[turn]['role']}, stands in it cannot be told; leave that role out of "
        "roles_to_train"
    )


def _content_of(texts: Mapping[int, str], index: int) -> dict[str, str]:
    return {"content": texts[index]} if index in texts else {}
