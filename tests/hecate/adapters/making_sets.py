"""Sets of random terms in memory, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hecate.adapters.peft.description import LoraDescription
from hecate.adapters.sets.adapter_set import AdapterSet
from hecate.adapters.sets.terms import Terms
from tests.plain_sets import Pair

SIZES = {"layers.0.q_proj": (7, 9), "layers.1.down_proj": (11, 6)}


def set_from(pairs: Mapping[str, Pair], name: str = "one", scale: float = 1.0) -> AdapterSet:
    """A set of given terms, whose B have the scale already."""
    rank = len(next(iter(pairs.values()))[0])
    description = LoraDescription(
        base_model_name_or_path="models/tiny",
        r=rank,
        alpha=round(scale * rank),
        use_rslora=False,
        target_modules=("x",),
        target_parameters=(),
    )
    sizes = {module: (a.shape[1], len(b)) for module, (a, b) in pairs.items()}
    return AdapterSet(name, description, rank, scale, sizes, lambda module: Terms(*pairs[module]), dtype=torch.float64)


def random_set(seed: int, rank: int, scale: float = 1.0) -> AdapterSet:
    random = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=random, dtype=torch.float64)

    pairs = {module: (matrix(rank, inputs), scale * matrix(outputs, rank)) for module, (inputs, outputs) in SIZES.items()}
    return set_from(pairs, f"adapter {seed}", scale)


def changed(one: AdapterSet, change: Callable[[Tensor, Tensor], Pair]) -> AdapterSet:
    """The set with every pair changed by a function of A and B."""
    return replace(one, read=lambda module: Terms(*change(*pair_of(one, module))))


def with_a_of(first: AdapterSet, one: AdapterSet) -> AdapterSet:
    """The set with the A of another."""
    return replace(one, read=lambda module: Terms(first.read(module).a_rI, one.read(module).b_Or))


def pair_of(one: AdapterSet, module: str) -> Pair:
    terms = one.read(module)
    return terms.a_rI, terms.b_Or


def sums(one: AdapterSet) -> Tensor:
    """The matrices of all modules, one after another."""
    return torch.cat([(terms.b_Or @ terms.a_rI).flatten() for terms in map(one.read, one.sizes)])
