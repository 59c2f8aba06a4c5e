"""What trains in a model, as the tensors of an adapter: gathered from the ranks that own the experts, and put back.

A format says under which names (`TensorNames`); all else is the same for all formats.

Shapes: E experts, r rank, I inputs, O outputs, C elements of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hecate.adapters.places import Place, stored
from hecate.errors import UserError
from hecate.experts.routers.router import Router
from hecate.kernels.common.low_rank import LowRankPairs
from hecate.model.gated_ffn import decoder_layers
from hecate.model.moe_model import MoeModel
from hecate.parallel.comm.aborts import arrived
from hecate.parallel.comm.collectives import sparse_all_gather
from hecate.parallel.transfer.transfer_plan import plan_chunks
from hecate.parallel.values.placement import Placement, owners_only
from hecate.parallel.values.units import Unit
from hecate.ranks.ranks import Ranks


def _no_router(_unit: Unit, _part: str) -> None:
    return None


@dataclass(frozen=True)
class TensorNames:
    """What a format calls the tensors of a model."""

    pair: Callable[[Unit, str, int], Place]
    """where the pair of a projection of an expert is"""
    plain: Callable[[int, str], tuple[str, str]]
    """A and B of a linear without experts, by its layer and its name in it"""
    router: Callable[[Unit, str], str | None] = _no_router
    """a parameter or a buffer of a unit's router, by its name in it; None: the adapter does not have it"""


def linear_path(model: nn.Module, layer: int, module: str) -> str:
    """Return the dotted name of a linear in the base model, by its name in its decoder layer."""
    return f"{decoder_layers(model)[0]}.{layer}.{module}"


def gathered(moe: MoeModel, names: TensorNames, ranks: Ranks) -> dict[str, Tensor] | None:
    """Gather what trains on rank 0, one unit at a time; None on other ranks. Every rank must call it."""
    tensors: dict[str, Tensor] = {}
    for unit, of_unit in pairs_on_first(moe, sorted(moe.layers), ranks):
        for projection, pairs in of_unit.items():
            places = [names.pair(unit, projection, expert) for expert in range(len(pairs.a_SrI))]
            tensors |= {name: one.cpu() for name, one in stored(places, pairs.a_SrI.detach(), pairs.b_SOr.detach()).items()}
    if not ranks.is_first:
        return None
    return tensors | {name: tensor.detach() for name, tensor in _replicated(moe, names).items()}


def put_into(moe: MoeModel, names: TensorNames, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Set routers, plain pairs and this rank's owned experts from an adapter's tensors.

    Args:
        where: the adapter's folder, for messages.

    Raises:
        UserError: a tensor is missing, superfluous or of another shape than the model needs, or is fixed in the model and another there.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in _replicated(moe, names).items()}
    require_tensors(tensors, shapes | pair_shapes(moe, names), where)
    try:
        set_pairs(moe, lambda unit, projection, expert, rank: names.pair(unit, projection, expert).pair(tensors, rank))
        for key, lora in moe.attention.items():
            name_a, name_b = names.plain(*key)
            lora.set_pair(tensors[name_a], tensors[name_b])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    with torch.no_grad():
        for name, tensor in _of_routers(moe, names).items():
            tensor.copy_(tensors[name])


def set_pairs(moe: MoeModel, pair_of: Callable[[Unit, str, int, int], tuple[Tensor, Tensor]]) -> None:
    """Set this rank's owned experts.

    Args:
        pair_of: A [r, I] and B [O, r] of a projection of an expert, of the rank that is its last argument.

    Raises:
        UserError: A is drawn, and is another; or the experts' pairs cannot be made of others' matrices.
    """
    with torch.no_grad():
        for (unit, expert), chunk in moe.engine.shards.named_parameters().items():
            source = moe.engine.shards.families[unit].pair_source
            pairs = {projection: pair_of(unit, projection, expert, source.lora.rank) for projection in source.projections}
            chunk.copy_(source.chunk_of(expert, pairs))


