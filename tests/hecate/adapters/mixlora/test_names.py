"""Tensor names equal strings typed by hand from the format's description."""

import pytest

from hecate.adapters.mixlora.names import attention_tensor_name, expert_tensor_name, layer_in, modern_name, router_tensor_name


def test_names_typed_by_hand() -> None:
    assert router_tensor_name(3) == "mixlora.layers.3.mlp.moe_gate.weight"
    assert expert_tensor_name(0, "gate_proj", 7, "A") == "mixlora.layers.0.mlp.gate_proj.experts.7.lora_A.weight"
    assert expert_tensor_name(31, "down_proj", 10, "B") == "mixlora.layers.31.mlp.down_proj.experts.10.lora_B.weight"
    assert expert_tensor_name(1, "up_proj", 0, "B") == "mixlora.layers.1.mlp.up_proj.experts.0.lora_B.weight"
    assert attention_tensor_name(2, "q_proj", "A") == "mixlora.layers.2.self_attn.q_proj.lora_A.weight"
    assert attention_tensor_name(12, "o_proj", "B") == "mixlora.layers.12.self_attn.o_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mixlora.layers.4.gate.weight", "mixlora.layers.4.mlp.moe_gate.weight"),
        (
            "mixlora.layers.0.experts.5.w1_proj.lora_A.weight",
            "mixlora.layers.0.mlp.gate_proj.experts.5.lora_A.weight",
        ),
        (
            "mixlora.layers.0.experts.5.w2_proj.lora_B.weight",
            "mixlora.layers.0.mlp.down_proj.experts.5.lora_B.weight",
        ),
        ("mixlora.layers.9.experts.0.w3_proj.lora_A.weight", "mixlora.layers.9.mlp.up_proj.experts.0.lora_A.weight"),
        (
            "mixlora.layers.9.experts.0.gate_proj.lora_B.weight",
            "mixlora.layers.9.mlp.gate_proj.experts.0.lora_B.weight",
        ),
        ("mixlora.layers.2.self_attn.v_proj.lora_A.weight", "mixlora.layers.2.self_attn.v_proj.lora_A.weight"),
        ("mixlora.layers.4.mlp.moe_gate.weight", "mixlora.layers.4.mlp.moe_gate.weight"),
        ("x.mixlora.layers.4.gate.weight", "x.mixlora.layers.4.gate.weight"),
    ],
)
def test_older_names(old: str, new: str) -> None:
    assert modern_name(old) == new


def test_layer_of_a_name() -> None:
    assert layer_in("mixlora.layers.12.mlp.moe_gate.weight") == 12
    assert layer_in("base_model.layers.12.mlp.moe_gate.weight") is None
    assert layer_in("mixlora.layers.99999999999999999999.mlp.moe_gate.weight") is None


def test_a_module_of_the_other_kind_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        expert_tensor_name(0, "q_proj", 0, "A")
    with pytest.raises(AssertionError):
        attention_tensor_name(0, "up_proj", "A")
