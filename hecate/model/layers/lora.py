"""LoRA on a linear layer (attention projections): trained on every rank alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hecate.experts.forward_pass import CurrentPass
from hecate.experts.pairs.gradient_rules import ruled_pairs
from hecate.experts.pairs.source_table import trains_a
from hecate.experts.seeding import generator, linear_weight, require_drawn
from hecate.kernels.backend import Backend, expert_kernels
from hecate.kernels.common.dropout import Dropout, TokenDropout, dropout_key
from hecate.parallel.values.expert_kinds import LoraShape


class LoraLinear(nn.Module):
    """W x + s · B A dropout(x), W frozen. A and B are kept in `dtype` and computed with in x's.

    Where A does not train (`trains_a`), it is a buffer, which every rank draws from the seed and nothing saves.
    """

    lora_A: Tensor

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
        a_rI = a_rI.to(device=device, dtype=dtype)
        if trains_a(shape):
            self.lora_A = nn.Parameter(a_rI)
        else:
            self.register_buffer("lora_A", a_rI, persistent=False)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, shape.rank, device=device, dtype=dtype))
        # One stream a module: a hash of its name, since all modules of a step share the key.
        self._stream = int(torch.randint(1 << 30, (), generator=generator("dropout stream", path)))
        self._path, self._seed = path, seed
        self._current = current
        self._kernels: Backend = kernels

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by the matrix's letter: A and B, or B alone."""
        matrices = {"A": self.lora_A, "B": self.lora_B}
        return {letter: matrix for letter, matrix in matrices.items() if isinstance(matrix, nn.Parameter)}

    @torch.no_grad()
    def set_pair(self, a_rI: Tensor, b_Or: Tensor) -> None:
        """Take the values of a saved adapter. Raises UserError: A does not train, and the adapter's is another than the drawn one."""
        if trains_a(self.shape):
            self.lora_A.copy_(a_rI)
        else:
            require_drawn(a_rI, self.lora_A, f"layer {self._path}")
        self.lora_B.copy_(b_Or)

    def forward(self, x: Tensor) -> Tensor:
        forward, of_tokens = self._current.now, None
        if self.shape.dropout > 0 and torch.is_grad_enabled() and forward is not None and forward.tokens.number is not None:
            dropout = Dropout(self.shape.dropout, dropout_key(self._seed, forward.step))
            of_tokens = TokenDropout(dropout, forward.tokens.number, self._stream)
        base, shape, lora_linear = self.base, self.shape, expert_kernels(self._kernels, x, self.shape.widest).lora_linear
        y = lora_linear(x.flatten(0, -2), base.weight, base.bias, ruled_pairs(shape, self.lora_A, self.lora_B), of_tokens)
        return y.view(*x.shape[:-1], y.shape[-1])
