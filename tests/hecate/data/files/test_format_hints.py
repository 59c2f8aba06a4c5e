"""A hint about data, obeyed, leads to samples and to no other hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hecate.config.schema import FieldNames
from hecate.data.chat.turns import BadRecord, messages_of
from hecate.data.files.format_hints import in_words
from hecate.data.files.formats import Fault, Sample, read_samples
from hecate.errors import UserError
from hecate.io.strict_yaml import parse_yaml
from tests.hecate.data.making import write_jsonl
from tests.hecate.data.talks import ASSISTANT, USER

TURNS = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]


def fields_of(hint: str) -> dict[str, str]:
    """What `fields` says in the source that a hint proposes."""
    line = next(line for line in hint.splitlines() if "fields: {" in line)
    return dict(parse_yaml(line[line.index("{path") :])["fields"])


def hint_about(folder: Path, records: list[Any], **names: str) -> str:
    path = write_jsonl(folder / "data.jsonl", records)
    with pytest.raises(UserError) as caught:
        list(read_samples(path, names=FieldNames(**names)))
    assert len(str(caught.value).splitlines()) <= 8
    return str(caught.value)


def obeyed(folder: Path, records: list[Any], **names: str) -> list[Sample]:
    """The samples of a file whose `fields` are those of the hint about it."""
    fields = fields_of(hint_about(folder, records, **names))
    samples = list(read_samples(folder / "data.jsonl", names=FieldNames(**fields)))
    assert all(isinstance(sample, Sample) for sample in samples)
    return [sample for sample in samples if isinstance(sample, Sample)]


ODD_KEYS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda key: key.strip() and key not in ("messages", "conversations", "rejected", "image", "images", "tools", "system", "history")
)
VALUES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.integers(),
    st.none(),
    st.lists(st.integers(), max_size=3),
    st.just([USER, ASSISTANT]),
    st.just(TURNS),
    st.just({"text": "within"}),
)


@given(record=st.dictionaries(ODD_KEYS, VALUES, min_size=1, max_size=5), data=st.data())
def test_each_hint_that_names_keys_is_right_when_obeyed(tmp_path_factory: Any, record: dict[str, Any], data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("odd")
    path = write_jsonl(folder / "data.jsonl", [record])
    given_name = data.draw(st.sampled_from([{}, *({"prompt": key} for key, value in record.items() if isinstance(value, str) and value)]))
    try:
        list(read_samples(path, names=FieldNames(**given_name)))
    except UserError as error:
        hint = str(error)
    else:
        return  # by chance of a known format
    if "fields: {" in hint:
        (sample,) = obeyed(folder, [record], **given_name)
        assert sample.text is not None or sample.messages or sample.tokens is not None
    else:
        assert "none of its keys has a text" in hint


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        ({"Frage: kurz": "Wie viel?", "true": "So viel."}, {"prompt": "Frage: kurz", "completion": "true"}),
        ({"id": "a7", "question": "How much is it?", "answer": "It is much."}, {"prompt": "question", "completion": "answer"}),
        ({"instruction": "Add.", "input": "1 1", "response": "2"}, {"output": "response"}),
        ({"token_ids": [1, 2], "title": "t"}, {"input_ids": "token_ids"}),
        ({"scores": [1, 2], "title": "t"}, {"text": "title"}),
        ({"rejected": "b", "title": "t"}, {"text": "title"}),
        ({"id": "7", "dialog": [USER, ASSISTANT]}, {"messages": "dialog"}),
        ({"dialog": TURNS}, {"conversations": "dialog"}),
    ],
)
def test_the_keys_that_are_meant_are_guessed(tmp_path: Path, record: dict[str, Any], fields: dict[str, str]) -> None:
    assert fields_of(hint_about(tmp_path, [record])) == fields
    assert len(obeyed(tmp_path, [record])) == 1


def test_records_without_text_are_called_so(tmp_path: Path) -> None:
    assert "none of its keys has a text" in hint_about(tmp_path, [{"data": {"q": "u", "a": "a"}}])


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"prompt": "u", "chosen": "a", "rejected": "b"}, (USER, ASSISTANT)),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [USER]}, (USER, ASSISTANT)),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, USER]}, (USER, ASSISTANT)),
        ({"chosen": TURNS, "rejected": TURNS}, (USER, ASSISTANT)),
        ({"question": "u", "chosen": "a", "rejected": "b", "score": 1}, (USER, ASSISTANT)),
        ({"instruction": "u", "input": "", "chosen": "a", "rejected": "b"}, (USER, ASSISTANT)),
    ],
)
def test_the_chosen_answers_are_trained_on_if_the_hint_is_obeyed(tmp_path: Path, record: dict[str, Any], messages: Any) -> None:
    assert "hecate does not train on preferences\nto train on the chosen answers, say so: {path" in hint_about(tmp_path, [record])
    (sample,) = obeyed(tmp_path, [record])
    assert sample.messages == messages
    assert sample.extra["rejected"] == record["rejected"]


def test_preferences_without_one_chosen_answer_of_a_known_form_are_to_be_written_anew(tmp_path: Path) -> None:
    for chosen in ({"from": "gpt", "value": "a"}, "a"):
        hint = hint_about(tmp_path, [{"a": "u", "b": "v", "chosen": chosen, "rejected": "c"}])
        assert hint.endswith('write records with a prompt and the chosen answer: {"prompt": ..., "completion": ...}')


def test_an_answer_of_a_pair_is_learned_if_fields_names_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "u", "completion": "a", "rejected": "b"}])
    (fault,) = read_samples(path)
    assert isinstance(fault, Fault)
    assert fields_of(fault.reason) == {"completion": "completion"}
    (sample,) = read_samples(path, names=FieldNames(completion="completion"))
    assert isinstance(sample, Sample)


def test_llama_factorys_calls_are_tool_calls(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "u"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "a"},
    ]
    (sample,) = read_samples(write_jsonl(tmp_path / "data.jsonl", [{"conversations": turns}]))
    assert isinstance(sample, Sample)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert sample.messages == (
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        ASSISTANT,
    )
    with pytest.raises(BadRecord, match=r"^conversations\[1\]\.value is not valid JSON"):
        messages_of([turns[0], turns[1] | {"value": "add(1)"}], "conversations")


def test_names_are_spelled_as_yaml_reads_them() -> None:
    for name in ("a b (c)", "a: b", "true", "1", "#", "it's", '"', " a"):
        assert fields_of(in_words({"prompt": name})) == {"prompt": name}


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_tables_of_spreadsheets_are_read_whatever_stands_between_their_cells(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text(f'prompt{separator}completion\n"1,5 + {separator} 1"{separator}"2\n"\n', encoding="utf-8")
    (sample,) = read_samples(path)
    assert isinstance(sample, Sample)
    assert sample.messages is not None
    assert [message["content"] for message in sample.messages] == [f"1,5 + {separator} 1", "2\n"]
