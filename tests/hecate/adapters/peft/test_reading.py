"""LoRAs of other programs: patterns of ranks and alphas, and modules named by their ends, by their whole names or by an expression."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hecate.adapters.peft.reading import load_lora
from hecate.errors import UserError
from tests.hecate.adapters.exporting import (
    LIMIT,
    damaged,
    export,
    hecate_logits,
    logits_of,
    save_dense,
    save_moe,
    save_peft,
    transformers_logits,
)


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


def configured(adapter: Path, key: str, value: Any) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("rank_pattern", {"q_proj": 0}, "adapter_config.json: rank_pattern must be an object of names and whole numbers from 1"),
        ("alpha_pattern", {"q_proj(": 4}, r"alpha_pattern: 'q_proj\(' is no regular expression"),
        ("rank_pattern", {"q_proj": 3}, "but its rank is 3\n  r and rank_pattern of adapter_config.json must say what the tensors have"),
        ("r", 3, r"experts.lora_A.weight has the shape \[20, 20\] and its B \[16, 20\], but its rank is 3"),
        ("target_modules", ".*(q_proj|(k_proj)+)", r"target_modules: '.*' repeats a group, or too much"),
        ("target_modules", "q_proj(", r"target_modules: 'q_proj\(' is no regular expression"),
        ("use_dora", True, "use_dora: True: adapters with it are not supported"),
        ("alora_invocation_tokens", [3], r"alora_invocation_tokens: \[3\]: adapters with it are not supported"),
        (
            "init_lora_weights",
            "pissa_niter_4",
            "init_lora_weights: pissa_niter_4: the adapter is for a base model whose weights PEFT changes",
        ),
        ("r", 0, "r must be from 1 to 1000000, not 0"),
    ],
)
def test_a_configuration_that_is_wrong_or_not_supported_is_refused(tmp_path: Path, key: str, value: Any, reason: str) -> None:
    adapter, _ = save_peft(tmp_path / "adapter", save_moe("qwen3_moe", tmp_path / "model"), ["q_proj"])
    configured(adapter, key, value)
    with pytest.raises(UserError, match=reason):
        load_lora(adapter)


def test_an_alpha_that_is_written_as_a_float_is_read(tmp_path: Path) -> None:
    """As prime-rl writes it."""
    adapter, _ = save_peft(tmp_path / "adapter", save_dense("llama", tmp_path / "model"), ["q_proj"], experts=False)
    configured(adapter, "lora_alpha", 6.0)
    assert load_lora(adapter)[1].alpha == 6
    configured(adapter, "lora_alpha", 6.5)
    with pytest.raises(UserError, match=r"lora_alpha must be a whole number, not 6\.5"):
        load_lora(adapter)


def test_modules_named_by_a_regular_expression_are_read(tmp_path: Path) -> None:
    """Also from adapter_model.bin, as older versions of PEFT wrote it."""
    given = {"target_modules": ".*self_attn.(q|v)_proj"}
    adapter, wanted = save_peft(tmp_path / "adapter", save_dense("llama", tmp_path / "model"), [], experts=False, **given)
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    assert load_lora(adapter)[1].target_modules == ".*self_attn.(q|v)_proj"
    torch.testing.assert_close(hecate_logits(adapter), wanted, **LIMIT)


# As PEFT writes all-linear for models with few linears, as users choose layers, and as unsloth writes what it has adapted.
WHOLE = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(3) for name in "qv"]
CHOSEN = ["model.layers.1.self_attn.q_proj", "layers.2.mlp.down_proj", "0.self_attn.o_proj"]
EXPRESSION = r"(?:model\.layers\.[\d]{1,}\.self_attn\.k_proj|model\.layers\.\d+\.self_attn\.q_proj|model\.layers\.2\.mlp\.(?:up_proj))"
FFNS = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(3) for name in ("gate", "up", "down")]


@pytest.mark.parametrize("targets", [WHOLE, CHOSEN, EXPRESSION, FFNS, FFNS[:-1], "all-linear"], ids=str)
def test_modules_named_as_peft_may_are_read(tmp_path: Path, targets: list[str] | str) -> None:
    """The logits are PEFT's, from hecate and from the merged model; written for PEFT, they are the same modules."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = save_dense("llama", tmp_path / "model")
    adapter, wanted = save_peft(tmp_path / "adapter", model, [], experts=False, target_modules=targets)
    torch.testing.assert_close(hecate_logits(adapter), wanted, **LIMIT)
    torch.testing.assert_close(transformers_logits(export(adapter, "merged", tmp_path / "out")), wanted, **LIMIT)
    back = export(adapter, "peft", tmp_path / "back")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    torch.testing.assert_close(logits_of(PeftModel.from_pretrained(base, back).eval()), wanted, **LIMIT)


