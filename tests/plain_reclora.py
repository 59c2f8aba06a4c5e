"""RecLoRA (arXiv 2408.03533) without any of this project's machinery: one process, plain autograd, every formula written out.

It shares no code with hecate: only the values of the parameters, and the masks of the gates' dropout, are handed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainRecLoraLinear(nn.Module):
    """W x + bias + what a sample's experts add, one sample after the other.

    factors: scale · B_u A_u x with A_u = sum of share · A, B_u = sum of share · B. products: scale · sum of share · B A x.
    """

    def __init__(
        self,
        base: nn.Linear,
        gate: Mapping[str, Tensor],
        experts: Sequence[tuple[Tensor, Tensor]],
        *,
        scale: float,
        temperature: float,
        mix: str,
    ) -> None:
        super().__init__()
        self.base, self.scale, self.temperature, self.mix = base, scale, temperature, mix
        self.gate = nn.ParameterDict({name.replace(".", "_"): nn.Parameter(value.clone()) for name, value in gate.items()})
        self.a = nn.ParameterList(nn.Parameter(a.clone()) for a, _ in experts)
        self.b = nn.ParameterList(nn.Parameter(b.clone()) for _, b in experts)
        self.valid: Tensor | None = None
        self.user_MF = torch.zeros(0)
        """the vector of each row's user"""
        self.mask_MH: Tensor | float = 1.0
        """what the numbers inside the gate are multiplied by"""

    def shares(self) -> Tensor:
        gate, u = self.gate, self.user_MF
        centred = u - u.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gate["norm_weight"] + gate["norm_bias"]
        inner = torch.relu(normed @ gate["hidden_weight"].T + gate["hidden_bias"]) * self.mask_MH
        return F.softmax((inner @ gate["out_weight"].T + gate["out_bias"]) / self.temperature, dim=-1)

    def forward(self, hidden: Tensor) -> Tensor:
        """[M, S, inputs] -> [M, S, outputs]: each row is one sample."""
        added = []
        for x, share_E in zip(hidden, self.shares(), strict=True):
            if self.mix == "factors":
                a = sum(share * one for share, one in zip(share_E, self.a, strict=True))
                b = sum(share * one for share, one in zip(share_E, self.b, strict=True))
                added.append(x @ (b @ a).T)
            else:
                delta = sum(share * b @ a for share, a, b in zip(share_E, self.a, self.b, strict=True))
                added.append(x @ delta.T)
        return self.base(hidden) + self.scale * torch.stack(added)
