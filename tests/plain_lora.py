"""One LoRA adapter of a model's linears, trained alone without any of this project's machinery: plain autograd, torch's AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.plain_mixlora import PROJECTIONS, PlainLora, clip


class PlainAdapter:
    """The model, the adapter with the values that it begins with, and its optimizer."""

    def __init__(
        self,
        model: Any,
        values: Sequence[Mapping[str, Tensor]],
        scale: float,
        learning_rate: float,
        weight_decay: float,
        places: Sequence[str] = tuple(f"mlp.{name}" for name in PROJECTIONS),
    ) -> None:
        """Args:
        values: of each layer, by names such as gate_proj.A.
        places: the adapted linears of a layer.
        """
        self.model = model.requires_grad_(False)
        self.layers: list[dict[str, Tensor]] = []
        for layer, named in zip(model.model.layers, values, strict=True):
            of_layer: dict[str, Tensor] = {}
            for place in places:
                parent, _, projection = place.rpartition(".")
                holder = layer.get_submodule(parent)
                lora = PlainLora(getattr(holder, projection), named[f"{projection}.A"], named[f"{projection}.B"], scale)
                setattr(holder, projection, lora)
                of_layer |= {f"{projection}.A": lora.a, f"{projection}.B": lora.b}
            self.layers.append(of_layer)
        self.parameters = [parameter for of_layer in self.layers for parameter in of_layer.values()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=weight_decay)

    def step(self, samples: Sequence[tuple[Tensor, Tensor]], max_norm: float) -> tuple[float, float]:
        """(mean loss, norm) of one step over samples of (ids [n], targets [n]); without samples nothing changes, and both are 0."""
        labels = sum(int((targets != -100).sum()) for _, targets in samples)
        if not samples:
            return 0.0, 0.0
        total = 0.0
        for ids, targets in samples:
            logits = self.model(input_ids=ids[None], use_cache=False).logits[0]
            loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / labels
            loss.backward()
            total += float(loss.detach())
        norm = clip(self.parameters, max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, norm

    def flat(self, layer: int) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.layers[layer].values()])
