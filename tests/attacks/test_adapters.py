"""An adapter of somebody else is taken or refused by its name; it runs no code, opens no other file and takes no endless time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hecate.adapters.folder import save_adapter
from hecate.adapters.peft.description import LoraDescription
from hecate.apps.answers.opened import load_trained
from hecate.model.base import BaseChoice
from hecate.ranks.ranks import Ranks
from testing.tiny_run import make_workshop
from tests.attacks.watching import HARMLESS, PLACES, REFUSED, outcome

DESCRIPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "as it was": ({}, HARMLESS),
    "a rank of millions": ({"r": 4_000_000}, REFUSED),
    "a rank of 10^30": ({"r": 10**30}, REFUSED),
    "no rank": ({"r": 0}, REFUSED),
    "a negative rank": ({"r": -2}, REFUSED),
    "a rank that is null": ({"r": None}, REFUSED),
    "a rank that is text": ({"r": "2"}, REFUSED),
    "a rank that is a list": ({"r": [2]}, REFUSED),
    "a rank that is true": ({"r": True}, REFUSED),
    "an alpha that is no number": ({"lora_alpha": float("nan")}, REFUSED),
    "an endless alpha": ({"lora_alpha": float("inf")}, REFUSED),
    "an alpha that is a list": ({"lora_alpha": []}, REFUSED),
    "no targets": ({"target_modules": []}, REFUSED),
    "targets that are null": ({"target_modules": None}, REFUSED),
    "a target that leads up": ({"target_modules": ["../../q_proj"]}, REFUSED),
    "a target that is a number": ({"target_modules": [7]}, REFUSED),
    "targets that are nested": ({"target_modules": [["q_proj"]]}, REFUSED),
    "a pattern that takes years": ({"target_modules": "(([a-z0-9._])+)+!"}, REFUSED),
    "a pattern of ranks that takes years": ({"rank_pattern": {"(([a-z0-9._])+)+!": 2}}, REFUSED),
    "a million targets": ({"target_modules": [f"x{number}" for number in range(10**5)]}, REFUSED),
    "another kind": ({"peft_type": "IA3"}, REFUSED),
    "a kind that is a list": ({"peft_type": ["LORA"]}, REFUSED),
    "no kind": ({"peft_type": None}, REFUSED),
    "code that makes the model": ({"auto_mapping": {"base_model_class": "os.system", "parent_library": "os"}}, HARMLESS),
    "DoRA": ({"use_dora": True}, REFUSED),
    "biases": ({"bias": "all"}, REFUSED),
    "saved modules of which it holds none": ({"modules_to_save": ["lm_head"]}, HARMLESS),
    "other rows": ({"trainable_token_indices": [1]}, REFUSED),
    "some layers": ({"layers_to_transform": [0]}, REFUSED),
    "turned weights": ({"fan_in_fan_out": True}, REFUSED),
    "a base that is not there": ({"base_model_name_or_path": "somebody/model"}, REFUSED),
    "a base on the network": ({"base_model_name_or_path": "https://example.org/model"}, REFUSED),
    "a base that is a device": ({"base_model_name_or_path": "/dev/zero"}, REFUSED),
    "a base that is null": ({"base_model_name_or_path": None}, REFUSED),
    "a base that is a number": ({"base_model_name_or_path": 7}, REFUSED),
    "a base with a zero byte": ({"base_model_name_or_path": "a\0b"}, REFUSED),
    "a base from the environment": ({"base_model_name_or_path": "${oc.env:HOME}"}, REFUSED),
    "a base that is itself": ({"base_model_name_or_path": "{adapter}"}, REFUSED),
    "hecate's part that is a list": ({"hecate": ["x"]}, REFUSED),
    "hecate's extra that is text": ({"hecate": {"extra": "x"}}, REFUSED),
}
CONTENTS = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "a number": b"7",
    "cut": b'{"r": 2',
    "nested 100,000 times": b"[" * 100_000,
    "a zero byte": b"\0",
    "half a character": b'{"peft_type": "\xff"}',
    "a name given twice": b'{"peft_type": "LORA", "peft_type": "IA3"}',
    "a number without end": b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}",
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 2 over the queries of the tiny Llama."""
    workshop = make_workshop(tmp_path_factory.mktemp("workshop"))
    at = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    pairs = {at.format(layer, matrix): torch.ones(shape) for layer in (0, 1) for matrix, shape in (("A", (2, 32)), ("B", (32, 2)))}
    config = LoraDescription(
        base_model_name_or_path=str(workshop / "model"), r=2, alpha=4, use_rslora=False, target_modules=("q_proj",), target_parameters=()
    )
    save_adapter(workshop / "adapter", pairs, config)
    return workshop / "adapter"


