"""Adapters whose experts are in 3-D tensors, as Megatron-Bridge writes them, are read like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hecate.adapters.format_table import read_adapter
from hecate.adapters.peft.reading import is_lora
from hecate.adapters.peft.stacked_experts import unstack_experts
from hecate.errors import UserError
from tests.hecate.adapters.exporting import LIMIT, RANK, damaged, export, hecate_logits, save_moe, save_peft, save_stacked

A, B = "lora_A.weight", "lora_B.weight"
EXPERTS = 5


@pytest.mark.parametrize("first", [False, True])
def test_experts_in_three_axes_and_back(tmp_path: Path, first: bool) -> None:
    """PEFT's logits, and the very tensors of PEFT's own form after an export."""
    adapter, wanted = save_peft(tmp_path / "adapter", save_moe("qwen3_moe", tmp_path / "model"), ["q_proj"])
    stacked = save_stacked(tmp_path / "stacked", adapter, first=first)
    assert is_lora(stacked, of_experts=True)
    assert not is_lora(stacked, of_experts=False)
    torch.testing.assert_close(hecate_logits(stacked), wanted, **LIMIT)
    back = load_file(export(stacked, "peft", tmp_path / "back") / "adapter_model.safetensors")
    own = load_file(adapter / "adapter_model.safetensors")
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in own.items())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    adapter, _ = save_peft(tmp_path / "adapter", save_moe("qwen3_moe", tmp_path / "model"), ["q_proj"])
    stacked = save_stacked(tmp_path / "stacked", adapter, first=True)
    name = f"base_model.model.model.layers.1.mlp.experts.down_proj.{B}"
    config = stacked / "adapter_config.json"
    value = json.loads(config.read_text())
    config.write_text(json.dumps({**value, "rank_pattern": {"q_proj": 2}}))
    with pytest.raises(UserError, match="rank_pattern and alpha_pattern are not read beside experts in 3-D tensors"):
        read_adapter(stacked)
    config.write_text(json.dumps(value))
    damaged(stacked, name, torch.zeros(EXPERTS - 1, 16, RANK))
    with pytest.raises(UserError, match=r"lora_B.weight has the shape \[4, 16, 4\], and its A \[5, 4, 20\]: it fits neither of B"):
        read_adapter(stacked)
    cube = {f"base_model.model.layers.0.mlp.experts.down_proj.{end}": torch.ones(4, 4, 4) for end in (A, B)}
    with pytest.raises(UserError, match="it fits both orders of B"):
        unstack_experts(cube, read_adapter(adapter).description)  # type: ignore[arg-type]
    damaged(stacked, name, None)
    with pytest.raises(UserError, match=f"has no tensor {name}"):
        read_adapter(stacked)
