"""The chat template that is used: which one takes the place of which, and that ours write what the models' own write, but only append."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.config.files.presets import chat_templates
from hecate.data.chat.conversations import Message, TemplateRefusal, render, render_prompt
from hecate.data.chat.templates import check_template_file, choose_template, read_template, template_beside
from hecate.errors import UserError
from testing.byte_tokenizer import TEMPLATE, build_byte_tokenizer

OWN = {path.stem: path.read_text(encoding="utf-8") for path in (Path(__file__).parent.parent / "chat_templates").glob("*.jinja")}
"""the templates of models that ours stand in for, by the names of ours"""
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds é.", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}}},
]


def tokenizer_of(template: str) -> Any:
    return build_byte_tokenizer(chat_template=template)


texts = st.sampled_from(["a", "two\nlines", " b ", "\n\nc\n", "<tool_response>x</tool_response>", "4 < 5 </think", "é\u2028"])
thoughts = st.sampled_from(["", "so", "\n\nit is\n\nso \n", "a </b> c"])
arguments = st.sampled_from([{}, {"a": 2, "b": "é"}, '{"a": 2}'])
calls = st.lists(
    st.builds(
        lambda name, given: {"type": "function", "function": {"name": name, "arguments": given}}, st.sampled_from(["add", "now"]), arguments
    ),
    min_size=1,
    max_size=3,
)


@st.composite
def answers(draw: st.DrawFn, *, ends: bool) -> Message:
    """An answer to the user, or calls of tools."""
    message: Message = {"role": "assistant", "content": draw(texts)}
    match draw(st.sampled_from(["plain", "own key", "in the text"])):
        case "own key":
            message["reasoning_content"] = draw(thoughts)
        case "in the text":
            message["content"] = f"<think>\n{draw(thoughts)}\n</think>\n\n{message['content']}"
    if not ends:
        message["tool_calls"] = draw(calls)
        if draw(st.booleans()):
            message["content"] = ""
    return message


@st.composite
def turns(draw: st.DrawFn, most_calls: int) -> list[Message]:
    """A question, calls of tools with their results, and the answer."""
    found: list[Message] = [{"role": "user", "content": draw(texts.filter(lambda text: not text.startswith("<tool")))}]
    for _ in range(draw(st.integers(0, most_calls))):
        found.append(draw(answers(ends=False)))
        found += [{"role": "tool", "content": draw(texts)} for _ in range(draw(st.integers(1, 2)))]
    return [*found, draw(answers(ends=True))]


systems = st.sampled_from([[], [{"role": "system", "content": "Be brief."}], [{"role": "system", "content": ""}]])
given_tools = st.sampled_from([[], TOOLS[:1], TOOLS])


def test_each_of_ours_has_the_text_that_it_stands_in_for() -> None:
    assert set(OWN) == set(chat_templates())


@pytest.mark.parametrize("name", sorted(OWN))
def test_ours_is_chosen_by_the_text_of_the_models_own(name: str) -> None:
    chosen = choose_template(OWN[name], None)
    assert chosen is not None
    assert chosen.text == chat_templates()[name].read_text(encoding="utf-8")
    assert f"the chat template {name} of hecate's takes the place of the model's own" in chosen.why
    assert choose_template(OWN[name] + " ", None) is None, "another text is never replaced"
    assert choose_template(chosen.text, None) is None
    assert choose_template(None, None) is None
    assert choose_template({"default": OWN[name], "rag": "x"}, None) is None


@pytest.mark.parametrize("name", sorted(OWN))
@given(system=systems, question=turns(0), calling=st.none() | calls, tools=given_tools)
def test_a_conversation_with_one_answer_is_written_as_by_the_models_own(
    name: str, system: list[Message], question: list[Message], calling: Any, tools: list[Any]
) -> None:
    messages = [*system, *question]
    if calling is not None:
        messages[-1] = messages[-1] | {"tool_calls": calling}
    own, ours = tokenizer_of(OWN[name]), tokenizer_of(read_template(name))
    assert render(ours, messages, tools=tools) == render(own, messages, tools=tools)
    for flag in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        options = {"tokenize": False, "add_generation_prompt": True, "tools": tools or None, **flag}
        assert ours.apply_chat_template(messages, **options) == own.apply_chat_template(messages, **options)


@pytest.mark.parametrize("name", sorted(OWN))
@given(system=systems, turn=turns(3), tools=given_tools)
def test_calls_of_tools_with_thoughts_and_their_results_are_written_as_by_the_models_own(
    name: str, system: list[Message], turn: list[Message], tools: list[Any]
) -> None:
    """Of calls without thoughts the model's own leaves out the empty block of thoughts once the result is there, which ours cannot."""
    messages = [*system, *(message | {"reasoning_content": "so"} if message.get("tool_calls") else message for message in turn)]
    own, ours = tokenizer_of(OWN[name]), tokenizer_of(read_template(name))
    assert render(ours, messages, tools=tools) == render(own, messages, tools=tools)


