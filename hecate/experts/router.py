"""Who goes where: the top-k softmax router of Mixtral and MixLoRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hecate.experts.seeding import generator


@dataclass(frozen=True)
class Routing:
    """The router's decision for some tokens."""

    prob_TE: Tensor
    """softmax over all experts, in the router's dtype"""
    expert_TK: Tensor
    """int64: the chosen experts, best first"""
    weight_TK: Tensor
    """their probabilities, renormalized to sum to 1"""


class TopKRouter(nn.Module):
    """p = softmax(x W'), the k largest renormalized. Works in its own dtype (float32 or wider) whatever x comes in."""

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        *,
        layer: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        weight = torch.empty(num_experts, hidden, dtype=torch.float64).normal_(0, 0.02, generator=generator(seed, "router", layer))
        self.weight = nn.Parameter(weight.to(device=device, dtype=dtype))

    def logits(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD.to(self.weight.dtype), self.weight)

    def forward(self, x_TD: Tensor) -> Routing:
        prob_TE = F.softmax(self.logits(x_TD), dim=-1)
        top_TK, expert_TK = prob_TE.topk(self.top_k, dim=-1)
        return Routing(prob_TE, expert_TK, top_TK / top_TK.sum(dim=-1, keepdim=True))
