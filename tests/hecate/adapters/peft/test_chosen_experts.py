"""An adapter that training begins with may have numbers for experts that train, and for no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hecate.adapters.description import Adapter
from hecate.adapters.peft.chosen_experts import for_chosen_experts
from hecate.adapters.peft.description import LoraDescription
from hecate.errors import UserError
from hecate.parallel.values.expert_kinds import LoraShape

LAYERS, EXPERTS, RANK = 2, 3, 2
AT = "base_model.model.model.layers.{}.mlp.experts"


def adapter(with_numbers: dict[int, list[int]], *, of: str = "AB") -> Adapter:
    """Of down_proj, and of a linear: A or B, or both, are not zero for these experts of each layer."""
    tensors = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(RANK, 8)}
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.ones(8, RANK)
    for layer in range(LAYERS):
        a, b = torch.zeros(EXPERTS * RANK, 5), torch.zeros(8, RANK * EXPERTS)
        for expert in with_numbers[layer]:
            a[expert * RANK + 1, 3] = "A" in of
            b[6, EXPERTS + expert] = "B" in of  # column r of rank 1
        tensors |= {f"{AT.format(layer)}.lora_A.weight": a, f"{AT.format(layer)}.lora_B.weight": b}
    description = LoraDescription(
        base_model_name_or_path="base", r=RANK, alpha=2, target_modules=("q_proj",), target_parameters=("mlp.experts.down_proj",)
    )
    return Adapter(Path("begun"), tensors, description)


@pytest.mark.parametrize("of", ["A", "B", "AB"])
@pytest.mark.parametrize(
    ("chosen", "numbers", "refused"),
    [
        ((), {0: [0, 1, 2], 1: [0, 1, 2]}, None),
        ((0, 2), {0: [0, 2], 1: [2]}, None),
        ((0, 2), {0: [0], 1: [1, 2]}, (1, 1)),
        (((1,), (0, 2)), {0: [1], 1: [0, 2]}, None),
        (((1,), (0, 2)), {0: [1, 2], 1: [0]}, (2, 0)),
        (((1,), (0, 2)), {0: [], 1: [1]}, (1, 1)),
        (((0,),), {0: [0], 1: [1]}, None),  # of a model with fewer layers, which its tensors say
    ],
)
def test_numbers_for_experts_that_do_not_train_are_refused(
    chosen: tuple[int | tuple[int, ...], ...], numbers: dict[int, list[int]], refused: tuple[int, int] | None, of: str
) -> None:
    given, lora = adapter(numbers, of=of), LoraShape(RANK, 1.0, 0.0, chosen=chosen)
    if refused is None:
        assert for_chosen_experts(given, lora) is given
        return
    expert, layer = refused
    with pytest.raises(UserError, match=rf"^lora.init_from: begun has numbers for expert {expert} of layer {layer}, which is not"):
        for_chosen_experts(given, lora)


@pytest.mark.parametrize(
    ("chosen", "numbers", "said"),
    [
        ((), {0: [0, 1, 2], 1: [0, 1, 2]}, None),
        ((), {0: [0, 1, 2], 1: [0, 2]}, "experts whose pairs are zeros (1, such as 1 of layer 1)"),
        ((0, 2), {0: [0, 2], 1: [0, 2]}, None),
        (((1,), (0, 2)), {0: [], 1: [0]}, "experts whose pairs are zeros (2, such as 1 of layer 0)"),
    ],
)
def test_experts_that_would_never_train_are_named(
    chosen: tuple[int | tuple[int, ...], ...], numbers: dict[int, list[int]], said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    for_chosen_experts(adapter(numbers), LoraShape(RANK, 1.0, 0.0, chosen=chosen))
    assert [said in text for text in caplog.messages] == ([] if said is None else [True])
