"""The weights of Megatron's own experts as the flat chunks of hecate's, to compare the two."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from hecate.apps.megatron.expert_parallel import expert_weights

AUX_LOSS = "global_load_balancing_loss"
"""the name under which Megatron tracks it"""


def set_expert(layer: MoELayer, expert: int, chunk: Tensor) -> None:
    """Give a local expert the weights of a flat chunk, as `FfnShape` lays them out; does nothing on other ranks."""
    if expert in layer.local_expert_indices:
        weights = expert_weights(layer, expert)
        for parameter, part in zip(weights, chunk.split([one.numel() for one in weights]), strict=True):
            parameter.data.copy_(part.view_as(parameter))


def flat_expert(layer: MoELayer, expert: int, *, grad: bool) -> Tensor:
    """[C]: a local expert's weights, or their gradients, as a flat chunk."""
    parts = [parameter.grad if grad else parameter.detach() for parameter in expert_weights(layer, expert)]
    return torch.cat([part.flatten() for part in parts if part is not None])
