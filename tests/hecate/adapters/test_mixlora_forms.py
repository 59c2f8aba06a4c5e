"""A mixture of LoRA experts as the libraries' folder and as a Mixtral: both compute what hecate computes, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hecate.adapters.format_table import read_adapter
from hecate.adapters.formats.mixlora import BASES, not_for_libraries
from hecate.adapters.mixlora.description import other_than_mixtrals
from hecate.errors import UserError
from tests.hecate.adapters.exporting import (
    EXPERTS,
    LIMIT,
    export,
    hecate_logits,
    logits_of,
    mixlora_description,
    mixlora_tensors,
    save_dense,
    save_mixlora,
    transformers_logits,
)
from tests.plain_mixlora import PROJECTIONS, PlainLora, PlainMixlora

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def of_mixlora(folder: Path) -> Tensor:
    """The logits that the library `mixlora` itself computes with a folder, over the base model that the folder names."""
    mixlora = pytest.importorskip("mixlora", reason="the package mixlora is missing: pip install mixlora")
    adapted, _ = mixlora.MixLoraModelForCausalLM.from_pretrained(str(folder), torch_dtype=torch.float64)
    return logits_of(adapted)


def of_libraries(folder: Path, model: Path) -> Tensor:
    """The logits of a folder as the libraries read it: keys of the configuration and adapter_model.bin, over MixLoRA's formulas."""
    value = json.loads((folder / "adapter_config.json").read_text())
    tensors = {name: one.double() for name, one in torch.load(folder / "adapter_model.bin", weights_only=True).items()}
    assert value["lora_dropout"] > 0
    base, scale = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval(), value["lora_alpha"] / value["r"]
    for number, layer in enumerate(base.model.layers):
        prefix = f"mixlora.layers.{number}"

        def pair(inside: str, prefix: str = prefix) -> tuple[Tensor, Tensor]:
            return tensors.pop(f"{prefix}.{inside}.lora_A.weight"), tensors.pop(f"{prefix}.{inside}.lora_B.weight")

        for name in ATTENTION:
            setattr(layer.self_attn, name, PlainLora(getattr(layer.self_attn, name), *pair(f"self_attn.{name}"), scale))
        experts: list[dict[str, Tensor]] = []
        for expert in range(value["num_experts"]):
            pairs = {name: pair(f"mlp.{name}.experts.{expert}") for name in PROJECTIONS}
            experts.append({f"{name}.{matrix}": one for name, two in pairs.items() for matrix, one in zip("AB", two, strict=True)})
        router = tensors.pop(f"{prefix}.mlp.moe_gate.weight")
        layer.mlp = PlainMixlora(layer.mlp, router, torch.zeros(()), experts, scale, value["top_k"], 1.0)
        layer.mlp.valid = torch.ones(30, dtype=torch.bool)
    assert not tensors
    return logits_of(base)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_the_libraries_folder(tmp_path: Path, kind: str) -> None:
    model = save_dense(kind, tmp_path / "model")
    adapter = save_mixlora(tmp_path / "adapter", model)
    out = export(adapter, "mixlora", tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.bin"]
    wanted = hecate_logits(adapter)
    torch.testing.assert_close(of_libraries(out, model), wanted, **LIMIT)
    assert torch.equal(hecate_logits(out), wanted)
    again = read_adapter(export(out, "mixlora", tmp_path / "again"))
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in mixlora_tensors(mixlora_description(model)).items())


@pytest.mark.parametrize(
    ("kind", "of_adapter"),
    [("llama", {}), ("mistral", {"target_modules": ("v_proj", "up_proj", "down_proj")}), ("qwen2", {"use_rslora": True, "top_k": 1})],
)
def test_the_library_mixlora_loads_the_folder(tmp_path: Path, kind: str, of_adapter: dict[str, Any]) -> None:
    """As it is, by the package's own code, unchanged."""
    adapter = save_mixlora(tmp_path / "adapter", save_dense(kind, tmp_path / "model"), **of_adapter)
    out = export(adapter, "mixlora", tmp_path / "out")
    torch.testing.assert_close(of_mixlora(out), hecate_logits(adapter), **LIMIT)


