"""Fewer experts in a mixture: experts that add nearly the same become one, whose terms are clusters of theirs.

The distance of two experts is that of the matrices that they add, ‖B_e A_e - B_f A_f‖ over all projections. K-means needs only the inner
products of experts, so that no such matrix is formed. A router's row for several experts is the mean of their rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from hecate.adapters.description import MixtureDescription
from hecate.adapters.sets.adapter_set import AdapterSet, Merged, described
from hecate.adapters.sets.lego import cluster_labels, clustered, require_scikit_learn
from hecate.adapters.sets.terms import Terms, inner, joined
from hecate.errors import UserError

_EXPERT = re.compile(r"(.+)\.experts\.(\d+)")
_LAYER = re.compile(r"layers\.\d+")


def fewer_experts(one: AdapterSet, experts: int, *, rank: int | None = None) -> Merged:
    """Return a mixture in which no layer has more than `experts` experts. Layers that have no more stay as they are.

    Each new expert stands for all that it replaces, and its error is against them. What the means of a router's rows change is not in it.

    Args:
        rank: of the new experts, and of all other pairs; None: the set's.

    Raises:
        UserError: the adapter has no routers of its own, `experts` is too small for its routers or not below what it has, `rank` is above
            the set's, or scikit-learn is missing.
    """
    description = one.description
    if not isinstance(description, MixtureDescription):
        raise UserError(
            f"{one.name} is {description.what}: its experts are those of its base model\n  its ranks can be fewer: give a rank alone"
        )
    require_scikit_learn()
    least, most = max(2, 1 if description.router.takes_all else description.top_k), max(description.experts_per_layer) - 1
    if not least <= experts <= most:
        raise UserError(
            f"experts {experts}: {one.name} has up to {most + 1} in a layer, of which a token goes to {description.top_k}\n"
            + (f"  give from {least} to {most}" if least <= most else "  they cannot be made fewer")
        )
    new_rank = _new_rank(one, rank)
    unit_of = {module: _unit(module, match[1]) for module in one.sizes if (match := _EXPERT.fullmatch(module))}
    modules_of: dict[str, dict[str, list[str]]] = {}
    """unit -> projection -> the modules of its experts, by their numbers"""
    for module, unit in sorted(unit_of.items(), key=lambda item: int(item[0].rpartition(".")[2])):
        modules_of.setdefault(unit, {}).setdefault(module.rpartition(".experts.")[0], []).append(module)

    @cache
    def members(unit: str) -> tuple[tuple[int, ...], ...]:
        """Of each new expert, the numbers of those that it replaces."""
        return _clusters(one, modules_of[unit], experts)

    def replaced(module: str) -> list[str]:
        match = _EXPERT.fullmatch(module)
        if match is None:
            return [module]
        return [f"{match[1]}.experts.{number}" for number in members(unit_of[module])[int(match[2])]]

    def read(module: str) -> Terms:
        parts = [one.read(part) for part in replaced(module)]
        return parts[0] if len(parts) == 1 and new_rank == one.rank else clustered(joined(parts), new_rank, mean_norms=True)

    counts = tuple(min(experts, count) for count in description.experts_per_layer)
    kept = [module for module in one.sizes if module not in unit_of or int(module.rpartition(".")[2]) < experts]
    result = replace(
        one,
        name=f"{experts} experts of {one.name}",
        description=described(description, new_rank, None if new_rank == one.rank else 1.0).with_experts(counts),
        rank=new_rank,
        scale=one.scale if new_rank == one.rank else 1.0,
        sizes={module: one.sizes[module] for module in kept},
        read=read,
        others=_routers(one.others, {description.router_prefix(unit): members(unit) for unit in modules_of}),
        made={"method": "lego", "of": [one.name], "experts": experts, "rank": new_rank},
    )
    return Merged(result, lambda module: [one.read(part) for part in replaced(module)])


def _new_rank(one: AdapterSet, rank: int | None) -> int:
    """Of a set's pairs when they are made fewer; None: as they have. Raises UserError: it is above theirs."""
    if rank is None:
        return one.rank
    if not 1 <= rank <= one.rank:
        raise UserError(f"rank {rank}: {one.name} has rank {one.rank}\n  give a rank from 1 to {one.rank}")
    return rank


def _unit(module: str, projection: str) -> str:
    """What shares a router: an FFN's projections do, which are named by their layer; a linear has its own."""
    return match[0] if (match := _LAYER.match(module)) else projection


def _clusters(one: AdapterSet, projections: Mapping[str, list[str]], experts: int) -> tuple[tuple[int, ...], ...]:
    number = len(next(iter(projections.values())))
    gram_EE = np.zeros((number, number))
    for modules in projections.values():
        terms = [one.read(module) for module in modules]
        gram_EE += [[inner(row, column) for column in terms] for row in terms]
    values_E, vectors_EE = np.linalg.eigh((gram_EE + gram_EE.T) / 2)
    points_EE = vectors_EE * np.sqrt(values_E.clip(min=0))  # points with these inner products
    label_E = cluster_labels(points_EE, experts)
    found = [tuple(np.flatnonzero(label_E == label).tolist()) for label in dict.fromkeys(label_E.tolist())]
    while len(found) < min(experts, number):  # equal experts, in fewer clusters than there are to be
        largest = max(found, key=len)
        found.remove(largest)
        found += [largest[:1], largest[1:]]
    return tuple(found)


def _routers(others: Mapping[str, Tensor], begins: Mapping[str, tuple[tuple[int, ...], ...]]) -> dict[str, Tensor]:
    """What routers consist of, with fewer rows. `begins`: how the names of each router begin, and the members of its new experts."""
    routers = {}
    for name, tensor in others.items():
        members = next((found for prefix, found in begins.items() if name.startswith(prefix)), None)
        routers[name] = tensor if members is None else torch.stack([tensor[list(numbers)].mean(0) for numbers in members])
    return routers
