"""`hecate export`: what each form's readers compute with it is what hecate computes, and what a form cannot hold is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hecate.adapters.forms import FORMS, read_any, write_form
from hecate.adapters.mixlora_as_mixtral import other_than_mixtrals
from hecate.adapters.per_expert import experts_paths
from hecate.errors import UserError
from hecate.model.load import resolve_model
from hecate.model.stored_model import open_stored
from tests.hecate.adapters.exporting import (
    ALL,
    EXPERTS,
    RANK,
    hecate_logits,
    logits_of,
    mixlora_description,
    mixlora_tensors,
    save_dense,
    save_mixlora,
    save_moe,
    save_peft,
    transformers_logits,
)
from tests.plain_mixlora import PROJECTIONS, PlainLora, PlainMixlora

LIMIT: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def export(source: Path, form: str, out: Path) -> Path:
    write_form(form, read_any(source), out)
    return out


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
    again = read_any(export(out, "mixlora", tmp_path / "again"))
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in mixlora_tensors(mixlora_description(model)).items())


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


def with_router(adapter: Path, layers: int = 2) -> None:
    """Let an adapter have trained routers, too."""
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    routers = {f"base_model.model.model.layers.{n}.mlp.gate.weight": torch.randn(5, 16) for n in range(layers)}
    save_file({**load_file(file), **routers}, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": ["mlp.gate"]}))


def test_trained_routers_are_merged(tmp_path: Path) -> None:
    adapter, without = save_peft(tmp_path / "adapter", save_moe("mixtral", tmp_path / "model"), ["q_proj"])
    with_router(adapter)
    logits = transformers_logits(export(adapter, "merged", tmp_path / "out"))
    torch.testing.assert_close(logits, hecate_logits(adapter), **LIMIT)
    assert not torch.allclose(logits, without, atol=1e-2)


NAMES = {
    "qwen3_moe": ("model.layers.1.mlp.experts.4.gate_proj.", "model.layers.0.mlp.experts.0.down_proj."),
    "mixtral": ("model.layers.1.block_sparse_moe.experts.4.w1.", "model.layers.0.block_sparse_moe.experts.0.w2."),
}


@pytest.mark.parametrize("kind", NAMES)
def test_one_pair_for_each_expert_and_back(tmp_path: Path, kind: str) -> None:
    """Its names are the servers', each expert's product is the adapter's, it says who takes it, and it comes back bit for bit."""
    model = save_moe(kind, tmp_path / "model")
    adapter, wanted = save_peft(tmp_path / "adapter", model, ["q_proj"], lora_alpha=2 * RANK)  # a scale of 2 is folded exactly
    out = export(adapter, "per-expert", tmp_path / "out")
    tensors = load_file(out / "adapter_model.safetensors")
    value = json.loads((out / "adapter_config.json").read_text())
    assert (value["lora_alpha"], value["r"], value["modules_to_save"], value["use_rslora"]) == (RANK, RANK, None, False)
    assert len(tensors) == 2 * 2 * (3 * 5 + 1)
    for name in NAMES[kind]:
        assert {f"base_model.model.{name}lora_{matrix}.weight" for matrix in "AB"} <= tensors.keys()
        assert name.split(".")[-2] in value["target_modules"]
    gate = f"base_model.model.{NAMES[kind][0]}"
    up = gate.replace("gate_proj", "up_proj").replace("w1", "w3")
    flat = load_file(adapter / "adapter_model.safetensors")
    joined = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_"
    a_ErD, b_OrE = flat[f"{joined}A.weight"].view(5, RANK, 16), flat[f"{joined}B.weight"].view(-1, RANK, 5)
    both = torch.cat([tensors[f"{part}lora_B.weight"] @ tensors[f"{part}lora_A.weight"] for part in (gate, up)])
    torch.testing.assert_close(both, 2.0 * b_OrE[:, :, 4] @ a_ErD[4])
    card = (out / "README.md").read_text()
    assert "vLLM" in card
    assert ("SGLang" in card) == (kind != "mixtral")
    torch.testing.assert_close(hecate_logits(out), wanted, **LIMIT)
    back = read_any(export(out, "peft", tmp_path / "back"))
    for name, tensor in flat.items():
        assert torch.equal(back.tensors[name], 2 * tensor if ".lora_B." in name else tensor), name
    assert experts_paths(back.tensors) == [f"model.layers.{layer}.mlp.experts" for layer in range(2)]


