"""LLaMA-Factory's dataset_info.json says where data sets are and what their columns are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hecate.config.files.dataset_info import dataset_info_source
from hecate.config.schema import FieldNames
from hecate.data.files.formats import Sample, read_samples
from hecate.errors import UserError

OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
ANSWER = [("user", "u"), ("assistant", "a")]


def described(folder: Path, entry: Any, **more: Any) -> dict[str, Any]:
    (folder / "dataset_info.json").write_text(json.dumps({"identity": {"file_name": "i.json"}, "mine": entry}))
    return dataset_info_source({"path": f"{folder}/dataset_info.json:mine"} | more, must_exist=True)


@pytest.mark.parametrize(
    ("entry", "record", "turns"),
    [
        ({}, {"instruction": "u", "input": "", "output": "a"}, ANSWER),
        (
            {"columns": {"prompt": "q", "query": "more", "response": "r", "system": "s", "history": "h"}},
            {"q": "u", "more": "", "r": "a", "s": "be kind", "h": [["x", "y"]]},
            [("system", "be kind"), ("user", "x"), ("assistant", "y"), *ANSWER],
        ),
        ({"columns": {"prompt": "content"}}, {"content": "all of this"}, None),
        ({"formatting": "sharegpt"}, {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, ANSWER),
        (
            {"formatting": "sharegpt", "columns": {"messages": "chat"}, "tags": OPENAI_TAGS},
            {"chat": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            ANSWER,
        ),
        (
            {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": OPENAI_TAGS},
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            ANSWER,
        ),
    ],
)
def test_a_described_data_set_is_read(tmp_path: Path, entry: dict[str, Any], record: dict[str, Any], turns: Any) -> None:
    (tmp_path / "d.json").write_text(json.dumps([record]))
    source = described(tmp_path, {"file_name": "d.json"} | entry)
    assert (source["path"], source["name"]) == (f"{tmp_path}/d.json", "mine")
    names = source.get("fields")
    (sample,) = read_samples(source["path"], source["format"], None, FieldNames(**names) if names else None)
    assert isinstance(sample, Sample)
    if turns is None:
        assert sample.text == "all of this"
    else:
        assert [(message["role"], message["content"]) for message in sample.messages or ()] == turns


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"file_name": "d", "ranking": True}, "hecate does not read its key ranking"),
        ({"script_url": "x"}, "hecate does not read its key script_url"),
        ({"file_name": "d", "num_samples": 5}, "hecate does not read its key num_samples"),
        ({"file_name": "d", "split": "test"}, "hecate does not read its key split"),
        ({"file_name": "d", "columns": {"images": "pictures"}}, "its records have images"),
        ({"file_name": "d", "columns": {"kto_tag": "good"}}, r"its column good says which answers are bad ones \(kto_tag\)"),
        (
            {"file_name": "d", "formatting": "sharegpt", "tags": {"user_tag": "USER"}},
            "its user_tag is USER, and hecate reads human or user",
        ),
        ({"file_name": "d", "formatting": "other"}, "its formatting other is not known"),
        ({"ms_hub_url": "x/y"}, "neither file_name nor hf_hub_url says where it is"),
        ([], "it is described by no object"),
    ],
)
def test_what_cannot_be_trained_on_is_said_with_its_name(tmp_path: Path, entry: Any, told: str) -> None:
    with pytest.raises(UserError, match=rf"dataset_info\.json: the data set mine cannot be trained on: {told}"):
        described(tmp_path, entry)


def test_names_files_and_what_the_source_says_itself(tmp_path: Path) -> None:
    assert described(tmp_path, {"hf_hub_url": "o/n", "file_name": "d"}, name="own", weight=2.0) == {
        "path": "o/n",
        "name": "own",
        "weight": 2.0,
        "format": "alpaca",
        "fields": None,
    }
    with pytest.raises(UserError, match=r"has no data set mien\n.*mine"):
        dataset_info_source({"path": f"{tmp_path}/dataset_info.json:mien"}, must_exist=True)
    with pytest.raises(UserError, match=r"none is named\nwrite .*dataset_info\.json:NAME; it has identity, mine"):
        dataset_info_source({"path": f"{tmp_path}/dataset_info.json"}, must_exist=True)
    gone = {"path": f"{tmp_path}/gone/dataset_info.json:a"}
    assert dataset_info_source(gone, must_exist=False) == gone
    with pytest.raises(UserError, match="cannot be read: No such file"):
        dataset_info_source(gone, must_exist=True)
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset_info\.json cannot be read"):
        dataset_info_source({"path": f"{tmp_path}/dataset_info.json:a"}, must_exist=True)
