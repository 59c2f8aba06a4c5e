"""A copy of a model has the same digest in another place; another model has another one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hecate.errors import UserError
from hecate.model.files.load import ModelSource
from hecate.model.files.model_digest import model_digest
from testing.tiny_run import save_random_llama

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_a_copy_is_the_same_model_and_a_changed_weight_or_configuration_another(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    save_random_llama(here, **SIZES)
    shutil.copytree(here, there)
    digest = model_digest(ModelSource(here, None))
    (there / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    assert model_digest(ModelSource(there, None)) == digest
    weights = there / "model.safetensors"
    with open(weights, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert model_digest(ModelSource(there, None)) != digest
    shutil.copy(here / "model.safetensors", weights)
    (there / "config.json").write_text((there / "config.json").read_text().replace("1e-06", "1e-05"), encoding="utf-8")
    assert model_digest(ModelSource(there, None)) != digest


def test_of_a_large_file_a_part_is_read_from_every_region(tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    content = bytearray(8 << 20)
    first.write_bytes(content)
    shutil.copy(first, second)
    assert model_digest(ModelSource(tmp_path, "b.gguf")) == model_digest(ModelSource(tmp_path, "a.gguf"))
    changed = content.copy()
    changed[3 << 20 : 4 << 20] = b"\x01" * (1 << 20)
    for other in (bytes(changed), bytes(content[:-1])):
        second.write_bytes(other)
        assert model_digest(ModelSource(tmp_path, "b.gguf")) != model_digest(ModelSource(tmp_path, "a.gguf"))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.gguf"):
        model_digest(ModelSource(tmp_path, "gone.gguf"))
