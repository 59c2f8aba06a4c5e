"""The page and the JSON schema of all keys are those of the configuration that is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from hecate.cli import app
from hecate.cli.arguments import complete_config, complete_override
from hecate.config import reference
from hecate.config.files.presets import run_presets
from hecate.config.schema import LEAVES
from tests.rooms import ROOT


def test_the_page_is_the_schemas() -> None:
    """If this fails: hecate schema --page > docs/use/configuration.md."""
    assert (ROOT / "docs" / "use" / "configuration.md").read_text(encoding="utf-8") == reference.page()


def test_every_key_has_a_meaning() -> None:
    assert set(LEAVES) <= set(reference.meanings())


@pytest.mark.parametrize("path", [*run_presets().values()], ids=lambda path: path.stem)
def test_every_preset_is_valid(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), reference.json_schema())


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        ({"lora": {"r": 8}}, True),
        ({"lora": {"r": [8, 4]}}, True),
        ({"lora": {"r": 0}}, False),
        ({"lora": {"r": [8, 0]}}, False),
        ({"lora": {"rank": 8}}, False),
        ({"lora": {"alpha": None}}, True),
        ({"max_steps": "${save_steps}"}, True),
        ({"max_steps": "many"}, False),
        ({"data": {"train": "a.jsonl"}}, True),
        ({"data": {"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}]}}, True),
        ({"data": {"train": [{"name": "b"}]}}, False),
        ({"moe": {"family": "mixlora", "router": {"score": "sigmoid"}}}, True),
        ({"moe": {"router": {"score": "tanh"}}}, False),
        ({"adam_beta1": 1.0}, False),
    ],
)
def test_the_schema_accepts_what_may_be_written(value: dict[str, Any], valid: bool) -> None:
    assert jsonschema.Draft202012Validator(reference.json_schema()).is_valid(value) is valid


def test_the_verb_prints_the_schema() -> None:
    assert json.loads(CliRunner().invoke(app, ["schema"]).output) == json.loads(json.dumps(reference.json_schema()))
    assert CliRunner().invoke(app, ["schema", "--page"]).output == reference.page()


def test_a_shell_completes_keys_and_their_named_values() -> None:
    assert complete_override("lora.sh") == ["lora.shards.equivalent_rank=", "lora.shards.per_vector=", "lora.shards.private_rank="]
    assert complete_override("lora.pairs=f") == ["lora.pairs=fixed_a"]
    assert complete_override("nonsense=") == []
    assert complete_config("mol") == ["mola"]