@pytest.mark.parametrize("rslora", [False, True])
def test_gate_and_up_with_another_a_each_are_read(tmp_path: Path, rslora: bool) -> None:
    """As other trainers write them: their rank doubles. Beside the model with each expert's own weights changed."""
    model = save_moe("qwen3_moe", tmp_path / "model")
    adapter, _ = save_peft(tmp_path / "adapter", model, ["q_proj"])
    out = export(adapter, "per-expert", tmp_path / "out")
    file, config = out / "adapter_model.safetensors", out / "adapter_config.json"
    tensors = load_file(file)
    random = torch.Generator().manual_seed(5)
    tensors = {name: torch.randn(one.shape, generator=random) / 3 if "up_proj.lora_A" in name else one for name, one in tensors.items()}
    save_file(tensors, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_rslora": rslora}))
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, experts_implementation="eager").eval()
    scale = RANK**0.5 if rslora else 1.0

    def product(path: str) -> Tensor:
        return (
            scale * tensors[f"base_model.model.{path}.lora_B.weight"].double() @ tensors[f"base_model.model.{path}.lora_A.weight"].double()
        )

    with torch.no_grad():
        for number, layer in enumerate(plain.model.layers):
            layer.self_attn.q_proj.weight += product(f"model.layers.{number}.self_attn.q_proj")
            for expert in range(5):
                prefix = f"model.layers.{number}.mlp.experts.{expert}"
                layer.mlp.experts.gate_up_proj[expert] += torch.cat([product(f"{prefix}.gate_proj"), product(f"{prefix}.up_proj")])
                layer.mlp.experts.down_proj[expert] += product(f"{prefix}.down_proj")
    assert read_any(out).description.r == 2 * RANK  # type: ignore[union-attr]
    torch.testing.assert_close(hecate_logits(out), logits_of(plain), **LIMIT)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": {"experts.down_proj": 2, "q_proj": 3}},
        {"alpha_pattern": {"k_proj": 9, "layers.1.mlp.experts.gate_up_proj": 1}, "rank_pattern": {"q_proj": 8}},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 12}},
    ],
)
def test_patterns_of_ranks_and_alphas_are_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter, wanted = save_peft(tmp_path / "adapter", save_moe("qwen3_moe", tmp_path / "model"), ["q_proj", "k_proj"], **changes)
    torch.testing.assert_close(hecate_logits(adapter), wanted, **LIMIT)
    torch.testing.assert_close(transformers_logits(export(adapter, "merged", tmp_path / "out")), wanted, **LIMIT)


def test_an_adapter_of_unsloth_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter, _ = save_peft(tmp_path / "adapter", save_moe("qwen3_moe", tmp_path / "model"), [])
    read_any(adapter)
    assert not caplog.records
    config = adapter / "adapter_config.json"
    value = json.loads(config.read_text())
    config.write_text(json.dumps({**value, "auto_mapping": {"parent_library": "transformers", "unsloth_fixed": True}}))
    read_any(adapter)
    assert "trained the experts' B in another order" in caplog.text


def test_a_folder_has_a_card(tmp_path: Path) -> None:
    extra = {"training": {"steps": 12, "data": ["chats", "sums"]}}
    card = (save_mixlora(tmp_path / "adapter", Path("base: model"), extra=extra) / "README.md").read_text()
    header = card.split("---")[1]
    for text in ("library_name: hecate", 'base_model: "base: model"', "- mixlora"):
        assert text in header
    for text in ("| steps | 12 |", "| data | chats, sums |", "| experts | 3 |", "hecate generate"):
        assert text in card


