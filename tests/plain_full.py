"""A mixture of full experts without any of this project's machinery: one process, plain autograd. See `tests.plain_mixlora`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainFull(nn.Module):
    """One expert after the other over all tokens."""

    def __init__(self, router: Tensor, bias: Tensor, experts: list[dict[str, Tensor]], top_k: int, logit_scale: float) -> None:
        super().__init__()
        self.bias, self.top_k, self.logit_scale = bias, top_k, logit_scale
        self.router = nn.Parameter(router.clone())
        self.experts = nn.ModuleList(
            nn.ParameterDict({name: nn.Parameter(tensor.clone()) for name, tensor in expert.items()}) for expert in experts
        )
        self.valid: Tensor | None = None
        self.prob: Tensor | None = None
        self.expert_TK: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        assert self.valid is not None
        x = hidden.reshape(-1, hidden.shape[-1])
        prob = F.softmax(x @ (self.logit_scale * self.router).T + self.bias, dim=-1)
        weight, expert_TK = prob.topk(self.top_k, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        self.prob, self.expert_TK = prob[self.valid], expert_TK[self.valid]
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share = (weight * (expert_TK == number)).sum(-1, keepdim=True) * self.valid[:, None]
            h = F.silu(x @ expert["gate_proj"].T) * (x @ expert["up_proj"].T)
            y = y + share * (h @ expert["down_proj"].T)
        return y.view_as(hidden)
