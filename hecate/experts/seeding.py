"""Random numbers named by what they are for, so that no result depends on how many ranks there are or in which order they work."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from hecate.parallel.units import FFN, Unit


def generator(*name: int | str) -> torch.Generator:
    """A CPU generator for one purpose, such as (seed, "expert", layer, expert, "gate_proj")."""
    return torch.Generator().manual_seed(_number(*name))


def unit_numbers(unit: Unit) -> tuple[int, ...]:
    """Numbers that no other unit has, for keys that are made of numbers: the layer, and for another place than its FFN one of its name."""
    return (unit.layer,) if unit.place == FFN else (unit.layer, _number(unit.place))


def linear_weight(outputs: int, inputs: int, source: torch.Generator) -> Tensor:
    """float64 [outputs, inputs]: Kaiming uniform with a = sqrt(5), that is U(-1/sqrt(inputs), 1/sqrt(inputs)), as torch's nn.Linear."""
    bound = 1 / math.sqrt(inputs)
    return torch.empty(outputs, inputs, dtype=torch.float64).uniform_(-bound, bound, generator=source)


def _number(*name: int | str) -> int:
    """A hash of a name, of 63 bits."""
    digest = hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
