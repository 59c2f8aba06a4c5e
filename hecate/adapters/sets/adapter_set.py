"""What a set of terms is, what several must have in common to become one, and what an operation returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from hecate.adapters.description import Description
from hecate.adapters.folder import CHAT_TEMPLATE
from hecate.adapters.sets.terms import Terms, joined, relative_error
from hecate.data.chat.templates import FILE
from hecate.errors import UserError

AnyDescription = TypeVar("AnyDescription", bound=Description)
EXACT = 1e-12
"""the largest relative error of what is called exact: rounding in float64"""


@dataclass(frozen=True)
class AdapterSet:
    """An adapter as terms by module. They are read when they are asked for, so that one module at a time is in memory."""

    name: str
    """for messages: its folder, or what it was made of"""
    description: Description
    rank: int
    """the number of terms of every module"""
    scale: float
    """what is folded into B, and is taken out again where the adapter is written"""
    sizes: Mapping[str, tuple[int, int]]
    """module -> (inputs, outputs). An expert's name ends with its number."""
    read: Callable[[str], Terms]
    """a function that returns the terms of a module, `rank` of them; it raises UserError where they cannot be read or made"""
    others: Mapping[str, Tensor] = field(default_factory=dict)
    """what the adapter has beside pairs, by its tensor's name: what routers consist of"""
    base_digest: str | None = None
    """of the base model's files (`hecate.model.files.model_digest`); None: the base model was not found"""
    dtype: torch.dtype = torch.float32
    """in which it is written"""
    made: Mapping[str, Any] = field(default_factory=dict)
    """by which operation, and of what, as JSON values; empty for an adapter that was read"""


@dataclass(frozen=True)
class Merged:
    """What an operation returns: a set, and for each module the sums that its terms stand for."""

    result: AdapterSet
    targets: Callable[[str], Sequence[Terms]]

    def error(self, module: str, found: Terms | None = None) -> float:
        """Return a module's relative error in the Frobenius norm.

        Args:
            found: its terms, if they have been read; None: they are read.
        """
        return relative_error(self.result.read(module) if found is None else found, self.targets(module))

    def errors(self) -> dict[str, float]:
        """Return the relative error of each module. The result is exact if none is above `EXACT`."""
        return {module: self.error(module) for module in self.result.sizes}


def require_alike(sets: Sequence[AdapterSet]) -> None:
    """Check that sets can become one.

    Raises:
        UserError: they differ in form, base model, modules, their sizes, routers, or chat templates.
    """
    first = sets[0]
    for other in sets[1:]:
        if type(other.description) is not type(first.description):
            raise UserError(
                f"{other.name} is {other.description.what}, but {first.name} is {first.description.what}\n"
                "  adapters of different forms have no modules in common"
            )
        _require_one_base(first, other)
        _require_same_modules(first, other)
        if not _same_routing(first, other):
            raise UserError(
                f"{other.name} and {first.name} have different routers, so that their experts of one number are not for the same tokens\n"
                "  adapters with equal routers can be merged, such as those of runs that began with the same and did not train them"
            )
        if len({one.description.extra.get(CHAT_TEMPLATE) for one in (first, other)}) > 1:
            raise UserError(
                f"{other.name} and {first.name} were trained with different chat templates, and what is made of them can have one\n"
                f"  put a {FILE} with the same text into both folders, or into neither, if the difference does not matter"
            )


def require_weights(sets: Sequence[AdapterSet], weights: Sequence[float]) -> None:
    """Raises UserError: there is not one weight for each set, one is 0 or no number, or their sum is not 1."""
    if len(weights) != len(sets):
        raise UserError(f"{len(weights)} weights were given for {len(sets)} adapters\n  give one for each, in their order")
    for one, weight in zip(sets, weights, strict=True):
        if not math.isfinite(weight) or weight == 0:
            raise UserError(f"the weight of {one.name} is {weight:g}, so that it would add nothing\n  leave the adapter out")
    if abs(math.fsum(weights) - 1) > 1e-6:
        raise UserError(
            f"the weights {', '.join(f'{weight:g}' for weight in weights)} have the sum {math.fsum(weights):g}, which must be 1\n"
            "  divide each by the sum; of trainings on different amounts of data, a weight is the share of the samples"
        )