@pytest.mark.parametrize("targets", [["model.layers.1.self_attn.q_proj", "v_proj"], r".*\.(1\.self_attn\.q|self_attn\.v)_proj"], ids=str)
def test_modules_named_as_peft_may_are_read_beside_experts(tmp_path: Path, targets: list[str] | str) -> None:
    given = {"target_modules": targets}
    adapter, wanted = save_peft(tmp_path / "adapter", save_moe("qwen3_moe", tmp_path / "model"), [], **given)
    torch.testing.assert_close(hecate_logits(adapter), wanted, **LIMIT)
    torch.testing.assert_close(transformers_logits(export(adapter, "merged", tmp_path / "out")), wanted, **LIMIT)
    served = export(adapter, "per-expert", tmp_path / "served")
    torch.testing.assert_close(hecate_logits(served), wanted, **LIMIT)
    listed = json.loads((served / "adapter_config.json").read_text())["target_modules"]
    assert {name.rpartition(".")[2] for name in listed} == {"q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("targets", [CHOSEN, r".*\.[12]\.self_attn\.q_proj"], ids=str)
def test_a_pair_that_its_target_modules_name_and_it_lacks_is_named(tmp_path: Path, targets: list[str] | str) -> None:
    adapter, _ = save_peft(tmp_path / "adapter", save_dense("llama", tmp_path / "model"), [], experts=False, target_modules=targets)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    for matrix in "AB":
        damaged(adapter, name.format(matrix), None)
    for use in (hecate_logits, lambda one: export(one, "merged", tmp_path / "out")):
        with pytest.raises(UserError, match=f"{adapter}.*has no tensor {name.format('A')}"):
            use(adapter)


def test_a_target_that_the_base_model_does_not_have_is_named(tmp_path: Path) -> None:
    adapter, _ = save_peft(tmp_path / "adapter", save_dense("llama", tmp_path / "model"), ["q_proj"], experts=False)
    for targets in (["q_proj", "model.layers.9.self_attn.k_proj"], "q_proj"):
        configured(adapter, "target_modules", targets)
        unknown = targets if isinstance(targets, str) else targets[1]
        with pytest.raises(UserError, match=f"adapts {unknown}, which is no linear of the base model's decoder layers: q_proj, k_proj"):
            hecate_logits(adapter)


@pytest.mark.parametrize("missing_row", ["A", "B"])
@pytest.mark.parametrize("experts", [False, True])
def test_a_pair_of_another_rank_than_the_description_says_is_refused_whoever_reads_it(
    tmp_path: Path, missing_row: str, experts: bool
) -> None:
    kind = save_moe("qwen3_moe", tmp_path / "model") if experts else save_dense("llama", tmp_path / "model")
    adapter, _ = save_peft(tmp_path / "adapter", kind, ["q_proj"], experts=experts)
    path = "base_model.model.model.layers.1." + ("mlp.experts" if experts else "self_attn.q_proj")
    tensor = load_file(adapter / "adapter_model.safetensors")[name := f"{path}.lora_{missing_row}.weight"]
    damaged(adapter, name, (tensor[:-1] if missing_row == "A" else tensor[:, :-1]).contiguous())
    for use in (hecate_logits, lambda one: export(one, "merged", tmp_path / "out"), lambda one: export(one, "peft", tmp_path / "out")):
        with pytest.raises(UserError, match=f"{adapter}: {path}.lora_A.weight has the shape .*, but its rank is 4\n"):
            use(adapter)


@pytest.mark.parametrize(
    ("kind", "modules"), [("phi", ["q_proj", "fc1"]), ("phi3", ["qkv_proj", "down_proj"]), ("qwen3_moe", ["q_proj", "o_proj"])]
)
def test_a_lora_over_a_model_without_a_gated_ffn_of_its_own_is_read(tmp_path: Path, kind: str, modules: list[str]) -> None:
    """phi has FFNs without gates and with biases, phi3 linears of several projections, and qwen3_moe experts, which stay as they are."""
    model = (save_moe if kind == "qwen3_moe" else save_dense)(kind, tmp_path / "model")
    adapter, wanted = save_peft(tmp_path / "adapter", model, modules, experts=False)
    torch.testing.assert_close(hecate_logits(adapter), wanted, **LIMIT)
