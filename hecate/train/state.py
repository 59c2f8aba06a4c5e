"""A run's state in checkpoints: each owner's experts and moments, the replicated parameters once, and where the data stands."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor

from hecate.checkpoint import (
    CheckpointError,
    checkpoint_folder,
    commit,
    discard,
    good_checkpoints,
    prune,
    read_manifest,
    read_tensors,
    remove_stale_staging,
    staging_folder,
    write_shard,
)
from hecate.config import Config, changed_computation, to_yaml
from hecate.data.stream import TrainStream
from hecate.elastic.move_experts import adopt_owners
from hecate.errors import UserError
from hecate.model.moe_model import MoeModel
from hecate.optim.optimizer import ExpertOptimizer
from hecate.parallel.units import parse_unit
from hecate.ranks.ranks import Ranks

_NONCE_BYTES = 8


def save_state(
    config: Config, ranks: Ranks, moe: MoeModel, optimizer: ExpertOptimizer, stream: TrainStream, *, step: int, tokens: int
) -> Path | None:
    """Write checkpoint `step` (optimizer steps done); None if it is there already. Every rank must call it; the first sharding group, which
    has all there is, writes.

    Raises:
        CheckpointError: a rank could not write; no rank then has a checkpoint of this step, older ones are untouched.
    """
    root = Path(config.output_dir)
    final = checkpoint_folder(root, step)
    if ranks.all_max(float(final.exists())):
        return None
    staging = staging_folder(root, step, ranks.broadcast_bytes(secrets.token_bytes(_NONCE_BYTES)).hex())
    tensors = optimizer.state_tensors()
    if not ranks.is_first:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("owned/")}
    meta = {
        "config": to_yaml(config),
        "history": moe.engine.shards.history.state_dict(),
        "rows_per_step": stream.sequences_per_step,
        "owners": {str(layer): owner_E.tolist() for layer, owner_E in moe.engine.shards.owners.items()},
        "stream": stream.state_dict(),
        "tokens": tokens,
    }
    failure: CheckpointError | None = None
    try:
        if moe.engine.shards.in_first_group:
            write_shard(staging, moe.engine.shards.rank, moe.engine.shards.world_size, tensors)
    except CheckpointError as error:
        failure = error
    failed = ranks.all_max(float(failure is not None))
    if ranks.is_first and failed:
        discard(staging)
    elif ranks.is_first:
        try:
            commit(staging, final, meta, moe.engine.shards.world_size)
            if config.save_total_limit is not None:
                prune(root, config.save_total_limit)
        except CheckpointError as error:
            failure = error
    failed = max(failed, ranks.all_max(float(failure is not None)))
    if failure is not None:
        raise failure
    if failed:
        raise CheckpointError(f"{final}: another rank could not write its part; its own message says why")
    return final


def load_state(config: Config, ranks: Ranks, moe: MoeModel, optimizer: ExpertOptimizer, stream: TrainStream) -> tuple[int, int]:
    """Continue from the newest good checkpoint: (steps done, tokens seen). Every rank must call it.

    Any number of ranks may have written it: experts are dealt anew where a sharding group had another one. A step keeps its number of rows.

    Raises:
        UserError: there is no checkpoint that can be read, or the run was another one (configuration, data).
    """
    root = Path(config.output_dir)
    if ranks.is_first:
        remove_stale_staging(root)
    ranks.barrier()
    reasons = []
    for folder in good_checkpoints(root):
        manifest = read_manifest(folder)
        meta: dict[str, Any] = manifest.meta
        _refuse_other_run(folder, meta, config)
        owners = {parse_unit(text): np.array(owner_E) for text, owner_E in meta["owners"].items()}
        if manifest.world_size != moe.engine.shards.world_size:
            owners = moe.engine.shards.redealt(owners, moe.engine.shards.world_size)
        adopt_owners(moe.engine, optimizer, owners)
        names = [name for name in manifest.tensors if _mine(name, optimizer)]
        try:
            tensors: dict[str, Tensor] = read_tensors(folder, manifest, names)
            bad = ""
        except CheckpointError as error:
            bad = str(error)
        # All ranks take the same checkpoint: one that any of them cannot read is passed over by all.
        if ranks.all_max(float(bool(bad))):
            reasons.append(bad or f"{folder}: another rank cannot read its part")
            continue
        missing = [name for name in _wanted(optimizer) if name not in tensors]
        if missing:
            raise CheckpointError(f"{folder}: has no tensor {missing[0]} ({len(missing)} missing)")
        optimizer.load_state_tensors(tensors, steps_done=manifest.step)
        moe.engine.shards.history.load_state_dict(meta["history"])
        moe.engine.shards.history.redeal(ranks.world_size)
        stream.load_state_dict(meta["stream"])
        stream.sequences_per_step = int(meta["rows_per_step"])
        return manifest.step, int(meta["tokens"])
    detail = "\n".join(f"  {reason}" for reason in reasons[:4])
    raise UserError(f"resume=true, but {root} has no checkpoint that can be read; start a new run with resume=false\n{detail}".rstrip())


def _wanted(optimizer: ExpertOptimizer) -> list[str]:
    parts = optimizer.parts.parameters if optimizer.parts else {}
    return [f"owned/{name}" for name in optimizer.owned] + [f"replicated/{name}" for name in (*optimizer.replicated, *parts)]


def _mine(tensor_name: str, optimizer: ExpertOptimizer) -> bool:
    kind, name = tensor_name.split("/")[:2]
    return kind == "replicated" or name in optimizer.owned


def _refuse_other_run(folder: Path, meta: dict[str, Any], config: Config) -> None:
    changes = changed_computation(yaml.safe_load(meta["config"]), config)
    if changes:
        raise UserError(
            f"{folder}: belongs to a run with another configuration; resume continues the same training.\n"
            + "\n".join(f"  {change.key}: {change.then!r} then, {change.now!r} now" for change in changes[:6])
        )
