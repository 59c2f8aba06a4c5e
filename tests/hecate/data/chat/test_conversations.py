"""Conversations as text: what a chat template makes of them, character by character, and which characters are the assistant's."""

from __future__ import annotations

from typing import Any

import pytest

from hecate.data.chat.conversations import TemplateRefusal, render, render_prompt, require_chat_template
from hecate.errors import UserError
from testing.byte_tokenizer import TEMPLATE, build_byte_tokenizer
from tests.hecate.data.talks import CALLING, TALK, TOOLS


def test_a_turn_of_the_assistant_is_its_content_and_its_end_mark(byte_tokenizer: Any) -> None:
    text, spans = render(byte_tokenizer, TALK)
    assert text == "<s>user\n2?<e>\n<s>assistant\n two\n<e>\n<s>user\n3?<e>\n<s>assistant\nthree<e>\n"
    assert [text[start:end] for start, end in spans] == [" two\n<e>", "three<e>"]
    assert spans == [(27, 35), (63, 71)]


def test_a_prompt_ends_where_the_answer_is_to_begin(byte_tokenizer: Any) -> None:
    assert render_prompt(byte_tokenizer, TALK[:1]) == "<s>user\n2?<e>\n<s>assistant\n"


def test_a_refusal_carries_the_templates_own_words() -> None:
    picky = build_byte_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TemplateRefusal, match=r"^roles must alternate$"):
        render(picky, TALK)


def test_a_template_that_rewrites_earlier_turns_is_named_with_the_message() -> None:
    last_only = build_byte_tokenizer(chat_template=TEMPLATE.replace("'<e>", "('!' if loop.last and loop.index == 2 else '') + '<e>"))
    render(last_only, TALK[:2])
    with pytest.raises(TemplateRefusal, match=r"^it rewrites earlier turns.* up to message 2 is not a prefix"):
        render(last_only, TALK)


def test_calls_of_tools_are_learned_and_what_the_tools_are_is_given() -> None:
    able = build_byte_tokenizer(chat_template=TOOLS)
    text, spans = render(able, CALLING, tools=[{"name": "add"}])
    assert text.startswith("[add]<s>user\n2 + 3?<e>\n<s>assistant\n(add ")
    assert [text[start:end] for start, end in spans] == ['(add {"a": 2, "b": 3})<e>', "five<e>"]
    assert render_prompt(able, CALLING[:1], [{"name": "add"}]) == "[add]<s>user\n2 + 3?<e>\n<s>assistant\n"
    text, spans = render(able, CALLING, turns=[3])
    assert [text[start:end] for start, end in spans] == ["five<e>"]


def test_templates_are_given_one_date_for_ever() -> None:
    """So that a data set is the same tomorrow."""
    dated = build_byte_tokenizer(chat_template="{{ date_string }} " + TEMPLATE)
    assert render_prompt(dated, TALK[:1]) == "26 Jul 2024 <s>user\n2?<e>\n<s>assistant\n"


def test_a_tokenizer_without_a_template_is_refused(byte_tokenizer: Any) -> None:
    require_chat_template(byte_tokenizer, "a.jsonl")
    with pytest.raises(UserError, match=r"^a\.jsonl holds conversations, but the model's tokenizer has no chat template\n"):
        require_chat_template(build_byte_tokenizer(chat_template=None), "a.jsonl")
