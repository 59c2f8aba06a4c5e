"""Adapter folders of every format as sets of terms, and back. What modules are called, a `Description` says (`places`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hecate.adapters.description import Adapter, Description
from hecate.adapters.folder import WEIGHTS, refuse_existing, write_adapter_folder
from hecate.adapters.format_table import read_adapter
from hecate.adapters.model_files import DTYPE_NAMES, blocks
from hecate.adapters.peft.description import LoraDescription
from hecate.adapters.peft.reading import with_one_rank
from hecate.adapters.places import stored
from hecate.adapters.sets.adapter_set import AdapterSet, Merged
from hecate.adapters.sets.terms import Terms
from hecate.checkpoint.layout import TensorEntry
from hecate.errors import UserError
from hecate.io.durable import write_durable
from hecate.model.files.load import resolve_model
from hecate.model.files.model_digest import model_digest


def read_set(folder: Path, base: str | None = None) -> AdapterSet:
    """Read an adapter folder of any format. Tensors are mapped from the file where its format allows that.

    Args:
        base: name or path of its base model; None: the one that the adapter names.

    Raises:
        UserError: a file, a key or a tensor is missing or wrong, or no term can be taken out of such an adapter without its router.
    """
    return set_of(read_adapter(folder).on(base))


def set_of(adapter: Adapter) -> AdapterSet:
    """Return the set of an adapter that has been read.

    Raises:
        UserError: a tensor is missing, or no term can be taken out of such an adapter without its router.
    """
    tensors, description = adapter.tensors, adapter.description
    if isinstance(description, LoraDescription):
        tensors, description = with_one_rank(tensors, description)
    description.require_terms(adapter.folder)
    places = description.places(tensors)
    sizes = {}
    for module, place in places.items():
        for name in (place.name_a, place.name_b):
            if name not in tensors:
                raise UserError(f"{adapter.folder}: has no tensor {name}")
        a, b = tensors[place.name_a], tensors[place.name_b]
        ranks = a.shape[0], b.shape[-1]
        if len(set(ranks)) > 1 or (ranks[0] != description.r if place.expert is None else ranks[0] % description.r):
            raise UserError(f"{adapter.folder}: {place.name_a} and its B have the ranks {ranks}, which are not {description.r}")
        sizes[module] = a.shape[1], b.shape[0]
    if not places:
        raise UserError(f"{adapter.folder}: holds no pair of A and B")

    def read(module: str) -> Terms:
        a, b = places[module].pair(tensors, description.r)
        return Terms(a.to(torch.float64), description.scale * b.to(torch.float64))

    used = {name for place in places.values() for name in (place.name_a, place.name_b)}
    some = tensors[next(iter(places.values())).name_a]
    return AdapterSet(
        name=str(adapter.folder),
        description=description,
        rank=description.r,
        scale=description.scale,
        sizes=sizes,
        read=read,
        others={name: tensor for name, tensor in tensors.items() if name not in used},
        base_digest=_digest(description.base_model_name_or_path),
        dtype=torch.promote_types(some.dtype, torch.float32),
    )


@dataclass(frozen=True)
class Written:
    """What `write_set` has written."""

    errors: Mapping[str, float]
    """the relative error of each module, before rounding to the type of the file"""
    num_bytes: int
    """of the file with the weights"""


def write_set(merged: Merged, folder: Path, progress: Callable[[int, int, str], None] | None = None) -> Written:
    """Write a result to the new folder `folder`, in the form of the adapters that it was made of; all of it or nothing.

    Modules are computed, measured and written one at a time; of an MoE model's experts in PEFT's format those of one projection of a layer.

    Args:
        progress: is told how many modules are done, of how many, and which is next.

    Raises:
        UserError: the folder exists, a module cannot be computed or is not finite, or the disk fails.
    """
    refuse_existing(folder)
    one = merged.result
    groups: dict[str, list[str]] = {}
    """the name of an A in the file -> the modules whose pairs it holds"""
    place_of = {module: one.description.place(module) for module in one.sizes}
    for module, place in place_of.items():
        groups.setdefault(place.name_a, []).append(module)
    entries = {name: TensorEntry(WEIGHTS, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), "") for name, tensor in one.others.items()}
    name_a_of = {}
    for name_a, modules in groups.items():
        name_b, (inputs, outputs), rows = place_of[modules[0]].name_b, one.sizes[modules[0]], one.rank * len(modules)
        entries[name_a] = TensorEntry(WEIGHTS, DTYPE_NAMES[one.dtype], (rows, inputs), "")
        entries[name_b] = TensorEntry(WEIGHTS, DTYPE_NAMES[one.dtype], (outputs, rows), "")
        name_a_of[name_a] = name_a_of[name_b] = name_a
    errors: dict[str, float] = {}
    ready: dict[str, Tensor] = {}

    def computed(module: str) -> Terms:
        if progress is not None:
            progress(len(errors), len(one.sizes), module)
        terms = one.read(module)
        errors[module] = merged.error(module, terms)
        found = Terms(terms.a_rI.to(one.dtype), (terms.b_Or / one.scale).to(one.dtype))
        if not bool(found.a_rI.isfinite().all() and found.b_Or.isfinite().all()):
            raise UserError(f"{module}: the result is not finite in {one.dtype}")
        return found

    def fetch(name: str) -> Tensor:
        if name in one.others:
            return one.others[name].contiguous()
        if name not in ready:
            modules = groups[name_a_of[name]]
            terms = [computed(module) for module in modules]
            ready.update(stored([place_of[module] for module in modules], [found.a_rI for found in terms], [found.b_Or for found in terms]))
        return ready.pop(name).contiguous()

    num_bytes = 0

    def write_weights(staging: Path) -> Description:
        nonlocal num_bytes
        num_bytes = write_durable(staging / WEIGHTS, blocks(entries, fetch))
        return with_provenance(one, max(errors.values())).description

    with one_thread():
        write_adapter_folder(folder, write_weights)
    return Written(errors, num_bytes)


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute with one thread meanwhile: matrices of few ranks are done sooner than several threads have agreed on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_provenance(one: AdapterSet, error: float) -> AdapterSet:
    """Return a set whose description says how it was made, and with which largest relative error."""
    extra = {**one.description.extra, "merged": {**one.made, "relative_error": float(f"{error:.3g}")}}
    return replace(one, description=replace(one.description, extra=extra))


def _digest(name: str) -> str | None:
    try:
        return model_digest(resolve_model(name))
    except UserError:
        return None
