"""The speed of a device is measured in training steps only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hecate.elastic.layer_timer import LayerTimer
from hecate.parallel.units import Unit


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.experts = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.experts(self.attention(hidden))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_tokens_and_seconds_of_training_alone_are_counted() -> None:
    model = Model()
    moe: Any = SimpleNamespace(model=model, layers={Unit(number): layer.experts for number, layer in enumerate(model.layers)})
    timer = LayerTimer(moe, torch.device("cpu"))
    model(torch.zeros(3, 5, 8))
    tokens, seconds = timer.take()
    assert tokens == 2 * 15
    assert seconds > 0
    with torch.no_grad():  # as evaluation and generation run
        model(torch.zeros(3, 5, 8))
    with torch.inference_mode():
        model(torch.zeros(3, 5, 8))
    assert timer.take() == (0, 0.0)
