"""A LoRA merged into its base model, whatever layout that has: transformers computes with the result what PEFT computes with both."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hecate.adapters.formats.merged import add_files_of, changes_of, write_merged
from hecate.adapters.model_files import save_config, write_model
from hecate.adapters.peft.description import LoraDescription, linear_names
from hecate.adapters.peft.reading import load_lora
from hecate.checkpoint.layout import TensorEntry
from hecate.errors import UserError
from hecate.model.files.load import ModelSource, resolve_model
from hecate.model.files.stored_model import StoredModel, open_stored
from testing.byte_tokenizer import build_byte_tokenizer
from tests.hecate.adapters.exporting import (
    LIMIT,
    export,
    hecate_logits,
    save_dense,
    save_moe,
    save_peft,
    transformers_logits,
    with_router,
)


def test_a_lora_merged_into_a_dense_model(tmp_path: Path) -> None:
    """In several files, of which it keeps the names; nothing else changes."""
    model = tmp_path / "model"
    save_dense("qwen2", tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float64).save_pretrained(model, max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    adapter, wanted = save_peft(tmp_path / "adapter", model, ["q_proj", "down_proj"], experts=False)
    out = export(adapter, "merged", tmp_path / "out")
    torch.testing.assert_close(transformers_logits(out), wanted, **LIMIT)
    torch.testing.assert_close(hecate_logits(out), hecate_logits(adapter), **LIMIT)
    assert {path.name for path in out.iterdir()} == {"README.md", *(path.name for path in model.iterdir())}
    before, after = (open_stored(resolve_model(str(folder))) for folder in (model, out))
    assert {name: one.file for name, one in before.weights.items()} == {name: one.file for name, one in after.weights.items()}
    for name in before.weights:
        adapted = name.endswith(("q_proj.weight", "down_proj.weight"))
        assert torch.equal(before.read(name), after.read(name)) != adapted, name


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "olmoe"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_lora_merged_into_an_moe_model(tmp_path: Path, kind: str, fused: bool) -> None:
    model = save_moe(kind, tmp_path / "model")
    adapter, wanted = save_peft(tmp_path / "adapter", model, ["q_proj"])
    if fused:  # as transformers 5 holds them
        held = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        save_file({name: one.detach().clone() for name, one in held.named_parameters()}, model / "model.safetensors")
    out = export(adapter, "merged", tmp_path / "out")
    torch.testing.assert_close(transformers_logits(out), wanted, **LIMIT)


def test_trained_routers_are_merged(tmp_path: Path) -> None:
    adapter, without = save_peft(tmp_path / "adapter", save_moe("mixtral", tmp_path / "model"), ["q_proj"])
    with_router(adapter)
    logits = transformers_logits(export(adapter, "merged", tmp_path / "out"))
    torch.testing.assert_close(logits, hecate_logits(adapter), **LIMIT)
    assert not torch.allclose(logits, without, atol=1e-2)


def test_a_base_with_other_experts_is_refused(tmp_path: Path) -> None:
    """Its experts and routers have their places by layer and number, so that a shape alone does not tell them apart."""
    model = save_moe("qwen3_moe", tmp_path / "model")
    adapter, _ = save_peft(tmp_path / "adapter", model, [])
    base = open_stored(resolve_model(str(model)))
    fewer = {name: one for name, one in base.weights.items() if ".experts.4." not in name}
    with pytest.raises(UserError, match=r"has pairs for .*_proj of layer 0 of 5 experts, but the base model has 4"):
        changes_of(replace(base, weights=fewer), *load_lora(adapter))
    name = "layers.1.mlp.experts.2.up_proj.weight"
    with pytest.raises(UserError, match=f"which of two weights of layer 1 it is: model.{name}, mtp.{name}"):
        changes_of(replace(base, weights={**base.weights, f"mtp.{name}": base.weights[f"model.{name}"]}), *load_lora(adapter))


def test_what_bfloat16_cannot_hold_is_said(tmp_path: Path) -> None:
    model = save_dense("llama", tmp_path / "model", torch.bfloat16)
    tensors = {}
    for layer in range(3):
        name_a, name_b = linear_names(f"model.layers.{layer}.self_attn.q_proj")
        tensors[name_a], tensors[name_b] = torch.ones(1, 16), torch.full((16, 1), 1e-9 if layer else 1.0)
    values: dict[str, Any] = {"base_model_name_or_path": str(model), "r": 1, "alpha": 1, "use_rslora": False}
    config = LoraDescription(**values, target_modules=("q_proj",), target_parameters=())
    notes = write_merged(tmp_path / "out", open_stored(resolve_model(str(model))), tensors, config)
    assert notes[0] == "1 of 3 adapted weights differ from the base model's"
    assert "less than their type can hold" in notes[1]
    assert {one.dtype for one in open_stored(resolve_model(str(tmp_path / "out"))).weights.values()} == {torch.bfloat16}


def test_a_model_that_cannot_be_read_to_its_end_leaves_nothing(tmp_path: Path) -> None:
    entry = TensorEntry("model.safetensors", "F32", (2,), digest="")

    def fetch(name: str) -> Tensor:
        if name == "b":
            raise UserError("b cannot be read")
        return torch.zeros(2)

    with pytest.raises(UserError, match="b cannot be read"):
        write_model(tmp_path / "out", {"a": entry, "b": entry}, fetch, lambda _: None)
    assert not list(tmp_path.iterdir())
    write_model(tmp_path / "out", {"a": entry}, fetch, lambda _: None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    model = save_dense("llama", tmp_path / "model")
    file = model / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(UserError, match=r"model.norm.weight is stored as F8_E4M3: quantised models cannot be changed"):
        open_stored(resolve_model(str(model)))


ROPE_OF_4: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
    (
        "llama",
        {"rope_type": "linear", "rope_theta": 7e3, "factor": 2.0},
        {"rope_theta": 7e3, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    ("stablelm", {"rope_theta": 9e3, "partial_rotary_factor": 0.5}, {"rope_theta": 9e3, "partial_rotary_factor": 0.5}),
    (
        "gemma3_text",
        {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}, "sliding_attention": {"rope_theta": 2e4}},
        {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
]


@pytest.mark.parametrize(("kind", "rope", "wanted"), ROPE_OF_4, ids=["default", "scaled", "partial", "two bases"])
def test_rotary_positions_are_written_for_version_4_too(tmp_path: Path, kind: str, rope: Any, wanted: dict[str, Any]) -> None:
    config = AutoConfig.for_model(kind, rope_parameters=rope)
    before = copy.deepcopy(config.rope_parameters)
    save_config(config, tmp_path)
    value = json.loads((tmp_path / "config.json").read_text())
    keys = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")
    assert {key: value[key] for key in keys if key in value} == wanted
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == before, "version 5 reads something else"


def test_a_model_merged_from_a_gguf_file_says_its_rotary_base_to_version_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hecate.model.files.load.load_tokenizer", lambda source: build_byte_tokenizer())
    config = AutoConfig.for_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    base = StoredModel(ModelSource(tmp_path, "model.gguf"), config, {}, lambda name: torch.zeros(1))
    add_files_of(base, tmp_path, b"card")
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 5e5


def beside_weights(folder: Path, out: Path) -> tuple[list[str], list[str]]:
    """What is written of a base model's folder, without the card, and what is said of it."""
    out.mkdir()
    base = StoredModel(ModelSource(folder, None), AutoConfig.for_model("llama"), {}, lambda name: torch.zeros(1))
    said = add_files_of(base, out, b"card")
    return sorted({path.name for path in out.iterdir()} - {"README.md"}), said


