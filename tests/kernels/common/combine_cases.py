"""Routed tokens, in several shapes, for the kernels that combine experts' results."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hecate.kernels.common.assignments import AssignmentOrder
from hecate.kernels.common.ffn import ACTIVATIONS
from tests.kernels.grouping import GROUPS, grouped
from tests.kernels.plain_orders import assignment_order


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...] = GROUPS["uneven"]
    elsewhere: int = 5
    k: int = 2
    width: int = 70
    activation: str = "silu"
    dtype: torch.dtype = torch.float32


CASES = {
    **{f"groups: {name}": Case(sizes=sizes, elsewhere=0) for name, sizes in GROUPS.items()},
    **{name: Case(activation=name) for name in ACTIVATIONS},
    "k 1": Case(k=1),
    "k 4": Case(k=4),
    "width 1": Case(width=1),
    "a full block": Case(width=64),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float16": Case(dtype=torch.float16),
}


class Given:
    def __init__(self, case: Case, device: torch.device) -> None:
        self._random = torch.Generator().manual_seed(7)
        self._case, self._device = case, device
        slot_TK = grouped(case.sizes, case.elsewhere, case.k).to(device)
        self.order: AssignmentOrder = assignment_order(slot_TK, len(case.sizes))
        self.weight = self.normal(*slot_TK.shape)
        self.here = int(self.order.starts[-1])

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random).to(self._case.dtype).to(self._device)

    def rows(self, width: int) -> torch.Tensor:
        """As a kernel leaves them: what it does not write is NaN."""
        values = self.normal(self.order.num_assignments, width)
        values[self.here :] = torch.nan
        return values

    def wide(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The rows of assignments on this rank, or all weights, differentiable."""
        return [t[: self.here].double().requires_grad_() if t is not self.weight else t.double().requires_grad_() for t in tensors]
