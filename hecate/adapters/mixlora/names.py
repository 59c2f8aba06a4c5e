"""The names of the tensors in a `mixlora` adapter, and the older `mixtral` names of the same tensors."""

import re
from typing import Literal

FFN_MODULES = ("gate_proj", "up_proj", "down_proj")
ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGET_MODULES = ATTENTION_MODULES + FFN_MODULES
OLD_MODULES = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}

_OLD_ROUTER = re.compile(r"mixlora\.layers\.([0-9]+)\.gate\.weight")
_OLD_EXPERT = re.compile(r"mixlora\.layers\.([0-9]+)\.experts\.([0-9]+)\.([a-z0-9]+_proj)\.lora_([AB])\.weight")
_LAYER = re.compile(r"mixlora\.layers\.([0-9]{1,6})\.")

Matrix = Literal["A", "B"]
MATRICES: tuple[Matrix, Matrix] = ("A", "B")


def router_tensor_name(layer: int) -> str:
    """Return the name of a layer's router weight, [experts, hidden]."""
    return router_part_name(layer, "weight")


def router_part_name(layer: int, part: str) -> str:
    """Return the name of a parameter or a buffer of a layer's router; all but its weight are [experts], such as a bias."""
    return f"mixlora.layers.{layer}.mlp.moe_gate.{part}"


def expert_tensor_name(layer: int, projection: str, expert: int, matrix: Matrix) -> str:
    """Return the name of an expert's A, [r, inputs], or B, [outputs, r], of gate_proj, up_proj or down_proj."""
    assert projection in FFN_MODULES, projection
    return f"mixlora.layers.{layer}.mlp.{projection}.experts.{expert}.lora_{matrix}.weight"


def attention_tensor_name(layer: int, module: str, matrix: Matrix) -> str:
    """Return the name of an attention adapter's A, [r, inputs], or B, [outputs, r], of q_proj, k_proj, v_proj or o_proj."""
    assert module in ATTENTION_MODULES, module
    return f"mixlora.layers.{layer}.self_attn.{module}.lora_{matrix}.weight"


def modern_name(name: str) -> str:
    """Return the current name for an older router or expert name (w1 gate, w2 down, w3 up), and any other name unchanged."""
    if match := _OLD_ROUTER.fullmatch(name):
        return f"mixlora.layers.{match[1]}.mlp.moe_gate.weight"
    if match := _OLD_EXPERT.fullmatch(name):
        layer, expert, module, matrix = match.groups()
        return f"mixlora.layers.{layer}.mlp.{OLD_MODULES.get(module, module)}.experts.{expert}.lora_{matrix}.weight"
    return name


def layer_in(name: str) -> int | None:
    """Return the layer in a tensor's name, or None if it is not the name of an adapter's tensor."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None