def require_equal_ranks(sets: Sequence[AdapterSet], what: str) -> None:
    """Raises UserError: ranks differ, so that the factors of one have no counterpart in the other.

    Args:
        what: the operation's name.
    """
    for other in sets[1:]:
        if other.rank != sets[0].rank:
            raise UserError(
                f"{other.name} has rank {other.rank}, but {sets[0].name} rank {sets[0].rank}: {what} is of factors of one rank\n"
                "  use stack, which takes adapters of any ranks, or lego"
            )


def combined(
    sets: Sequence[AdapterSet],
    weights: Sequence[float],
    rank: int,
    make: Callable[[list[Terms]], Terms],
    *,
    method: str,
    keeps_scale: bool = False,
    stands_for: float = 1.0,
    options: Mapping[str, Any] | None = None,
) -> Merged:
    """Return the set that an operation makes of alike sets, module by module.

    Args:
        rank: the result's.
        make: a function of a module's terms in all sets that returns the result's; a UserError of it is told with the module.
        keeps_scale: factors keep their meaning, so that the result has the scale of the sets if they have the same one.
        stands_for: the result stands for this multiple of the weighted sum.
        options: what the operation was told, by name, as JSON values.

    Raises:
        UserError: see `require_alike` and `require_weights`.
    """
    require_alike(sets)
    require_weights(sets, weights)
    first = sets[0]
    scale = first.scale if keeps_scale and rank == first.rank and len({one.scale for one in sets}) == 1 else 1.0

    def read(module: str) -> Terms:
        try:
            return make([one.read(module) for one in sets])
        except UserError as error:
            raise UserError(f"{module}: {error}") from error

    def targets(module: str) -> list[Terms]:
        return [joined([one.read(module).times(stands_for * weight) for one, weight in zip(sets, weights, strict=True)])]

    made = {"method": method, "of": [one.name for one in sets], "weights": list(weights), **(options or {})}
    result = replace(
        first,
        name=f"{method} of {', '.join(one.name for one in sets)}",
        description=described(first.description, rank, None if scale == first.scale and rank == first.rank else 1.0),
        rank=rank,
        scale=scale,
        read=read,
        base_digest=next((one.base_digest for one in sets if one.base_digest), None),
        dtype=max((one.dtype for one in sets), key=lambda dtype: dtype.itemsize),
        made=made,
    )
    return Merged(result, targets)


def described(description: AnyDescription, rank: int, scale: float | None) -> AnyDescription:
    """Return an adapter's description with another rank, without what is said of its training.

    Args:
        scale: None: rank and scale are the same as before; otherwise 1, so that alpha is the rank.
    """
    extra = {name: value for name, value in description.extra.items() if name not in ("training", "ranks", "drawn")}
    if scale is None:
        return replace(description, extra=extra)
    assert scale == 1.0
    return replace(description, r=rank, alpha=rank, use_rslora=False, extra=extra)


def _require_one_base(first: AdapterSet, other: AdapterSet) -> None:
    names = [one.description.base_model_name_or_path for one in (first, other)]
    if first.base_digest is not None and other.base_digest is not None:
        if first.base_digest != other.base_digest:
            raise UserError(
                f"{other.name} is for another base model than {first.name}: {names[1]} and {names[0]} have different weights\n"
                "  an adapter means nothing over other weights than those that it was trained on"
            )
    elif names[0] != names[1]:
        lost = first if first.base_digest is None else other
        raise UserError(
            f"{other.name} is for {names[1]}, and {first.name} for {names[0]}; whether both are the same is not known, because the base\n"
            f"  model of {lost.name} is not there\n  if they are, say where it is now: --model PATH"
        )


def _require_same_modules(first: AdapterSet, other: AdapterSet) -> None:
    for one, without in ((first, other), (other, first)):
        if missing := [module for module in one.sizes if module not in without.sizes]:
            raise UserError(
                f"{without.name} has no pair for {missing[0]} ({len(missing)} such), but {one.name} has one\n"
                "  only adapters of the same modules are merged"
            )
    for module, sizes in first.sizes.items():
        if other.sizes[module] != sizes:
            shapes = [f"{outputs} x {inputs}" for inputs, outputs in (other.sizes[module], sizes)]
            raise UserError(f"{other.name} has {module} of {shapes[0]}, but {first.name} of {shapes[1]}: their base models differ in shape")


def _same_routing(first: AdapterSet, other: AdapterSet) -> bool:
    choices = ("router", "top_k")
    return (
        first.others.keys() == other.others.keys()
        and all(torch.equal(tensor, other.others[name]) for name, tensor in first.others.items())
        and all(getattr(first.description, key, None) == getattr(other.description, key, None) for key in choices)
    )