def damaged(adapter: Path, name: str, tensor: Tensor | None) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = {key: one for key, one in load_file(file).items() if key != name}
    save_file(tensors if tensor is None else {**tensors, name: tensor}, file)


DENSE_REFUSALS: list[tuple[dict[str, Any], str, str, str]] = [
    ({}, "llama", "merged", r"mixture of experts over a dense model's FFNs.*the form merged cannot hold\n  give --to mixlora or mixtral"),
    ({}, "llama", "peft", "the form peft cannot hold"),
    ({}, "llama", "gguf", "--to gguf: there is no such form\n  forms: mixlora, mixtral, peft, per-expert, merged"),
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


def test_a_dense_router_that_takes_all_is_mixtrals() -> None:
    extra = {"router": {"dense": True}}
    assert not other_than_mixtrals(mixlora_description(Path("m"), top_k=EXPERTS, extra=extra))
    assert "dense" in other_than_mixtrals(mixlora_description(Path("m"), top_k=EXPERTS - 1, extra=extra))


def test_what_a_form_cannot_hold_of_a_lora_is_refused(tmp_path: Path) -> None:
    model = save_moe("qwen3_moe", tmp_path / "model")
    q_proj = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    experts = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    number = iter(range(100))

    def refused(form: str, reason: str, change: Any = None, **of_adapter: Any) -> None:
        adapter, _ = save_peft(tmp_path / f"adapter{next(number)}", model, ["q_proj"], **of_adapter)
        if change is not None:
            change(adapter)
        with pytest.raises(UserError, match=f"(?s){adapter}.*: .*{reason}"):
            export(adapter, form, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(
        "mixlora", "is a LoRA, without routers of its own, which the form mixlora cannot hold\n  give --to peft or per-expert or merged"
    )
    refused("per-expert", "adapts linears and no experts", experts=False)
    refused("per-expert", r"has trained routers \(mlp.gate\).*give --to merged", with_router)
    refused("merged", f"has no tensor {q_proj}A.weight", lambda one: damaged(one, f"{q_proj}A.weight", None))
    refused("merged", "has no tensor", lambda one: damaged(one, experts, None))
    stranger = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    refused("merged", rf"the tensor {stranger} \(1 such\) belongs to no weight", lambda one: damaged(one, stranger, torch.ones(4, 16)))
    refused(
        "merged", r"has the shape \[16, 17\], but the base model's is", lambda one: damaged(one, f"{q_proj}A.weight", torch.ones(4, 17))
    )

    def zero(adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        save_file({name: 0 * one if ".lora_B." in name else one for name, one in load_file(file).items()}, file)

    refused("merged", "all its B are zero: it was never trained", zero)
    refused("peft", r"rank_pattern must be an object of names", lambda one: patterned(one, "rank_pattern", {"q_proj": 0}))
    refused("peft", "but its rank is 3 by rank_pattern", lambda one: patterned(one, "rank_pattern", {"q_proj": 3}))


def patterned(adapter: Path, key: str, pattern: dict[str, int]) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: pattern}))


def test_an_expert_whose_pair_is_missing_is_named(tmp_path: Path) -> None:
    adapter, _ = save_peft(tmp_path / "adapter", save_moe("mixtral", tmp_path / "model"), [])
    out = export(adapter, "per-expert", tmp_path / "out")
    damaged(out, "base_model.model.model.layers.1.block_sparse_moe.experts.3.w3.lora_B.weight", None)
    with pytest.raises(UserError, match=r"has no tensor base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_B.weight"):
        read_any(out)


def test_every_form_is_tested() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{form}", tmp_path' in text for form in FORMS)
    assert len(ALL) == 7