def test_what_lies_beside_weights_and_is_no_part_of_a_model_is_not_published(tmp_path: Path) -> None:
    model, secret = tmp_path / "model", tmp_path / "id_rsa"
    model.mkdir()
    secret.write_text("-----BEGIN OPENSSH PRIVATE KEY-----", encoding="utf-8")
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "LICENSE.txt",
        "model.safetensors",
        ".env",
        "notes.txt",
        "modeling_x.py",
    ):
        (model / name).write_text(name, encoding="utf-8")
    (model / "key.txt").symlink_to(secret)
    (model / "vocab.json").symlink_to("tokenizer.json")
    written, said = beside_weights(model, tmp_path / "out")
    assert written == ["LICENSE.txt", "config.json", "tokenizer.json", "tokenizer.model", "vocab.json"]
    assert said == ["3 files beside the base model's weights are not copied, such as key.txt, modeling_x.py, notes.txt"]
    assert not (tmp_path / "out" / "vocab.json").is_symlink()


@pytest.mark.parametrize("kind", ["link", "link over a folder", "pipe", "device", "large"])
def test_what_stands_in_the_place_of_a_models_file_is_not_published(tmp_path: Path, kind: str) -> None:
    model, secret = tmp_path / "model", tmp_path / "home" / "id_rsa"
    model.mkdir()
    secret.parent.mkdir()
    secret.write_text("-----BEGIN OPENSSH PRIVATE KEY-----", encoding="utf-8")
    file = model / "LICENSE.txt"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "large":
        with open(file, "wb") as sparse:
            sparse.truncate(1 << 40)
    elif kind == "link over a folder":
        (model / "terms").symlink_to(secret.parent)
        file.symlink_to("terms/id_rsa")
    else:
        file.symlink_to("/dev/zero" if kind == "device" else secret)
    with pytest.raises(UserError, match=r"LICENSE.txt: (is a link to .*, outside the model's folder|cannot be copied)"):
        beside_weights(model, tmp_path / "out")
    assert not (tmp_path / "out" / "LICENSE.txt").exists()


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    cached = tmp_path / "models--a--b"
    for folder in ("blobs", "snapshots/1234"):
        (cached / folder).mkdir(parents=True)
    (cached / "blobs" / "abc").write_text("{}", encoding="utf-8")
    (cached / "snapshots" / "1234" / "config.json").symlink_to("../../blobs/abc")
    assert beside_weights(cached / "snapshots" / "1234", tmp_path / "out") == (["config.json"], [])


def test_a_model_of_a_gguf_file_has_the_name_of_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers find by it what to build; transformers leaves it out for such files."""
    model = AutoModelForCausalLM.from_pretrained(save_dense("llama", tmp_path / "model"))
    model.config.architectures = None
    monkeypatch.setattr("hecate.model.files.stored_model.load_model", lambda *given: model)
    assert open_stored(ModelSource(tmp_path, "model.gguf")).config.architectures == ["LlamaForCausalLM"]


def test_a_granite_with_experts_under_its_own_names_is_read_and_merged(tmp_path: Path) -> None:
    model = save_moe("granitemoe", tmp_path / "model")
    names = load_file(model / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.input_linear.weight" in names
    parameters = [f"block_sparse_moe.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    adapter, wanted = save_peft(tmp_path / "adapter", model, ["q_proj"], target_parameters=parameters)
    torch.testing.assert_close(hecate_logits(adapter), wanted, **LIMIT)
    with_router(adapter, router="block_sparse_moe.router")
    out = export(adapter, "merged", tmp_path / "out")
    assert load_file(out / "model.safetensors").keys() == names.keys()
    torch.testing.assert_close(transformers_logits(out), hecate_logits(adapter), **LIMIT)
