"""LoRAs of other programs: patterns of ranks and alphas, regular expressions, and one whose order of B may be another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hecate.adapters.forms import read_any
from hecate.adapters.lora_folder import load_lora
from hecate.errors import UserError
from tests.hecate.adapters.exporting import (
    LIMIT,
    export,
    hecate_logits,
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


def test_an_adapter_of_unsloth_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter, _ = save_peft(tmp_path / "adapter", save_moe("qwen3_moe", tmp_path / "model"), [])
    read_any(adapter)
    assert not caplog.records
    configured(adapter, "auto_mapping", {"parent_library": "transformers", "unsloth_fixed": True})
    read_any(adapter)
    assert "trained the experts' B in another order" in caplog.text


def configured(adapter: Path, key: str, value: Any) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("rank_pattern", {"q_proj": 0}, "adapter_config.json: rank_pattern must be an object of names and whole numbers from 1"),
        ("alpha_pattern", {"q_proj(": 4}, r"alpha_pattern: 'q_proj\(' is no regular expression"),
        ("rank_pattern", {"q_proj": 3}, "but its rank is 3 by rank_pattern"),
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
    assert load_lora(adapter)[1].target_modules == ("q_proj", "v_proj")
    torch.testing.assert_close(hecate_logits(adapter), wanted, **LIMIT)


@pytest.mark.parametrize(
    ("kind", "modules"), [("phi", ["q_proj", "fc1"]), ("phi3", ["qkv_proj", "down_proj"]), ("qwen3_moe", ["q_proj", "o_proj"])]
)
def test_a_lora_over_a_model_without_a_gated_ffn_of_its_own_is_read(tmp_path: Path, kind: str, modules: list[str]) -> None:
    """phi has FFNs without gates and with biases, phi3 linears of several projections, and qwen3_moe experts, which stay as they are."""
    model = (save_moe if kind == "qwen3_moe" else save_dense)(kind, tmp_path / "model")
    adapter, wanted = save_peft(tmp_path / "adapter", model, modules, experts=False)
    torch.testing.assert_close(hecate_logits(adapter), wanted, **LIMIT)
