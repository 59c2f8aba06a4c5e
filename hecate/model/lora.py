"""Plain LoRA on a linear layer (attention projections): trained on every rank alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hecate.experts.forward_pass import CurrentPass
from hecate.experts.seeding import generator, linear_weight
from hecate.kernels.backend import Backend, expert_kernels
from hecate.kernels.common.dropout import Dropout, TokenDropout, dropout_key
from hecate.parallel.expert_kinds import LoraShape


class LoraLinear(nn.Module):
    """W x + s · B A dropout(x), W frozen. A and B are kept in `dtype` and computed with in x's."""

    def __init__(
        self,
        base: nn.Linear,
        shape: LoraShape,
        *,
        path: str,
        seed: int,
        dtype: torch.dtype,
        current: CurrentPass,
        kernels: Backend = "auto",
    ) -> None:
        super().__init__()
        self.base = base
        self.shape = shape
        device = base.weight.device
        a_rI = linear_weight(shape.rank, base.in_features, generator(seed, "lora", path))
        self.lora_A = nn.Parameter(a_rI.to(device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, shape.rank, device=device, dtype=dtype))
        # One stream a module: a hash of its name, since all modules of a step share the key.
        self._stream = int(torch.randint(1 << 30, (), generator=generator("dropout stream", path)))
        self._seed = seed
        self._current = current
        self._kernels: Backend = kernels

    def forward(self, x: Tensor) -> Tensor:
        forward, of_tokens = self._current.now, None
        if self.shape.dropout > 0 and torch.is_grad_enabled() and forward is not None and forward.tokens.number is not None:
            dropout = Dropout(self.shape.dropout, dropout_key(self._seed, forward.step))
            of_tokens = TokenDropout(dropout, forward.tokens.number, self._stream)
        base, lora_linear = self.base, expert_kernels(self._kernels, x, self.shape.rank).lora_linear
        y = lora_linear(x.flatten(0, -2), base.weight, base.bias, self.lora_A, self.lora_B, self.shape.scale, of_tokens)
        return y.view(*x.shape[:-1], y.shape[-1])