@pytest.mark.parametrize(
    ("kind", "changes", "of_adapter"),
    [
        ("llama", {"tie_word_embeddings": True}, {"target_modules": ("v_proj", "up_proj", "down_proj"), "use_rslora": True}),
        ("mistral", {"sliding_window": 4}, {"num_layers": 2}),
    ],
)
def test_a_mixture_as_a_mixtral(tmp_path: Path, kind: str, changes: dict[str, Any], of_adapter: dict[str, Any]) -> None:
    """Also of fewer layers than the base has, as a run with `model.num_hidden_layers` leaves it."""
    model = save_dense(kind, tmp_path / "model", **changes)
    adapter = save_mixlora(tmp_path / "adapter", model, **of_adapter)
    out = export(adapter, "mixtral", tmp_path / "out")
    if "num_layers" not in of_adapter:
        torch.testing.assert_close(transformers_logits(out), hecate_logits(adapter), **LIMIT)
    else:
        save_dense(kind, tmp_path / "short", num_hidden_layers=2, **changes)
        weights = load_file(model / "model.safetensors")
        save_file({name: one for name, one in weights.items() if ".layers.2." not in name}, tmp_path / "short" / "model.safetensors")
        short = save_mixlora(tmp_path / "adapter2", tmp_path / "short", **of_adapter)
        torch.testing.assert_close(transformers_logits(out), hecate_logits(short), **LIMIT)
    torch.testing.assert_close(hecate_logits(out), transformers_logits(out), **LIMIT)


def test_readers_of_version_4_find_the_rotary_base(tmp_path: Path) -> None:
    """They do not know `rope_parameters`, and take 1000000 as the base of a Mixtral that says none. The model's is 10000."""
    adapter = save_mixlora(tmp_path / "adapter", save_dense("llama", tmp_path / "model"))
    out = export(adapter, "mixtral", tmp_path / "out")
    wanted, value = transformers_logits(out), json.loads((out / "config.json").read_text())
    value.pop("rope_parameters")
    (out / "config.json").write_text(json.dumps(value))
    torch.testing.assert_close(transformers_logits(out), wanted, **LIMIT)


DENSE_REFUSALS: list[tuple[dict[str, Any], str, str, str]] = [
    ({}, "llama", "merged", r"mixture of experts over a dense model's FFNs.*the form merged cannot hold\n  give --to mixlora or mixtral"),
    ({}, "llama", "peft", "the form peft cannot hold"),
    ({}, "llama", "gguf", "--to gguf: there is no such form\n  forms: merged, mixlora, mixtral, peft, per-expert"),
    ({"num_experts": (3, 2, 3)}, "llama", "mixlora", "its layers differ in their number of experts"),
    ({"num_experts": (3, 2, 3)}, "llama", "mixtral", "moe.num_experts differs between layers, which a Mixtral cannot"),
    ({"extra": {"router": {"score": "sigmoid"}}}, "llama", "mixlora", r"its routers choose otherwise .*moe.router.score: sigmoid"),
    ({"extra": {"router": {"weights": "gate"}}}, "llama", "mixtral", r"its routers choose otherwise \(moe.router.weights: gate\)"),
    ({}, "qwen2", "mixtral", "the base model is a qwen2, and only llama and mistral become Mixtral"),
    ({}, "qwen3", "mixlora", "its base model is a qwen3, and the libraries know llama, mistral"),
]


@pytest.mark.parametrize(("changes", "kind", "form", "reason"), DENSE_REFUSALS)
def test_what_a_form_cannot_hold_of_a_mixture_is_refused(
    tmp_path: Path, changes: dict[str, Any], kind: str, form: str, reason: str
) -> None:
    adapter = save_mixlora(tmp_path / "adapter", save_dense(kind, tmp_path / "model"), **changes)
    with pytest.raises(UserError, match=f"(?s){reason}") as caught:
        export(adapter, form, tmp_path / "out")
    assert len(str(caught.value).splitlines()) <= 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


def test_the_libraries_know_some_bases() -> None:
    config = mixlora_description(Path("m"))
    assert not any(not_for_libraries(config, kind) for kind in BASES)
    assert not_for_libraries(config, "gemma3")


def test_a_dense_router_that_takes_all_is_mixtrals() -> None:
    extra = {"router": {"dense": True}}
    assert not other_than_mixtrals(mixlora_description(Path("m"), top_k=EXPERTS, extra=extra))
    assert "dense" in other_than_mixtrals(mixlora_description(Path("m"), top_k=EXPERTS - 1, extra=extra))
