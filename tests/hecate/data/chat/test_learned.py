"""Which turns and which ends of turns are learned, held to a plain reader of what real templates write."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hecate.data.chat.conversations import TemplateRefusal, turn_mark
from hecate.data.chat.learned import LearnedTurns, learned_turns, render_learned
from hecate.data.chat.sample_text import text_to_tokenize
from hecate.data.chat.templates import read_template
from hecate.data.encode import IGNORED, encode_source
from hecate.data.files.formats import Fault, Sample, read_samples
from hecate.errors import UserError
from testing.byte_tokenizer import build_byte_tokenizer
from tests.hecate.data.making import Source, encode_records, write_jsonl

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": " and 2 + 2? "},
    {"role": "assistant", "content": "four, of course"},
    {"role": "user", "content": "thanks"},
]
_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(<\|im_end\|>)\n", re.DOTALL)
EOS = ("turn", "all", "last", "none")


def reference(text: str, learned: list[bool], eos: str, header: str) -> list[bool]:
    """Which characters of a ChatML text are learned, read from the text turn by turn. `header` is what stands before an answer."""
    mask = [False] * len(text)
    turns = list(_TURN.finditer(text))
    assert len(turns) == len(learned)
    for turn, (found, wanted) in enumerate(zip(turns, learned, strict=True)):
        start, end = found.span(2)
        if found[1] == "assistant":
            start += len(header)
        if wanted:
            mask[start:end] = [True] * (end - start)
        of_turn = {"turn": wanted, "all": True, "none": False, "last": wanted and not any(learned[turn + 1 :])}
        if of_turn[eos]:
            mask[slice(*found.span(3))] = [True] * len(found[3])
    return mask


@pytest.fixture(params=["smollm2", "qwen3"])
def chatml(request: pytest.FixtureRequest, smollm2_tokenizer: Any) -> tuple[Any, str]:
    """A tokenizer with a real template, and what the template writes between the header of an answer and its text."""
    if request.param == "smollm2":
        return smollm2_tokenizer, ""
    tokenizer = build_byte_tokenizer(chat_template=read_template("qwen3"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer, ""


@pytest.mark.parametrize("roles", [("assistant",), ("user",), ("assistant", "user"), ("system", "assistant"), ()])
def test_roles_marks_and_ends_are_those_of_the_reference(tmp_path: Path, chatml: tuple[Any, str], roles: tuple[str, ...]) -> None:
    tokenizer, header = chatml
    for eos, marks in product(EOS, [{}, {2: False}, {1: True, 4: False}, {5: True}]):
        said = [message | ({"train": marks[turn]} if turn in marks else {}) for turn, message in enumerate(TALK)]
        learned = [marks.get(turn, message["role"] in roles) for turn, message in enumerate(TALK)]
        source = Source(str(write_jsonl(tmp_path / "a.jsonl", [{"messages": said}])), roles_to_train=roles, train_on_eos=eos)
        if not any(learned):
            with pytest.raises(UserError, match=r"a\.jsonl:1: there is no token to learn"):
                encode_source(source, tokenizer, seq_len=2000, vocab_size=60_000)
            continue
        (sample,) = encode_source(source, tokenizer, seq_len=2000, vocab_size=60_000)
        text = tokenizer.apply_chat_template(TALK, tokenize=False)
        tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = reference(text, learned, eos, header)
        wanted = np.array([any(mask[start:end]) for start, end in tokens["offset_mapping"]])
        ids = np.array(tokens["input_ids"])
        targets = np.where(wanted[1:], ids[1:], IGNORED)
        end = int(np.flatnonzero(targets != IGNORED)[-1]) + 1
        assert sample.input_ids.tolist() == ids[:end].tolist()
        assert sample.targets.tolist() == targets[:end].tolist(), (roles, eos, marks)


def test_a_mark_of_a_turn_counts_for_more_than_roles_and_prompts() -> None:
    rule = LearnedTurns(("assistant", "user"))
    assert rule.of(TALK) == [1, 2, 3, 4, 5]
    assert rule.of(TALK, given=3) == [3, 4, 5]
    assert rule.of(TALK, given=3, marks=(None, True, None, False)) == [1, 4, 5]


def read_one(tmp_path: Path, record: dict[str, Any]) -> Sample:
    (sample,) = read_samples(write_jsonl(tmp_path / "data.jsonl", [record]))
    assert isinstance(sample, Sample)
    return sample


@pytest.mark.parametrize("key", ["train", "training", "weight", "loss"])
def test_every_program_s_key_for_a_turn_is_read(tmp_path: Path, key: str) -> None:
    turns = [TALK[1], TALK[2] | {key: 0 if key == "weight" else False}, TALK[3], TALK[4] | {key: 1 if key == "weight" else True}]
    sample = read_one(tmp_path, {"system": "s", "messages": turns})
    assert sample.marks == (None, None, False, None, True)
    assert sample.messages == (TALK[0] | {"content": "s"}, *TALK[1:5])
    slim = [{"from": "human", "value": "u", "weight": 0}, {"from": "gpt", "value": "a", "weight": 1.0}]
    assert read_one(tmp_path, {"conversations": slim}).marks == (False, True)


def test_an_answer_that_is_not_learned_may_be_rewritten(tmp_path: Path) -> None:
    """So a template that drops earlier thoughts can be used where only the last answer is learned."""
    last_only = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content if loop.last or m.role == 'user' else '-' }}<e>\n{% endfor %}"
    tokenizer = build_byte_tokenizer(chat_template=last_only + "{% if add_generation_prompt %}<s>assistant\n{% endif %}")
    talk = {"messages": [*TALK[1:4], TALK[4]]}
    with pytest.raises(UserError, match="it rewrites earlier turns"):
        encode_records(tmp_path, [talk], tokenizer)
    talk["messages"][1] = TALK[2] | {"train": False}
    assert len(encode_records(tmp_path, [talk], tokenizer)) == 1


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    plain = build_byte_tokenizer(chat_template="{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}")
    rule = learned_turns(Source("a", train_on_eos="none"), plain)
    assert rule.mark is turn_mark(plain) is None
    with pytest.raises(TemplateRefusal, match="it ends answers with no token of their own, which train_on_eos: none is about"):
        render_learned(plain, TALK[1:2], (), [0], rule)
    upper = build_byte_tokenizer(chat_template="{% for m in messages %}<s>{{ m.content | upper }}<e>\n{% endfor %}")
    with pytest.raises(
        TemplateRefusal, match=r"where the text of message 1, of the user, stands in it cannot be told; leave that role out"
    ):
        render_learned(upper, TALK[5:], (), [0], learned_turns(Source("a"), upper))
    fault = text_to_tokenize(read_one(tmp_path, {"messages": TALK[1:2]}), upper, {}, LearnedTurns())
    assert isinstance(fault, Fault)
    assert fault.reason == "there is no token to learn: the conversation has no assistant turn that is learned"


def test_parts_of_text_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "1 "}, "+ ", {"type": "input_text", "text": "1?", "annotations": []}]
    assert read_one(tmp_path, {"messages": [TALK[1] | {"content": parts}, TALK[2]]}).messages == (TALK[1], TALK[2])


def test_roles_and_keys_of_other_programs_may_be_mixed(tmp_path: Path) -> None:
    call = '{"name": "add", "arguments": {"a": 1}}'
    turns = [
        {"role": "human", "value": "u"},
        {"from": "function_call", "content": call},
        {"role": "observation", "content": "1"},
        {"role": "gpt", "content": "a"},
    ]
    for key in ("messages", "conversations"):
        sample = read_one(tmp_path, {key: turns})
        assert [message["role"] for message in sample.messages or ()] == ["user", "assistant", "tool", "assistant"]
