"""Random numbers named by what they are for, so that no result depends on how many ranks there are or in which order they work."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hecate.errors import UserError
from hecate.parallel.values.units import FFN, Unit

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def generator(*name: int | str) -> torch.Generator:
    """A CPU generator for one purpose, such as (seed, "expert", layer, expert, "gate_proj")."""
    import torch

    return torch.Generator().manual_seed(_number(*name))


def unit_numbers(unit: Unit) -> tuple[int, ...]:
    """Numbers that no other unit has, for keys that are made of numbers: the layer, and for another place than its FFN one of its name."""
    return (unit.layer,) if unit.place == FFN else (unit.layer, _number(unit.place))


def name_number(name: str) -> int:
    """A number of 48 bits that stands for a name among numbers that are hashed."""
    return _number(name) >> 15


def linear_weight(outputs: int, inputs: int, source: torch.Generator) -> Tensor:
    """float64 [outputs, inputs]: Kaiming uniform with a = sqrt(5), that is U(-1/sqrt(inputs), 1/sqrt(inputs)), as torch's nn.Linear."""
    import torch

    bound = 1 / math.sqrt(inputs)
    return torch.empty(outputs, inputs, dtype=torch.float64).uniform_(-bound, bound, generator=source)


def require_drawn(given_rI: Tensor, drawn_rI: Tensor, what: str) -> None:
    """Compare the A of an adapter with the one that its seed draws, in float32, in which adapters are written.

    Raises:
        UserError: they differ. `what` names the pair in the message.
    """
    if not given_rI.float().cpu().equal(drawn_rI.float().cpu()):
        raise UserError(
            f"lora.pairs: fixed_a: the adapter's A of {what} is not the one that the configured seed draws, and only B would be trained\n"
            "  give the seed of the run that trained the adapter, or lora.pairs=plain, which trains the adapter's own A on"
        )


def digest_of_drawn(drawn: Iterable[Tensor]) -> str:
    """32 hexadecimal digits of tensors' values in float32 and of their order, wherever they are: the same on every rank that drew them."""
    hashed = hashlib.blake2b(digest_size=16)
    for tensor in drawn:
        hashed.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return hashed.hexdigest()


def combined_digest(digests: Iterable[str]) -> str:
    """One digest of several, each counted once and empty ones left out; empty: there is none."""
    distinct = [digest for digest in dict.fromkeys(digests) if digest]
    if len(distinct) < 2:
        return "".join(distinct)
    return hashlib.blake2b("".join(distinct).encode(), digest_size=16).hexdigest()


def _number(*name: int | str) -> int:
    """A hash of a name, of 63 bits."""
    digest = hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
