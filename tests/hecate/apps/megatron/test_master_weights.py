"""Masters in float32 of what a model computes with in bfloat16: steps too small for bfloat16, gradients, and who copies when."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hecate.apps.megatron.master_weights import train_in_float32

ULP = 2**-7
"""the distance from 1 to the next bfloat16 number"""


def linear(*weights: float) -> nn.Linear:
    """One output of the sum of its inputs times these weights."""
    made = nn.Linear(len(weights), 1, bias=False)
    made.weight.data = torch.tensor([list(weights)])
    return made


def with_masters(model: nn.Linear) -> nn.Parameter:
    return train_in_float32(model, {"w": model.weight}, torch.bfloat16)["w"]


def gradient_of(model: nn.Linear, *inputs: float) -> Tensor:
    """Backward of the output for these inputs, so that each weight's gradient is its input."""
    output = model(torch.tensor([list(inputs)], dtype=torch.bfloat16))
    output.backward()
    return output


def test_masters_begin_with_what_bfloat16_cannot_hold() -> None:
    model = linear(1 + ULP / 4, 3.0)
    master = with_masters(model)
    assert (master.dtype, model.weight.dtype) == (torch.float32, torch.bfloat16)
    assert master.tolist() == [[1 + ULP / 4, 3.0]]
    assert model.weight.tolist() == [[1.0, 3.0]]
    assert [name for name, _ in model.named_parameters()] == ["weight"], "masters are no parameters of the model"


def steps(model: nn.Linear, trained: nn.Parameter) -> list[float]:
    """The weight that each of five forward passes computes with, while AdamW takes four steps of 7/16 of an ulp upwards."""
    optimizer = torch.optim.AdamW([trained], lr=ULP * 7 / 16, weight_decay=0.0)
    weights = []
    for _ in range(5):
        output = gradient_of(model, -1.0)
        weights.append(-output.item())
        optimizer.step()
        trained.grad = None
    return weights


def test_steps_that_are_smaller_than_what_bfloat16_tells_apart_add_up() -> None:
    """1 + 0, 7/16, 14/16, 21/16 and 28/16 ulps, rounded."""
    model = linear(1.0)
    assert steps(model, with_masters(model)) == [1.0, 1.0, 1 + ULP, 1 + ULP, 1 + 2 * ULP]


def test_without_masters_the_same_steps_are_lost() -> None:
    model = linear(1.0).to(torch.bfloat16)
    assert steps(model, model.weight) == [1.0] * 5


def test_gradients_add_up_in_float32_and_leave_the_model() -> None:
    """256 + 1 + 1 is 256 in bfloat16."""
    model = linear(0.0, 0.0)
    master = with_masters(model)
    for inputs in ((256.0, 1.0), (1.0, 1.0), (1.0, 1.0)):
        gradient_of(model, *inputs)
        assert model.weight.grad is None
    assert master.grad is not None
    assert master.grad.dtype == torch.float32
    assert master.grad.tolist() == [[258.0, 3.0]]


def test_a_forward_pass_computes_with_masters_as_they_are_between_two_steps() -> None:
    model = linear(1.0)
    master = with_masters(model)
    with torch.no_grad():
        master.fill_(2.0)  # as whoever loads a checkpoint
    assert gradient_of(model, 1.0).item() == 2.0
    with torch.no_grad():
        master.fill_(5.0)
    assert gradient_of(model, 1.0).item() == 2.0, "in the middle of a step: nothing is copied a second time"
    master.grad = None
    assert gradient_of(model, 1.0).item() == 5.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_model_computes_in_the_type_it_is_given(dtype: torch.dtype) -> None:
    model = linear(1.0)
    train_in_float32(model, {"w": model.weight}, dtype)
    assert model(torch.ones(1, 1, dtype=dtype)).dtype == dtype