@pytest.fixture
def adapter(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "attacked")
    return tmp_path / "attacked"


def take(adapter: Path, ranks: Ranks) -> object:
    return load_trained(adapter, ranks, BaseChoice())


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description(adapter: Path, ranks: Ranks, name: str) -> None:
    values, wanted = DESCRIPTIONS[name]
    values = {key: str(adapter) if value == "{adapter}" else value for key, value in values.items()}
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | values), encoding="utf-8")
    assert outcome(lambda: take(adapter, ranks), adapter) == wanted


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_no_description(adapter: Path, ranks: Ranks, name: str) -> None:
    (adapter / "adapter_config.json").write_bytes(CONTENTS[name])
    assert outcome(lambda: take(adapter, ranks), adapter) == REFUSED


A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{one}.weight" for one in "AB")
TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "as they were": ({}, HARMLESS),
    "not numbers": ({A: torch.full((2, 32), float("nan"))}, REFUSED),
    "endless": ({B: torch.full((32, 2), float("inf"))}, REFUSED),
    "whole numbers": ({A: torch.ones(2, 32, dtype=torch.int32)}, REFUSED),
    "bytes": ({A: torch.ones(2, 32, dtype=torch.uint8)}, REFUSED),
    "numbers of 8 bits": ({A: torch.ones(2, 32).to(torch.float8_e4m3fn)}, REFUSED),
    "complex": ({A: torch.ones(2, 32, dtype=torch.complex64)}, REFUSED),
    "another rank": ({A: torch.ones(3, 32)}, REFUSED),
    "another width": ({A: torch.ones(2, 33)}, REFUSED),
    "no rows": ({A: torch.ones(0, 32)}, REFUSED),
    "more axes": ({A: torch.ones(2, 32, 1)}, REFUSED),
    "a scalar": ({A: torch.ones(())}, REFUSED),
    "one missing": ({A: None}, REFUSED),
    "all missing": (dict.fromkeys([A, B, A.replace("layers.0", "layers.1"), B.replace("layers.0", "layers.1")]), REFUSED),
    "of a layer that there is not": ({A.replace("layers.0", "layers.9"): torch.ones(2, 32)}, REFUSED),
    "of the layer 10^18": ({A.replace("layers.0", f"layers.{10**18}"): torch.ones(2, 32)}, REFUSED),
    "of a name that leads up": ({"../../x": torch.ones(1)}, REFUSED),
    "of a name that a terminal obeys": ({"\x1b]0;owned\x07": torch.ones(1)}, REFUSED),
    "of a head": ({"base_model.model.lm_head.weight": torch.ones(258, 32)}, REFUSED),
    "of the base model": ({"model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32)}, REFUSED),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(adapter: Path, ranks: Ranks, name: str) -> None:
    changes, wanted = TENSORS[name]
    file = adapter / "adapter_model.safetensors"
    tensors = {key: value for key, value in (load_file(file) | changes).items() if value is not None}
    save_file(tensors, file)
    assert outcome(lambda: take(adapter, ranks), adapter) == wanted


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("what", PLACES)
def test_what_stands_in_a_files_place(adapter: Path, ranks: Ranks, name: str, what: str) -> None:
    (adapter / name).unlink()
    PLACES[what](adapter / name)
    assert outcome(lambda: take(adapter, ranks), adapter) == REFUSED
