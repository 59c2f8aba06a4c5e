"""The server's side of a round: what comes of the messages of the clients, as sets of terms (`hecate.adapters.sets`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hecate.adapters.folder import save_adapter
from hecate.adapters.sets.adapter_set import AdapterSet, Merged, described
from hecate.adapters.sets.lego import lego
from hecate.adapters.sets.refine import refine
from hecate.adapters.sets.sums import average, stack
from hecate.adapters.sets.terms import Terms, joined, norm
from hecate.apps.federate.client import ClientPlan, Described, peft_tensors, read_message
from hecate.apps.federate.codec import decode
from hecate.apps.federate.section.settings import RoundsConfig
from hecate.apps.federate.server_optimizer import ServerState, server_step
from hecate.apps.federate.vectors import Pairs, VectorShape, flat, pairs_of, read_pairs, reader


def begun_with(server: Pairs, shape: VectorShape, of_client: VectorShape) -> torch.Tensor:
    """Return the vector of the server's adapter for a client: the first of its terms, if the client has a smaller rank.

    Args:
        shape: of the server's adapter.
    """
    factor = shape.scale / of_client.scale
    return flat(server if factor == 1.0 else {path: (a_rI, factor * b_Or) for path, (a_rI, b_Or) in server.items()}, of_client)


def received(plan: ClientPlan, begun: torch.Tensor | None) -> Pairs:
    """Return a client's adapter as the server sees it: what its message changes of the server's, or the whole adapter that it holds.

    Args:
        begun: see `begun_with`; None: clients began anew.

    Raises:
        UserError: the message is missing or damaged.
    """
    vector = decode(read_message(plan.up), plan.shape.numel).to(plan.shape.torch_dtype)
    return pairs_of(vector if begun is None else begun + vector, plan.shape)


def adapter_set(name: str, pairs: Pairs, shape: VectorShape, described_as: Described) -> AdapterSet:
    """Return a client's adapter as a set of terms."""
    return AdapterSet(
        name=name,
        description=described_as.of_rank(shape.rank),
        rank=shape.rank,
        scale=shape.scale,
        sizes={site.path: (site.inputs, site.outputs) for site in shape.sites},
        read=reader(pairs, shape),
        dtype=shape.torch_dtype,
    )


def aggregated(sets: Sequence[AdapterSet], weights: Sequence[float], rounds: RoundsConfig) -> Merged:
    """Return what the configured operation makes of the clients' adapters.

    Raises:
        UserError: the operation refuses them.
    """
    if rounds.aggregate == "stack":
        return stack(sets, weights)
    if rounds.aggregate == "refine":
        return refine(sets, weights, ridge=rounds.refine.ridge, distance=rounds.refine.distance)
    if rounds.aggregate == "lego":
        return _beside_mean(lego(sets, weights), len(sets))
    return average(sets, weights, inexact=True)


def stepped(
    state: ServerState, sets: Mapping[str, Pairs], shape: VectorShape, weights: Sequence[float], rounds: RoundsConfig
) -> ServerState:
    """Return the server's state after its optimizer's step by the mean of what clients have changed.

    Args:
        sets: the clients' adapters, of one rank.
    """
    changes = [flat(pairs, shape) - state.vector for pairs in sets.values()]
    mean = torch.stack([weight * change for change, weight in zip(changes, weights, strict=True)]).sum(0)
    return server_step(state, mean, rounds.server)


def whole_error(merged: Merged) -> float:
    """Return the relative error of all modules together, in the Frobenius norm; 0 where there is nothing to miss."""
    missed = whole = 0.0
    for module in merged.result.sizes:
        found, targets = merged.result.read(module), merged.targets(module)
        missed += sum(norm(joined([found, target.times(-1.0)])) ** 2 for target in targets)
        whole += sum(norm(target) ** 2 for target in targets)
    return 0.0 if missed == 0 else math.sqrt(missed / whole) if whole else math.inf


def write_pairs(folder: Path, pairs: Pairs, shape: VectorShape, described_as: Described) -> None:
    """Write pairs as an ordinary adapter, unless the folder is there. Raises UserError: they are not finite, or the disk fails."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_adapter(folder, peft_tensors(pairs), described_as.of_rank(shape.rank))


def sum_of_rounds(folders: Sequence[Path], shape: VectorShape, ranks: Sequence[int], described_as: Described) -> Merged:
    """Return the terms of the results of several rounds beside each other: the sum of what each has added to the base model before it."""
    shapes = [shape.of_rank(rank, 1.0) for rank in ranks]
    reads = [reader(read_pairs(folder, one), one) for folder, one in zip(folders, shapes, strict=True)]
    rank = sum(ranks)

    def read(module: str) -> Terms:
        return joined([one(module) for one in reads])

    first = adapter_set("rounds", {}, shapes[0], described_as)
    made = {"method": "stack", "of": [str(folder) for folder in folders]}
    whole = replace(first, description=described(first.description, rank, 1.0), rank=rank, scale=1.0, read=read, made=made)
    return Merged(whole, lambda module: [read(module)])


def _beside_mean(merged: Merged, count: int) -> Merged:
    """A merge of lego, held to the mean of the adapters instead of their sum.

    Its terms are the means of clusters, so equal clients get their own adapter back; but with a cluster for each term the result would be
    the sum, which is what `lego` is held to.
    """
    return Merged(merged.result, lambda module: [target.times(1 / count) for target in merged.targets(module)])
