"""Where in an adapter's tensors the pair of a module is: in two of its own, or in two that all experts of a projection have together.

Joined as PEFT has them, A is expert-major, A.view(E, r, I), and B is rank-major, B.view(O, r, E).

Shapes: E experts, r rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hecate.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where the pair of a module is."""

    name_a: str
    name_b: str
    expert: int | None = None
    """its number, where both tensors are those of all experts"""
    half: int | None = None
    """of joined experts: 0 for gate's rows of a B that has those of gate and up, 1 for up's; the others are zero. None: all rows"""

    def pair(self, tensors: Mapping[str, Tensor], rank: int) -> tuple[Tensor, Tensor]:
        """Return A [r, I] and B [O, r]. Raises UserError: B has numbers in the half that is not this module's."""
        a, b = tensors[self.name_a], tensors[self.name_b]
        if self.expert is None:
            return a, b
        experts = a.shape[0] // rank
        b_Or = expert_b(b, self.expert, experts)
        if self.half is not None:
            halves = b_Or.chunk(2)
            if halves[1 - self.half].any():
                wanted, other = ("gate_proj", "up_proj")[:: 1 if self.half == 0 else -1]
                raise UserError(
                    f"lora.target_modules names {wanted} without {other}, but {self.name_b} has numbers for {other}\n  name both"
                )
            b_Or = halves[self.half]
        return expert_a(a, self.expert, experts), b_Or


def join_a(a_ErI: Tensor) -> Tensor:
    """Join the A of all experts into PEFT's [E·r, I]."""
    return a_ErI.flatten(0, 1)


def join_b(b_EOr: Tensor) -> Tensor:
    """Join the B of all experts into PEFT's [O, r·E]."""
    return b_EOr.permute(1, 2, 0).flatten(1)


def expert_a(joined: Tensor, expert: int, experts: int) -> Tensor:
    """Return the A of one expert, [r, I], from PEFT's [E·r, I]."""
    return joined.view(experts, -1, joined.shape[1])[expert]


def expert_b(joined: Tensor, expert: int, experts: int) -> Tensor:
    """Return the B of one expert, [O, r], from PEFT's [O, r·E]."""
    return joined.view(joined.shape[0], -1, experts)[:, :, expert]


def stored(places: Sequence[Place], a_ErI: Tensor | Sequence[Tensor], b_EOr: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    """Return pairs under the names of their places: those of all experts of a projection, in their order, or any that are not joined."""
    if places[0].expert is None:
        pairs = zip(places, a_ErI, b_EOr, strict=True)
        return {name: one for place, a_rI, b_Or in pairs for name, one in ((place.name_a, a_rI), (place.name_b, b_Or))}
    a, b = (one if isinstance(one, Tensor) else torch.stack(list(one)) for one in (a_ErI, b_EOr))
    if (half := places[0].half) is not None:
        b = torch.nn.functional.pad(b, (0, 0, b.shape[1] * half, b.shape[1] * (1 - half)))
    return {places[0].name_a: join_a(a), places[0].name_b: join_b(b)}
