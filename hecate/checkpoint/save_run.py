"""Save the state of a run, by all ranks together.

rank 0 looks what is there -> the ranks of the first sharding group write -> rank 0 commits, and prunes
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hecate.checkpoint.file_system import require_durable, require_room
from hecate.checkpoint.files import CheckpointError
from hecate.checkpoint.history import prune, set_aside
from hecate.checkpoint.save import checkpoint_folder, commit, discard, shard_bytes, staging_folder, write_shard
from hecate.checkpoint.train_state import TrainedParts, TrainState
from hecate.checkpoint.verify import first_damage, note_damage
from hecate.config import Config, to_yaml
from hecate.ranks.ranks import Ranks

_NONCE_BYTES = 8


@dataclass(frozen=True)
class Saved:
    """What a save has done."""

    folder: Path | None
    """the new checkpoint; None: there was a whole one of this step"""
    warnings: tuple[str, ...] = ()
    """what a user should know of other checkpoints; on rank 0 only"""


def save_state(config: Config, ranks: Ranks, parts: TrainedParts, state: TrainState) -> Saved:
    """Write the checkpoint of `state.step`, unless there is a whole one. A damaged one is moved aside.

    Every rank must call it. The first sharding group, which has a whole copy of the state, writes.

    Raises:
        CheckpointError: there is no room, of which nothing was written, or a rank could not write. No rank then has a checkpoint of this
            step, and older ones are untouched.
    """
    root = Path(config.output_dir)
    final = checkpoint_folder(root, state.step)
    nonce = _agreed_nonce(ranks, final)
    if nonce is None:
        return Saved(None)
    staging = staging_folder(root, state.step, nonce)
    engine = parts.engine
    tensors = parts.optimizer.state_tensors()
    if not ranks.is_first:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("owned/")}
    owners = {str(unit): owner_E.tolist() for unit, owner_E in engine.shards.owners.items()}
    meta = {"config": to_yaml(config), "owners": owners, "base_model": parts.base_digest, "drawn": parts.drawn_digest, **state.to_json()}
    warnings: list[str] = []
    writes, rank, world_size = engine.shards.in_first_group, engine.shards.rank, engine.shards.world_size

    def write() -> None:
        if writes:
            write_shard(staging, rank, world_size, tensors)

    def finish() -> None:
        if os.path.lexists(final):  # it is damaged, or else nothing would have been written
            damage = first_damage(final)
            warnings.append(f"{final.name} is damaged and was moved aside to {set_aside(final).name}: {damage}")
        commit(staging, final, meta, world_size)
        note_damage(final, None)
        if config.save_total_limit is not None:
            prune(root, config.save_total_limit, config.save_retain_steps, warnings.append)

    own_bytes = shard_bytes(rank, world_size, tensors) if writes else 0
    needed = int(ranks.all_sum(torch.tensor(own_bytes)))
    _together(ranks, final, (lambda: require_room(final, needed)) if ranks.is_first else _nothing)
    try:
        _together(ranks, final, write)
    except CheckpointError:
        if ranks.is_first:
            discard(staging)
        raise
    _together(ranks, final, finish if ranks.is_first else _nothing)
    return Saved(final, tuple(warnings))


def require_durable_folder(config: Config, ranks: Ranks) -> None:
    """Have rank 0 try whether checkpoints can be saved in output_dir. Every rank must call it. Raises CheckpointError, on all ranks."""
    root = Path(config.output_dir)
    _together(ranks, root, (lambda: require_durable(root)) if ranks.is_first else _nothing)


def _agreed_nonce(ranks: Ranks, final: Path) -> str | None:
    """The nonce of a new save, as rank 0 has drawn it; None: rank 0 sees a whole checkpoint there. Every rank must call it."""
    own = None
    if ranks.is_first:
        is_there = os.path.lexists(final) and first_damage(final) is None
        own = b"" if is_there else secrets.token_bytes(_NONCE_BYTES).hex().encode()
    return ranks.broadcast_from(0, own).decode() or None


def _together(ranks: Ranks, final: Path, action: Callable[[], None]) -> None:
    """Do this rank's part of a save. Every rank must call it; if one fails, all raise CheckpointError, after all have ended their parts."""
    failure: CheckpointError | None = None
    try:
        action()
    except CheckpointError as error:
        failure = error
    failed = ranks.all_max(float(failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise CheckpointError(f"{final}: another rank could not write its part; its own message says why")


def _nothing() -> None:
    pass