def pair_shapes(moe: MoeModel, names: TensorNames) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors with the experts' pairs, by name, the fixed ones among them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for unit, family in moe.engine.shards.families.items():
        source, sizes = family.pair_source, family.sizes
        for projection in source.projections:
            inputs, outputs = sizes.of_projection(projection)
            for expert in range(family.num_experts):
                place = names.pair(unit, projection, expert)
                rows = source.lora.rank * (1 if place.expert is None else family.num_experts)
                shapes |= {place.name_a: (rows, inputs), place.name_b: (outputs if place.half is None else 2 * outputs, rows)}
    return shapes


def _replicated(moe: MoeModel, names: TensorNames) -> dict[str, Tensor]:
    """What every rank has of the adapter, by the tensors' names: what routers have, and plain pairs."""
    named = _of_routers(moe, names)
    for key, lora in moe.attention.items():
        name_a, name_b = names.plain(*key)
        named |= {name_a: lora.lora_A, name_b: lora.lora_B}
    return named


def _of_routers(moe: MoeModel, names: TensorNames) -> dict[str, Tensor]:
    """The routers' parameters, and what they keep beside them, as far as the adapter has them."""
    parts = {(unit, part): tensor for unit, router in moe.router_modules.items() for part, tensor in router_parts(router).items()}
    return {name: tensor for key, tensor in parts.items() if (name := names.router(*key)) is not None}


def router_parts(router: Router) -> dict[str, Tensor]:
    """Return what a router trains, and what it keeps beside that, by name."""
    return {**router.trained, **dict(router.named_buffers())}


def require_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]], where: Path) -> None:
    """Check that an adapter has exactly the tensors that a model needs.

    Args:
        wanted: the shape of each by its name.
        where: the adapter's folder, for messages.

    Raises:
        UserError: a tensor is missing, superfluous or of another shape.
    """
    if missing := sorted(set(wanted) - set(tensors)):
        raise UserError(f"{where}: has no tensor {missing[0]} ({len(missing)} missing), which the base model needs")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise UserError(f"{where}: the tensor {unknown[0]} ({len(unknown)} such) belongs to no weight that the adapter is for")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise UserError(f"{where}: {name} has shape {tuple(tensors[name].shape)}, but the base model needs {tuple(shape)}")


def pairs_on_first(moe: MoeModel, units: Iterable[Unit], ranks: Ranks) -> Iterator[tuple[Unit, dict[str, LowRankPairs]]]:
    """Gather the pairs of all experts, one unit at a time, and yield those of each unit on rank 0, nothing on other ranks.

    Every rank must go through them. A pool that several units draw on is gathered once.
    """
    shards = moe.engine.shards
    pools: dict[Unit, Tensor | None] = {}
    for unit in units:
        source = shards.trained_in[unit]
        if source in shards.pools and source not in pools:
            pools[source] = gather_on_first(moe, source, ranks)
        chunks = pools[source] if source in pools else gather_on_first(moe, source, ranks)
        if chunks is not None:
            family = shards.families[unit]
            yield unit, family.pair_source.stacked(chunks, torch.arange(family.num_experts, device=chunks.device))


def gather_on_first(moe: MoeModel, unit: Unit, ranks: Ranks) -> Tensor | None:
    """Return all master chunks of a unit or a pool, [experts, C], on rank 0 and None on other ranks. Every rank must call it."""
    if not moe.engine.shards.in_first_group:
        return None
    owner_E: np.ndarray = moe.engine.shards.owners[unit]
    where_ED = owners_only(owner_E, moe.engine.shards.world_size).where_ED.copy()
    where_ED[:, 0] = True
    store, placement = moe.engine.shards.stores[unit], Placement(owner_E.copy(), where_ED)
    plan = plan_chunks(placement, store.chunk, None, moe.engine.shards.rank)
    gathered = arrived(sparse_all_gather(store.owned, plan, ranks.groups.experts).wait(), ranks.groups.experts)
    return gathered if ranks.is_first else None
