"""What a chat template does not write of a conversation is refused where it is an answer, and else named and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hecate.data.chat.conversations import TemplateRefusal, render
from hecate.data.chat.written import Unwritten, require_learned, unwritten
from hecate.errors import UserError
from testing.byte_tokenizer import TEMPLATE, build_byte_tokenizer
from tests.hecate.data.making import chat, encode_records
from tests.hecate.data.talks import CALLING, TALK, TOOLS


def writing(content: str) -> str:
    """The template with this in the place of a message's content."""
    assert "message['content']" in TEMPLATE
    return TEMPLATE.replace("message['content']", f"({content})")


R1 = writing("message.content.split('</think>')[-1]")
"""as DeepSeek's template for R1's distilled models"""
THINKING = writing("(message.reasoning_content or '') + message.content")
TOLD = "<think>They are two.</think>2"


def answers(messages: list[dict[str, Any]], given: int = 0) -> list[int]:
    return [turn for turn, message in enumerate(messages) if message["role"] == "assistant" and turn >= given]


def lost(template: str, messages: list[dict[str, Any]], tools: tuple[Any, ...] = (), given: int = 0) -> list[Unwritten]:
    tokenizer = build_byte_tokenizer(chat_template=template)
    turns = answers(messages, given)
    whole, spans = render(tokenizer, messages, tools=tools, turns=turns)
    return unwritten(tokenizer, messages, tools, whole, dict(zip(turns, spans, strict=True)), {})


def asked(answer: str, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": answer} | more]


@pytest.mark.parametrize(
    ("template", "messages", "tools"),
    [
        (TEMPLATE, TALK, ()),
        (TOOLS, CALLING, ({"name": "add"},)),
        (THINKING, asked("2", reasoning_content="They are\n two."), ()),
        (writing("message.content | trim"), asked("  \n2\n "), ()),
        (writing("message.content | tojson"), asked('say "two"\n or ü'), ()),
        (writing("message.content | upper"), asked("two and two"), ()),
        (R1, asked("no thoughts, but 2 < 3 > 1"), ()),
        (writing("(message.name or '') + message.content"), asked("2", name="bot"), ()),
    ],
)
def test_a_template_that_writes_all_in_whatever_form_loses_nothing(template: str, messages: list[Any], tools: tuple[Any, ...]) -> None:
    assert lost(template, messages, tools) == []


def test_keys_that_a_template_never_writes_are_found_even_if_their_text_is_there_by_chance() -> None:
    found = lost(TEMPLATE, [{"role": "user", "content": "2 two", "name": "two"}, *asked("two", reasoning_content="two", weight=1)[1:]])
    assert found == [Unwritten(0, "name"), Unwritten(1, "reasoning_content"), Unwritten(1, "weight")]
    no_system = writing("message.content if message.role != 'system' else ''")
    assert lost(no_system, [{"role": "system", "content": "1"}, *asked("2")]) == [Unwritten(0, "content")]


def test_a_part_of_an_answer_that_a_template_drops_is_found() -> None:
    assert lost(R1, asked(TOLD)) == [Unwritten(1, "content", TOLD)]
    short = writing("message.content[:9]")
    assert lost(short, asked("one two three")) == [Unwritten(1, "content", "three")]


def test_calls_whose_template_wants_a_certain_form_are_tried_as_they_are() -> None:
    """As Mistral's, which refuses ids of other lengths than nine; the marks keep lengths, but are no letters."""
    picky = TOOLS.replace("({{ call", "{{ raise_exception('bad name') if call.function.name != 'add' }}({{ call")
    assert lost(picky, CALLING, ({"name": "add"},)) == []
    silent = TOOLS.replace(
        "({{ call.function.name }} {{ call.function.arguments | tojson }})", "{{ raise_exception() if not call.function.name.isascii() }}"
    )
    assert lost(silent, CALLING, ({"name": "add"},)) == [Unwritten(1, "tool_calls")]


@pytest.mark.parametrize(
    ("template", "messages", "tools", "told"),
    [
        (TEMPLATE, CALLING, (), r"it writes no calls of tools \(tool_calls\), which message 2 has and which are to be learned"),
        (TEMPLATE, TALK, ({"name": "add"},), "it writes no tools; use a template that does"),
        (TEMPLATE, asked("2", reasoning_content="They are two."), (), "it writes no reasoning_content, which message 2 has"),
        (
            R1,
            asked(TOLD),
            (),
            "it drops a part of the content of message 2, which begins with '<think>They are two.</think>2' and is to be learned",
        ),
    ],
)
def test_what_an_answer_would_have_taught_is_refused(template: str, messages: list[Any], tools: tuple[Any, ...], told: str) -> None:
    with pytest.raises(TemplateRefusal, match=told):
        require_learned(answers(messages), lost(template, messages, tools))


def test_what_describes_turns_is_named_and_so_is_what_is_dropped_of_a_prompt() -> None:
    named = [{"role": "user", "content": "1 + 1", "name": "Ada"}, *asked("2", id=7)[1:]]
    assert require_learned(answers(named), lost(TEMPLATE, named)) == ["id of turns", "name of turns"]
    talk = [*asked(TOLD), *asked("4")]
    assert require_learned(answers(talk, 2), lost(R1, talk, given=2)) == ["content of turns"]


def test_the_line_of_a_sample_that_would_lose_a_part_is_named(tmp_path: Path) -> None:
    tokenizer = build_byte_tokenizer(chat_template=R1)
    with pytest.raises(UserError, match=r"data\.jsonl:2: the chat template cannot be used .*: it drops a part of the content of message 2"):
        encode_records(tmp_path, [chat("q", "a"), chat("q", TOLD)], tokenizer)


def test_keys_without_tokens_are_counted_and_said(tmp_path: Path, byte_tokenizer: Any, caplog: Any) -> None:
    named = chat("q", "a") | {"id": 1, "images": []}
    named["messages"][0]["name"] = "Ada"
    source = encode_records(tmp_path, [named, chat("q", "b") | {"id": 2, "source": "web"}, chat("q", "c")], byte_tokenizer)
    assert source.counts.unread == {"id": 2, "source": 1, "name of turns": 1}
    line = "data.jsonl: keys of which no tokens are made, and how many of 3 samples have them: id (2), name of turns (1), source (1)"
    assert [record.getMessage().removeprefix(f"{tmp_path}/") for record in caplog.records] == [line]


def test_what_an_evaluation_judges_answers_by_is_read(tmp_path: Path, byte_tokenizer: Any) -> None:
    judged, other = {"task": "gcd", "entry": {"metadata": {"source_dataset": "gcd"}}}, {"task": "x", "entry": 1}
    source = encode_records(tmp_path, [chat("q", "a") | judged, chat("q", "b") | other], byte_tokenizer)
    assert source.counts.unread == {"task": 1, "entry": 1}, "not those of the first sample"
