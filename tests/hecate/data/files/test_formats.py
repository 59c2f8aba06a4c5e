import json
from pathlib import Path
from typing import Any

import pytest

from hecate.config.schema import FieldNames
from hecate.data.files.formats import Fault, Sample, read_samples
from hecate.errors import UserError
from tests.hecate.data.making import write_jsonl
from tests.hecate.data.talks import ASSISTANT, SYSTEM, USER


def read(tmp_path: Path, records: list[Any], format: str = "auto") -> list[Sample | Fault]:
    return list(read_samples(write_jsonl(tmp_path / "data.jsonl", records), format))


@pytest.mark.parametrize(
    ("record", "messages", "extra"),
    [
        ({"messages": [USER, ASSISTANT], "id": 7}, [USER, ASSISTANT], {"id": 7}),
        ({"messages": [USER, {**ASSISTANT, "name": "x"}]}, [USER, {**ASSISTANT, "name": "x"}], {}),
        ({"instruction": "u", "output": "a"}, [USER, ASSISTANT], {}),
        ({"instruction": "u", "input": "", "output": "a"}, [USER, ASSISTANT], {}),
        ({"instruction": "u", "output": "a", "history": [["u", "a"]], "system": "s"}, [SYSTEM, USER, ASSISTANT, USER, ASSISTANT], {}),
        ({"instruction": "u", "output": "a", "history": ""}, [USER, ASSISTANT], {}),
        (
            {"instruction": "Add", "input": "1 2", "output": "3", "system": "s", "answer": 3},
            [SYSTEM, {"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}],
            {"answer": 3},
        ),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a", "weight": None}]},
            [USER, ASSISTANT],
            {},
        ),
        (
            {"system": "s", "conversations": [{"from": "user", "value": "u"}, {"from": "assistant", "value": "a"}]},
            [SYSTEM, USER, ASSISTANT],
            {},
        ),
        ({"system": "s", "messages": [USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT], {}),
    ],
)
def test_chat_formats_become_messages(tmp_path: Path, record: Any, messages: Any, extra: Any) -> None:
    (sample,) = read(tmp_path, [record])
    assert isinstance(sample, Sample)
    assert sample == Sample(str(tmp_path / "data.jsonl"), 1, messages=tuple(messages), extra=extra)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [USER, ASSISTANT], "images": ["x.png"]}, "the record has an image (key 'images'), and hecate reads text only"),
        (
            {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}], "image": "x.png"},
            "the record has an image (key 'image'), and hecate reads text only",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]}, "messages[0].content is a list of parts, of"),
    ],
)
def test_images_are_not_left_out_in_silence(tmp_path: Path, record: Any, reason: str) -> None:
    first, fault = read(tmp_path, [{"messages": [USER, ASSISTANT], "images": []}, record])
    assert isinstance(first, Sample)
    assert isinstance(fault, Fault)
    assert fault.reason.startswith(reason)


def test_prompt_and_completion_are_a_question_and_its_answer(tmp_path: Path) -> None:
    first, second = read(
        tmp_path,
        [
            {"prompt": "u", "completion": "a", "system": "s", "id": 1},
            {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
        ],
    )
    name = str(tmp_path / "data.jsonl")
    assert first == Sample(name, 1, messages=(SYSTEM, USER, ASSISTANT), given=2, extra={"id": 1})
    assert second == Sample(name, 2, messages=(USER, ASSISTANT, USER, ASSISTANT), given=3)


def test_fields_give_the_records_names_for_the_formats_keys(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"completion": "u", "prompt": "a", "n": 1}, {"completion": "u"}])
    swapped = FieldNames(prompt="completion", completion="prompt")
    sample, fault = read_samples(path, names=swapped)
    assert sample == Sample(str(path), 1, messages=(USER, ASSISTANT), given=1, extra={"n": 1})
    assert isinstance(fault, Fault)
    assert fault.reason == "the record has no such key: data.*.fields.completion says 'prompt' (its keys: completion)"


def test_fields_decide_which_format_auto_takes(tmp_path: Path) -> None:
    """As of tatsu-lab/alpaca, whose column `text` holds the other three once more."""
    path = write_jsonl(tmp_path / "data.jsonl", [{"instruction": "u", "input": "", "output": "a", "text": "u and a"}])
    (sample,) = read_samples(path, names=FieldNames(prompt="instruction", completion="output"))
    assert sample == Sample(str(path), 1, messages=(USER, ASSISTANT), given=1, extra={"input": "", "text": "u and a"})
    with pytest.raises(UserError, match=r"those that read the keys that fields names: prompt_completion \{prompt, completion\}\n"):
        list(read_samples(path, names=FieldNames(prompt="instruction")))


