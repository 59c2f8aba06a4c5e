"""Adapters of unsloth, in which the columns of the experts' B may be in another order than PEFT's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hecate.adapters.format_table import read_adapter
from hecate.adapters.peft.unsloth import rank_major
from hecate.errors import UserError
from tests.hecate.adapters.exporting import LIMIT, RANK, export, hecate_logits, logits_of, save_moe, save_peft, transformers_logits

EXPERTS, SCALE = 5, 6 / RANK
GROUPED, RANK_MAJOR = "grouped_by_expert", "rank_major"
QWEN3 = {"base_model_class": "Qwen3MoeForCausalLM", "parent_library": "transformers.models.qwen3_moe.modeling_qwen3_moe"}
FIXED = {**QWEN3, "unsloth_fixed": True}


def detail(gate_up: str, down: str) -> dict[str, Any]:
    """As unsloth_zoo 2026.10.9 writes it."""
    parameters = {
        name: {"lora_B_layout": layout, "num_experts": EXPERTS} for name, layout in (("gate_up_proj", gate_up), ("down_proj", down))
    }
    return {"unsloth_fused_expert_lora": {"lora_A_layout": GROUPED, "parameters": parameters}}


def save_unsloth(folder: Path, model: Path, **said: Any) -> Path:
    save_peft(folder, model, [])
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **said}))
    return folder


def plain_logits(model: Path, adapter: Path, grouped: Sequence[str]) -> Tensor:
    """Of the model with each expert's own weights changed.

    Args:
        grouped: the projections whose B is B.view(outputs, experts, rank); that of the others is B.view(outputs, rank, experts).
    """
    tensors = load_file(adapter / "adapter_model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, experts_implementation="eager").eval()
    with torch.no_grad():
        for layer, block in enumerate(plain.model.layers):
            path = f"base_model.model.model.layers.{layer}.mlp.experts."
            for projection, where in (("gate_up_proj", "base_layer."), ("down_proj", "")):
                a, b = (tensors[f"{path}{where}lora_{matrix}.weight"].double() for matrix in "AB")
                for expert in range(EXPERTS):
                    own_a = a[expert * RANK : (expert + 1) * RANK]
                    own_b = b[:, expert * RANK : (expert + 1) * RANK] if projection in grouped else b[:, expert::EXPERTS]
                    getattr(block.mlp.experts, projection)[expert] += SCALE * own_b @ own_a
    return logits_of(plain)


@pytest.mark.parametrize(
    ("said", "grouped", "warned"),
    [
        ({"lora_B_layout": GROUPED}, ["gate_up_proj", "down_proj"], False),
        ({"lora_B_layout": RANK_MAJOR, "auto_mapping": FIXED}, [], False),
        ({"auto_mapping": {**FIXED, **detail(GROUPED, GROUPED)}}, ["gate_up_proj", "down_proj"], False),
        ({"auto_mapping": {**FIXED, **detail(RANK_MAJOR, RANK_MAJOR)}}, [], False),
        ({"auto_mapping": {**FIXED, **detail(RANK_MAJOR, GROUPED)}}, ["down_proj"], False),
        ({**detail(GROUPED, RANK_MAJOR), "auto_mapping": {**FIXED, **detail(RANK_MAJOR, RANK_MAJOR)}}, ["gate_up_proj"], False),
        ({"auto_mapping": FIXED}, ["gate_up_proj", "down_proj"], True),
        (
            {"auto_mapping": {"parent_library": "unsloth_compiled_module_glm4_moe", "unsloth_fixed": True}},
            ["gate_up_proj", "down_proj"],
            True,
        ),
        ({"auto_mapping": {**FIXED, "parent_library": "transformers.models.olmoe.modeling_olmoe"}}, [], False),
        ({"auto_mapping": QWEN3}, [], False),
    ],
)
def test_b_is_read_in_the_order_that_the_file_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, said: dict[str, Any], grouped: list[str], warned: bool
) -> None:
    """A file that says nothing is read as unsloth itself reads it, with a warning where that is a guess."""
    model = save_moe("qwen3_moe", tmp_path / "model")
    adapter = save_unsloth(tmp_path / "adapter", model, **said)
    wanted = plain_logits(model, adapter, grouped)
    other = plain_logits(model, adapter, [name for name in ("gate_up_proj", "down_proj") if name not in grouped])
    assert not torch.allclose(other, wanted, atol=1e-2), "the order makes no difference"
    torch.testing.assert_close(hecate_logits(adapter), wanted, **LIMIT)
    torch.testing.assert_close(transformers_logits(export(adapter, "merged", tmp_path / "out")), wanted, **LIMIT)
    assert ("is read as unsloth_zoo before 2026.9.6 trained it" in caplog.text) == warned


def test_experts_of_other_ranks_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    """PEFT's own adapter with one rank for each projection, and the same with the columns of B moved."""
    adapter, wanted = save_peft(tmp_path / "adapter", save_moe("qwen3_moe", tmp_path / "model"), [], rank_pattern={"experts.down_proj": 2})
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors = load_file(file)
    for name, b in tensors.items():
        if ".lora_B." in name:
            tensors[name] = torch.cat([b[:, expert::EXPERTS] for expert in range(EXPERTS)], dim=1)
    save_file(tensors, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_B_layout": GROUPED}))
    torch.testing.assert_close(hecate_logits(adapter), wanted, **LIMIT)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            {"lora_B_layout": "expert_major"},
            "lora_B_layout: 'expert_major': the order of the columns of the experts' B must be rank_major or",
        ),
        ({"auto_mapping": {**FIXED, **detail("mixed", GROUPED)}}, "lora_B_layout: 'mixed'"),
        ({"auto_mapping": {"unsloth_fixed": True}}, 'nor of which family the model is\n  add "lora_B_layout": "grouped_by_expert" if'),
    ],
)
def test_an_order_that_the_file_does_not_say_is_refused(tmp_path: Path, said: dict[str, Any], reason: str) -> None:
    adapter = save_unsloth(tmp_path / "adapter", save_moe("qwen3_moe", tmp_path / "model"), **said)
    with pytest.raises(UserError, match=f"adapter_config.json: .*{reason}"):
        read_adapter(adapter)


def test_a_lora_of_linears_has_no_such_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter, wanted = save_peft(tmp_path / "adapter", save_moe("qwen3_moe", tmp_path / "model"), ["q_proj"], experts=False)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_mapping": FIXED}))
    torch.testing.assert_close(hecate_logits(adapter), wanted, **LIMIT)
    assert "unsloth" not in caplog.text


def test_columns_that_are_grouped_by_experts_go_to_the_places_of_peft() -> None:
    grouped = torch.arange(2 * 3 * 4).view(2, 12)  # of 3 experts with 4 columns each
    moved = rank_major(grouped, 3)
    for expert in range(3):
        for column in range(4):
            assert torch.equal(moved[:, column * 3 + expert], grouped[:, expert * 4 + column])