@pytest.mark.parametrize("name", sorted(OWN))
@given(system=systems, talk=st.lists(turns(2), min_size=1, max_size=3), tools=given_tools)
def test_each_answer_of_a_conversation_is_learned_as_the_models_own_template_asks_for_it(
    name: str, system: list[Message], talk: list[list[Message]], tools: list[Any]
) -> None:
    """As that writes it where it is the last one, thoughts included, since a model says it there."""
    messages = [*system, *(message for turn in talk for message in turn)]
    own, ours = tokenizer_of(OWN[name]), tokenizer_of(read_template(name))
    text, spans = render(ours, messages, tools=tools)
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(spans) == len(places)
    for place, (start, end) in zip(places, spans, strict=True):
        asked = render_prompt(own, messages[:place], tools)
        said = own.apply_chat_template(messages[: place + 1], tokenize=False, tools=tools or None)
        assert text[start:end] == said[len(asked) :].rstrip()
        assert text[:start] == render_prompt(ours, messages[:place], tools), "the prompt is what is asked after the turns before"
    for count in range(1, len(messages)):  # only appended to, also where a tool has answered
        assert text.startswith(ours.apply_chat_template(messages[:count], tokenize=False, tools=tools or None).removesuffix("<|im_end|>\n"))


@pytest.mark.parametrize("name", sorted(OWN))
def test_the_models_own_template_cannot_be_learned_from(name: str) -> None:
    """Otherwise ours would not be needed."""
    thinking = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "<think>\nt\n</think>\n\n2"}]
    with pytest.raises(TemplateRefusal, match=r"rewrites earlier turns.*\(data\.chat_template\)"):
        render(tokenizer_of(OWN[name]), thinking * 2)


def test_qwen3_keeps_the_thoughts_of_earlier_answers() -> None:
    talk = [
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "two", "reasoning_content": "count"},
        {"role": "user", "content": "3?"},
        {"role": "assistant", "content": "three"},
    ]
    text, spans = render(tokenizer_of(read_template("qwen3")), talk)
    assert [text[start:end] for start, end in spans] == [
        "<think>\ncount\n</think>\n\ntwo<|im_end|>",
        "<think>\n\n</think>\n\nthree<|im_end|>",
    ]


def test_a_file_is_taken_whatever_the_models_own_is(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(TEMPLATE, encoding="utf-8")
    for own in (None, TEMPLATE, OWN["qwen3"]):
        chosen = choose_template(own, str(file))
        assert chosen is not None
        assert chosen.text == TEMPLATE
        assert chosen.why == f"conversations are written in the chat template {file}"
    check_template_file(str(file))
    check_template_file("qwen3")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"{% if %}", r"^data\.chat_template: .*/t\.jinja:1: is no Jinja template: "),
        (b"\n{{ messages | unknown }}", r"/t\.jinja:2: is no Jinja template: No filter named 'unknown'"),
        (b"{{ messages[0].content }}", r"/t\.jinja: writes no generation prompt, .*\n  let it write one where add_generation_prompt"),
        (b"{{ ().__class__.__bases__ }}", r"/t\.jinja: does what a chat template must not do: .*\n  give a template that only writes text"),
        (b"\xff", r"/t\.jinja: is not UTF-8"),
    ],
)
def test_what_is_no_chat_template_is_refused(content: bytes, error: str, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(UserError, match=error):
        check_template_file(str(tmp_path / "t.jinja"))


def test_a_template_that_wants_more_than_a_question_is_left_to_the_data(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ raise_exception('a system message first') }}", encoding="utf-8")
    check_template_file(str(tmp_path / "t.jinja"))


def test_the_template_beside_an_adapter(tmp_path: Path) -> None:
    assert template_beside(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    assert template_beside(tmp_path) == TEMPLATE
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(UserError, match=r"chat_template\.jinja: the chat template cannot be read: Is a directory"):
        template_beside(tmp_path)