@pytest.mark.parametrize(
    ("format", "names", "told"),
    [
        ("auto", {"messages": "a", "prompt": "b"}, r"fields names messages, prompt, but no data format reads all of these keys\n"),
        ("text", {"prompt": "a"}, r"fields names prompt, which the format text does not read\n.* another format: prompt_completion"),
        ("alpaca", {"user": "a", "text": "b"}, r"fields names text, which the format alpaca does not read\n"),
    ],
)
def test_fields_that_the_format_does_not_read_are_refused(tmp_path: Path, format: str, names: dict[str, str], told: str) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"a": "u", "b": "a", "instruction": "u", "output": "a", "text": "t"}])
    with pytest.raises(UserError, match=rf"data\.jsonl: {told}") as caught:
        list(read_samples(path, format, names=FieldNames(**names)))
    assert len(str(caught.value).splitlines()) <= 8


def test_a_record_may_lack_what_fields_says_of_an_optional_key(tmp_path: Path) -> None:
    """Rows of Parquet and Arrow files lack what is null in them."""
    records = [{"instruction": "u", "output": "a"} | more for more in ({}, {"more": None}, {"more": "v", "input": "not read"})]
    path = write_jsonl(tmp_path / "data.jsonl", records)
    samples = list(read_samples(path, names=FieldNames(input="more")))
    asked = [sample.messages[0]["content"] for sample in samples if isinstance(sample, Sample) and sample.messages]
    assert asked == ["u", "u", "u\n\nv"]
    with pytest.raises(UserError, match=r"data\.jsonl: none of its records has the key 'mroe', which fields gives for input\n"):
        list(read_samples(path, names=FieldNames(input="mroe")))


CALL = {"function": {"name": "add", "arguments": {"a": 1}}}


def test_tool_calls_go_to_the_template_as_objects(tmp_path: Path) -> None:
    spelled = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [spelled]}]
    result = {"role": "tool", "content": "1", "tool_call_id": "1", "name": "add"}
    for tools in ([CALL], json.dumps([CALL])):
        (sample,) = read(tmp_path, [{"messages": [*turns, result], "tools": tools}])
        call = {"type": "function", "function": CALL["function"], "id": "1"}
        messages = (USER, {"role": "assistant", "content": "", "tool_calls": [call]}, result)
        assert sample == Sample(str(tmp_path / "data.jsonl"), 1, messages=messages, tools=(CALL,))


def test_tools_beside_conversations_may_be_bare_functions(tmp_path: Path) -> None:
    """As LLaMA-Factory has them."""
    turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    (sample,) = read(tmp_path, [{"conversations": turns, "tools": '[{"name": "add"}]'}])
    wrapped = {"type": "function", "function": {"name": "add"}}
    assert sample == Sample(str(tmp_path / "data.jsonl"), 1, messages=(USER, ASSISTANT), tools=(wrapped,))


def test_text(tmp_path: Path) -> None:
    (sample,) = read(tmp_path, [{"text": "Größe\n🙂", "url": "x"}])
    assert sample == Sample(str(tmp_path / "data.jsonl"), 1, text="Größe\n🙂", extra={"url": "x"})


def test_file_may_start_with_a_byte_order_mark_have_crlf_and_lack_the_last_line_end(tmp_path: Path) -> None:
    samples = read(tmp_path, [b'\xef\xbb\xbf{"text": "a"}\r\n', b'{"text": "b"}'])
    assert [sample.text for sample in samples if isinstance(sample, Sample)] == ["a", "b"]


