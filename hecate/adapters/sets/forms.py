"""Adapter folders of every form as sets of terms, and back.

| form | the name of a module | where its pair is |
|---|---|---|
| a LoRA of linears, in PEFT's format | model.layers.3.self_attn.q_proj | tensors of its own |
| a LoRA of an MoE model's experts, in PEFT's format | model.layers.3.mlp.experts.gate_up_proj.7 | in those of all experts |
| a mixture over FFNs | layers.3.mlp.gate_proj.experts.7 | tensors of its own |
| experts over linears | model.layers.3.self_attn.q_proj.experts.7 | tensors of its own |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hecate.adapters.card import CARD, adapter_card
from hecate.adapters.folder import WEIGHTS, description_files, refuse_existing
from hecate.adapters.forms import Description, ReadAdapter, read_any
from hecate.adapters.linear_format import LinearAdapterConfig, linear_config_to_json, pair_names
from hecate.adapters.mixlora.config import AdapterConfig, config_to_json
from hecate.adapters.model_files import DTYPE_NAMES, blocks
from hecate.adapters.peft.peft_moe import (
    PREFIX,
    PeftMoeConfig,
    expert_a,
    expert_b,
    expert_names,
    join_a,
    join_b,
    linear_names,
    peft_config_to_json,
)
from hecate.adapters.peft.per_expert import experts_paths
from hecate.adapters.sets.adapter_set import AdapterSet, Merged
from hecate.adapters.sets.terms import Terms
from hecate.checkpoint.layout import TensorEntry
from hecate.errors import UserError
from hecate.io.durable import new_folder, write_durable
from hecate.model.files.load import resolve_model
from hecate.model.files.model_digest import model_digest

_MIXLORA_A = re.compile(r"mixlora\.(.+)\.lora_A\.weight")
_LINEAR_A = re.compile(rf"{re.escape(PREFIX)}\.(.+)\.lora_A(?:_(\d+))?\.weight")


@dataclass(frozen=True)
class Place:
    """Where the pair of a module is."""

    name_a: str
    name_b: str
    expert: int | None = None
    """its number, where both tensors are those of all experts"""


def read_set(folder: Path, base: str | None = None) -> AdapterSet:
    """Read an adapter folder of any form. Tensors are mapped from the file where its form allows that.

    Args:
        base: name or path of its base model; None: the one that the adapter names.

    Raises:
        UserError: a file, a key or a tensor is missing or wrong, or no term can be taken out of such an adapter without its router.
    """
    return set_of(read_any(folder).on(base))


def set_of(adapter: ReadAdapter) -> AdapterSet:
    """Return the set of an adapter that has been read.

    Raises:
        UserError: a tensor is missing, or no term can be taken out of such an adapter without its router.
    """
    _refuse_forms(adapter)
    tensors, description = adapter.tensors, adapter.description
    places = places_of(tensors, description)
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
        place = places[module]
        a, b = tensors[place.name_a], tensors[place.name_b]
        if place.expert is not None:
            experts = a.shape[0] // description.r
            a, b = expert_a(a, place.expert, experts), expert_b(b, place.expert, experts)
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
    place_of = {module: place_in_file(module, one.description) for module in one.sizes}
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
            name_a = name_a_of[name]
            place, terms = place_of[groups[name_a][0]], [computed(module) for module in groups[name_a]]
            if place.expert is None:
                ready[name_a], ready[place.name_b] = terms[0].a_rI, terms[0].b_Or
            else:
                ready[name_a] = join_a(torch.stack([found.a_rI for found in terms]))
                ready[place.name_b] = join_b(torch.stack([found.b_Or for found in terms]))
        return ready.pop(name).contiguous()

    try:
        with one_thread(), new_folder(folder) as staging:
            num_bytes = write_durable(staging / WEIGHTS, blocks(entries, fetch))
            value = _json_of(with_provenance(one, max(errors.values())).description)
            for name, content in description_files(value).items():
                write_durable(staging / name, [content])
            write_durable(staging / CARD, [adapter_card(value)])
    except OSError as error:
        raise UserError(f"{folder}: the adapter cannot be written: {error.strerror}") from error
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


def places_of(tensors: Mapping[str, Tensor], description: Description) -> dict[str, Place]:
    """Return the place of each module that an adapter has a pair for, by the module's name, in the order of the tensors."""
    places: dict[str, Place] = {}
    if isinstance(description, AdapterConfig):
        modules = [match[1] for name in tensors if (match := _MIXLORA_A.fullmatch(name))]
        return {module: place_in_file(module, description) for module in modules}
    if isinstance(description, PeftMoeConfig):
        for path in experts_paths(tensors):
            for projection, (name_a, name_b) in expert_names(path, description.projections).items():
                for expert in range(tensors[name_a].shape[0] // description.r if name_a in tensors else 1):
                    places[f"{path}.{projection}.{expert}"] = Place(name_a, name_b, expert)
    of_experts = {place.name_a for place in places.values()}
    for name in tensors:
        if name not in of_experts and (match := _LINEAR_A.fullmatch(name)):
            module = match[1] if match[2] is None else f"{match[1]}.experts.{match[2]}"
            places[module] = place_in_file(module, description)
    return places


def place_in_file(module: str, description: Description) -> Place:
    """Return where the pair of a module is in a file of the form that a description is of."""
    path, _, number = module.rpartition(".")
    if isinstance(description, AdapterConfig):
        return Place(f"mixlora.{module}.lora_A.weight", f"mixlora.{module}.lora_B.weight")
    if not number.isdigit():
        return Place(*linear_names(module))
    if isinstance(description, LinearAdapterConfig):
        return Place(*pair_names(path.removesuffix(".experts"), int(number)))
    experts_path, _, projection = path.rpartition(".")
    if projection not in description.projections:  # a linear whose own name is a number
        return Place(*linear_names(module))
    return Place(*expert_names(experts_path, description.projections)[projection], expert=int(number))


def _refuse_forms(adapter: ReadAdapter) -> None:
    description = adapter.description
    if not isinstance(description, LinearAdapterConfig):
        return
    if description.router.by_user:
        raise UserError(
            f"{adapter.folder}: its experts are mixed by users (RecLoRA), and their sum depends on the user\n"
            "  write the LoRA of one user with hecate export --user, and merge that"
        )
    if description.r == 1 and description.router.score == "sigmoid":
        raise UserError(
            f"{adapter.folder}: each of its experts is one rank with a router's row of its own (SMoRA), and a merged term has none\n"
            "  merge adapters whose experts have a higher rank"
        )


def _digest(name: str) -> str | None:
    try:
        return model_digest(resolve_model(name))
    except UserError:
        return None


def _json_of(description: Description) -> dict[str, Any]:
    if isinstance(description, AdapterConfig):
        return config_to_json(description)
    if isinstance(description, LinearAdapterConfig):
        return linear_config_to_json(description)
    return peft_config_to_json(description)
