"""The speed of a device is measured in training steps only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hecate.elastic.layer_timer import LayerTimer
from hecate.experts.forward_pass import CurrentPass
from hecate.experts.linear import MoeLinear
from hecate.parallel.values.units import Unit
from hecate.report.events import DenseWork


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


def test_linears_with_experts_are_timed_by_their_own_products() -> None:
    """Twelve tokens through two linears, and no time for what comes before them or for their experts."""
    linears = {Unit(0, name): nn.Linear(8, 8) for name in ("a", "b")}
    units = {unit: MoeLinear(unit, None, CurrentPass(), linear) for unit, linear in linears.items()}  # type: ignore[arg-type]
    moe: Any = SimpleNamespace(model=Model(), layers=units)
    timer = LayerTimer(moe, torch.device("cpu"))
    for linear in linears.values():
        linear(torch.zeros(3, 4, 8))
    work = timer.take()
    assert work.tokens == 2 * 12
    assert work.seconds > 0


def test_tokens_and_seconds_of_training_alone_are_counted() -> None:
    model = Model()
    moe: Any = SimpleNamespace(model=model, layers={Unit(number): layer.experts for number, layer in enumerate(model.layers)})
    timer = LayerTimer(moe, torch.device("cpu"))
    model(torch.zeros(3, 5, 8))
    work = timer.take()
    assert work.tokens == 2 * 15
    assert work.seconds > 0
    with torch.no_grad():  # as evaluation and generation run
        model(torch.zeros(3, 5, 8))
    with torch.inference_mode():
        model(torch.zeros(3, 5, 8))
    assert timer.take() == DenseWork(0, 0.0)
