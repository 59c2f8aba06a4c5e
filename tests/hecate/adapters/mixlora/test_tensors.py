"""Which tensors an adapter has, listed by hand, and what the check makes of them."""

from __future__ import annotations

import pytest
import torch

from hecate.adapters.mixlora.description import checked_tensors, expected_shapes
from hecate.errors import UserError
from tests.hecate.adapters.making import config_of, tensors_of


def test_the_tensors_of_two_layers_typed_by_hand() -> None:
    """Layer 0 keeps its plain FFN; o_proj and down_proj put out what is hidden, and take in a size of their layer's own."""
    config = config_of(target_modules=("down_proj", "o_proj", "v_proj"), num_experts=(0, 2), top_k=1)
    assert list(expected_shapes(config)) == [
        ("mixlora.layers.0.self_attn.v_proj.lora_A.weight", (2, "hidden")),
        ("mixlora.layers.0.self_attn.v_proj.lora_B.weight", ("v_proj of layer 0", 2)),
        ("mixlora.layers.0.self_attn.o_proj.lora_A.weight", (2, "o_proj of layer 0")),
        ("mixlora.layers.0.self_attn.o_proj.lora_B.weight", ("hidden", 2)),
        ("mixlora.layers.1.self_attn.v_proj.lora_A.weight", (2, "hidden")),
        ("mixlora.layers.1.self_attn.v_proj.lora_B.weight", ("v_proj of layer 1", 2)),
        ("mixlora.layers.1.self_attn.o_proj.lora_A.weight", (2, "o_proj of layer 1")),
        ("mixlora.layers.1.self_attn.o_proj.lora_B.weight", ("hidden", 2)),
        ("mixlora.layers.1.mlp.moe_gate.weight", (2, "hidden")),
        ("mixlora.layers.1.mlp.down_proj.experts.0.lora_A.weight", (2, "ffn of layer 1")),
        ("mixlora.layers.1.mlp.down_proj.experts.0.lora_B.weight", ("hidden", 2)),
        ("mixlora.layers.1.mlp.down_proj.experts.1.lora_A.weight", (2, "ffn of layer 1")),
        ("mixlora.layers.1.mlp.down_proj.experts.1.lora_B.weight", ("hidden", 2)),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_tensors_come_back_as_values_of_fp32_in_the_order_of_the_format(dtype: torch.dtype) -> None:
    given = {name: tensor.requires_grad_() for name, tensor in reversed(tensors_of(dtype=dtype).items())}
    checked = checked_tensors(given, config_of())
    assert list(checked) == [name for name, _ in expected_shapes(config_of())]
    for name, tensor in checked.items():
        assert (tensor.dtype, tensor.requires_grad) == (torch.float32, False)
        assert torch.equal(tensor, given[name].detach().float()), name


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        # The size that the configuration gives, and sizes that an earlier tensor of the adapter gave.
        ("mlp.gate_proj.experts.1.lora_A", (3, 6), r"\[3, 6\]; 3 is 2 in adapter_config\.json"),
        ("mlp.gate_proj.experts.1.lora_A", (2, 7), r"\[2, 7\]; 7 is 6 in mixlora\.layers\.0\.self_attn\.q_proj\.lora_A\.weight"),
        ("mlp.down_proj.experts.2.lora_A", (2, 11), r"11 is 10 in mixlora\.layers\.1\.mlp\.gate_proj\.experts\.0\.lora_B\.weight"),
    ],
)
def test_a_wrong_size_is_named_with_what_it_contradicts(name: str, shape: tuple[int, ...], reason: str) -> None:
    tensors = tensors_of() | {f"mixlora.layers.1.{name}.weight": torch.zeros(shape)}
    with pytest.raises(UserError, match=f"tensor mixlora.layers.1.{name}.weight has the shape .*{reason}"):
        checked_tensors(tensors, config_of())