GOOD = b'{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}\n'
TURN = b'{"role": "assistant", "content": "a"%s}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\n", "empty"),
        (b"{]\n", "not valid JSON"),
        (b'{"messages": [{"role": "us', "cut off"),
        (b'{"messages": "\xff"}\n', "not UTF-8 at byte 14"),
        (b"[1]\n", "a JSON list where an object is needed"),
        (b"null\n", "a JSON null where an object is needed"),
        (b"[" * 100_000 + b"\n", "nested too deeply"),
        (b'{"messages": [], "n": ' + b"9" * 5000 + b"}\n", "not valid JSON"),
        (b'{"text": "t"}\n', "no 'messages' in the record"),
        (b'{"messages": []}\n', "at least one turn"),
        (b'{"messages": {}}\n', "must be a list"),
        (b'{"messages": ["hello"]}\n', r"messages\[0\] is a JSON string"),
        (b'{"messages": [{"content": "u"}]}\n', r"messages\[0\].role is missing"),
        (b'{"messages": [{"role": "Assistant", "content": "u"}]}\n', "role is 'Assistant'"),
        (b'{"messages": [{"role": "user", "content": null}]}\n', r"messages\[0\].content is a JSON null"),
        (b'{"messages": [{"role": "user", "content": [1]}]}\n', "content is a list of parts"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}\n', "lone surrogate"),
        (b'{"messages": [' + TURN % b', "function_call": {"name": "f"}' + b"]}\n", "function_call is not supported"),
        (b'{"messages": [' + TURN % b', "tool_calls": [1]' + b"]}\n", r"messages\[0\].tool_calls\[0\] is no call"),
        (b'{"messages": [' + TURN % b', "tool_calls": [{"name": "f", "arguments": "{"}]' + b"]}\n", "arguments are not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "u", "tool_calls": [{}]}]}\n', "only the assistant calls tools"),
        (b'{"messages": [{"role": "user", "content": "u"}], "tools": "[1"}\n', "tools is text that is not valid JSON"),
        (b'{"messages": [' + TURN % b', "weight": 0.5' + b"]}\n", "weight is '0.5': it must be 0 or 1"),
        (b'{"messages": [' + TURN % b', "weight": 1, "train": false' + b"]}\n", "train and weight contradict each other"),
        (b'{"messages": [' + TURN % b', "train_detail": [{}]' + b"]}\n", "train_detail is not supported: a turn is learned as a whole"),
        (b'{"messages": [{"role": "user", "content": "u", "loss": true}]}\n', "loss is about answers, and this turn is none"),
        (b'{"messages": [{"role": "user", "content": [{"text": "u", "cache_control": 1}]}]}\n', "has the key 'cache_control'"),
    ],
)
def test_bad_line_is_a_fault_in_its_place(tmp_path: Path, line: bytes, reason: str) -> None:
    first, fault, *rest = read(tmp_path, [GOOD, line] + ([GOOD] if line.endswith(b"\n") else []))
    assert isinstance(first, Sample)
    assert all(isinstance(sample, Sample) and sample.line == 3 for sample in rest)
    assert isinstance(fault, Fault)
    assert (fault.file, fault.line) == (str(tmp_path / "data.jsonl"), 2)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(fault.reason)


@pytest.mark.parametrize(
    ("record", "format", "reason"),
    [
        ({"instruction": "x"}, "alpaca", "output is missing"),
        ({"instruction": "x", "output": 3}, "alpaca", "output is a JSON number"),
        ({"instruction": "x", "output": "y", "history": ["u", "a"]}, "alpaca", "history must be a list of pairs [instruction, answer]"),
        ({"prompt": "u", "completion": "a", "label": False}, "prompt_completion", "label is false: the answer is marked as a bad one"),
        ({"messages": [USER, ASSISTANT], "kto_tag": "False"}, "messages", "kto_tag is false: the answer is marked as a bad one"),
        ({"prompt": "u", "completion": "a", "rejected": "b"}, "auto", "the record has the key 'rejected'"),
        ({"messages": [USER, {**ASSISTANT, "train": "no"}]}, "auto", "messages[1].train is 'no': it must be true or false"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "sharegpt", "from is 'bing'"),
        ({"conversations": [{"from": "gpt"}]}, "sharegpt", "value is missing"),
        ({"text": True}, "text", "text is a JSON boolean"),
        ({"system": "t", "messages": [SYSTEM, USER, ASSISTANT]}, "messages", "a system message among its turns, too"),
        ({"system": "t", "prompt": [SYSTEM, USER], "completion": "a"}, "prompt_completion", "a system message among its turns, too"),
        ({"system": "t", "conversations": [{"from": "system", "value": "s"}]}, "sharegpt", "a system message among its turns, too"),
    ],
)
def test_fault_of_the_other_formats(tmp_path: Path, record: Any, format: str, reason: str) -> None:
    (fault,) = read(tmp_path, [record], format)
    assert isinstance(fault, Fault)
    assert reason in fault.reason


def test_auto_looks_past_broken_lines_and_then_keeps_to_one_format(tmp_path: Path) -> None:
    kinds = [type(item) for item in read(tmp_path, [b"broken\n", {"text": "a"}, {"messages": [USER]}])]
    assert kinds == [Fault, Sample, Fault]
    first, second, sample = read(tmp_path, [{"id": 1}, {"instruction": "no answer"}, {"instruction": "u", "output": "a"}])
    assert isinstance(first, Fault)
    assert (first.line, first.reason) == (1, "no known data format has the keys id")
    assert isinstance(second, Fault)
    assert second.line == 2
    assert isinstance(sample, Sample)


def test_unusable_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.jsonl:1: no known data format has the keys body, title"):
        read(tmp_path, [{"title": "t", "body": "b"}])
    with pytest.raises(UserError, match=r"or say which keys they are: \{path: \.\.\., fields: \{prompt: Frage, completion: Antwort"):
        read(tmp_path, [{"Frage": "t", "Antwort": "b"}])
    with pytest.raises(UserError, match="is empty"):
        read(tmp_path, [])
    with pytest.raises(UserError, match=r"nowhere.jsonl cannot be read: No such file"):
        list(read_samples(tmp_path / "nowhere.jsonl"))
    with pytest.raises(UserError, match="format 'csv' is unknown"):
        list(read_samples(tmp_path / "data.jsonl", "csv"))
