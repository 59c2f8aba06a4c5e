"""The adapter of a client as one vector, in the order in which messages hold it: by linears, A before B, row by row.

Where A is fixed (`lora.pairs: fixed_a`), the vector is B alone. B is without the scale of its client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hecate.adapters.peft.description import linear_names
from hecate.adapters.peft.reading import load_lora
from hecate.adapters.sets.terms import Terms
from hecate.errors import UserError
from hecate.experts.pairs.sources.fixed_a import drawn_a
from hecate.experts.seeding import generator, linear_weight
from hecate.parallel.values.expert_kinds import ONLY_PROJECTION
from hecate.parallel.values.units import Unit

_NEW_A = ("new A", 0)
"""what new A are drawn by, beside the seed; other ones would change what is recorded in benchmarks/results"""


@dataclass(frozen=True)
class PairSite:
    """A linear of the base model that has a pair."""

    path: str
    """dotted name of the module"""
    layer: int
    place: str
    """in its layer, as units have it"""
    inputs: int
    outputs: int


@dataclass(frozen=True)
class VectorShape:
    """What the numbers of a vector are. Clients of other ranks have vectors of other shapes."""

    sites: tuple[PairSite, ...]
    rank: int
    scale: float
    trains_a: bool
    dtype: str
    """float32, or float64 where the base model computes in it"""
    seed: int
    """by which A is drawn, a new one and a fixed one"""

    @property
    def numel(self) -> int:
        return sum(self.rank * (site.outputs + site.inputs * self.trains_a) for site in self.sites)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def of_rank(self, rank: int, scale: float) -> VectorShape:
        return replace(self, rank=rank, scale=scale)


Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""A [r, inputs] and B [outputs, r], without the scale, by a linear's dotted name"""


def new_pairs(shape: VectorShape) -> Pairs:
    """Return new pairs: A as drawn by the shape's seed, B zero. A of a smaller rank is the first rows of A of a larger one."""
    return {site.path: (_new_a(shape, site), torch.zeros(site.outputs, shape.rank, dtype=shape.torch_dtype)) for site in shape.sites}


def _new_a(shape: VectorShape, site: PairSite) -> Tensor:
    if not shape.trains_a:
        return drawn_a(shape.seed, Unit(site.layer, site.place), ONLY_PROJECTION, (shape.rank, site.inputs)).to(shape.torch_dtype)
    # Row by row, so that the rows do not depend on how many there are.
    rows = [linear_weight(1, site.inputs, generator(shape.seed, *_NEW_A, site.path, row)) for row in range(shape.rank)]
    return torch.cat(rows).to(shape.torch_dtype)


def flat(pairs: Pairs, shape: VectorShape) -> Tensor:
    """Return [n]: the pairs as a vector. Of wider pairs it has the first terms of the shape's rank."""
    parts = []
    for site in shape.sites:
        a_rI, b_Or = pairs[site.path]
        parts += [a_rI[: shape.rank].flatten()] * shape.trains_a + [b_Or[:, : shape.rank].flatten()]
    return torch.cat(parts).to(shape.torch_dtype)


def pairs_of(vector: Tensor, shape: VectorShape) -> Pairs:
    """Return the pairs that a vector holds, views of it but for a fixed A."""
    assert vector.numel() == shape.numel, (vector.numel(), shape.numel)
    pairs, at = {}, 0
    for site in shape.sites:
        if shape.trains_a:
            a_rI = vector[at : at + shape.rank * site.inputs].view(shape.rank, site.inputs)
            at += a_rI.numel()
        else:
            a_rI = _new_a(shape, site)
        b_Or = vector[at : at + shape.rank * site.outputs].view(site.outputs, shape.rank)
        at += b_Or.numel()
        pairs[site.path] = a_rI, b_Or
    return pairs


def reader(pairs: Pairs, shape: VectorShape) -> Callable[[str], Terms]:
    """Return the function by which an `AdapterSet` reads these pairs."""

    def read(module: str) -> Terms:
        a_rI, b_Or = pairs[module]
        return Terms(a_rI.to(torch.float64), shape.scale * b_Or.to(torch.float64))

    return read


def read_pairs(folder: Path, shape: VectorShape) -> Pairs:
    """Return the pairs of an adapter folder, with B for the shape's scale.

    Where the folder has fewer terms than the shape, as after a round without the client of the largest rank, the others are those of new
    pairs: A is drawn and B is zero, so that they are nothing yet, and can be trained.

    Raises:
        UserError: the folder cannot be read, lacks a pair, or has terms beyond the shape's rank.
    """
    tensors, description = load_lora(folder)
    pairs = {}
    for site in shape.sites:
        name_a, name_b = linear_names(site.path)
        if name_a not in tensors or name_b not in tensors:
            raise UserError(f"{folder}: has no pair for {site.path}")
        a_rI, b_Or = tensors[name_a].to(torch.float64), tensors[name_b].to(torch.float64)
        if bool(a_rI[shape.rank :].any()) or bool(b_Or[:, shape.rank :].any()):
            raise UserError(f"{folder}: its pair for {site.path} has more than {shape.rank} terms")
        b_Or = b_Or[:, : shape.rank] * (description.scale / shape.scale)
        missing = shape.rank - b_Or.shape[1]
        if missing > 0:
            a_rI = torch.cat([a_rI, _new_a(shape, site)[-missing:].to(torch.float64)])
            b_Or = F.pad(b_Or, (0, missing))
        pairs[site.path] = a_rI[: shape.rank], b_Or
    return pairs
