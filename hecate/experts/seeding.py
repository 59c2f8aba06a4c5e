"""Random numbers named by what they are for, so that no result depends on how many ranks there are or in which order they work."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def generator(*name: int | str) -> torch.Generator:
    """A CPU generator for one purpose, such as (seed, "expert", layer, expert, "gate_proj")."""
    digest = hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def linear_weight(outputs: int, inputs: int, source: torch.Generator) -> Tensor:
    """float64 [outputs, inputs]: Kaiming uniform with a = sqrt(5), that is U(-1/sqrt(inputs), 1/sqrt(inputs)), as torch's nn.Linear."""
    bound = 1 / math.sqrt(inputs)
    return torch.empty(outputs, inputs, dtype=torch.float64).uniform_(-bound, bound, generator=source)
