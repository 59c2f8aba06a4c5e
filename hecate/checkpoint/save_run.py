"""Save the state of a run, by all ranks together.

rank 0 looks what is there -> the ranks of the first sharding group write -> rank 0 commits, and prunes
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hecate.checkpoint.files import CheckpointError
from hecate.checkpoint.history import prune, set_aside
from hecate.checkpoint.save import checkpoint_folder, commit, discard, staging_folder, write_shard
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
        CheckpointError: a rank could not write; no rank then has a checkpoint of this step, older ones are untouched.
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

    def write() -> None:
        if engine.shards.in_first_group:
            write_shard(staging, engine.shards.rank, engine.shards.world_size, tensors)

    def finish() -> None:
        if os.path.lexists(final):  # it is damaged, or else nothing would have been written
            damage = first_damage(final)
            warnings.append(f"{final.name} is damaged and was moved aside to {set_aside(final).name}: {damage}")
        commit(staging, final, meta, engine.shards.world_size)
        note_damage(final, None)
        if config.save_total_limit is not None:
            prune(root, config.save_total_limit, warnings.append)

    failure = _failure_of(write)
    failed = ranks.all_max(float(failure is not None))
    if ranks.is_first:
        if failed:
            discard(staging)
        else:
            failure = _failure_of(finish)
    failed = max(failed, ranks.all_max(float(failure is not None)))
    if failure is not None:
        raise failure
    if failed:
        raise CheckpointError(f"{final}: another rank could not write its part; its own message says why")
    return Saved(final, tuple(warnings))


def _agreed_nonce(ranks: Ranks, final: Path) -> str | None:
    """The nonce of a new save, as rank 0 has drawn it; None: rank 0 sees a whole checkpoint there. Every rank must call it."""
    own = None
    if ranks.is_first:
        is_there = os.path.lexists(final) and first_damage(final) is None
        own = b"" if is_there else secrets.token_bytes(_NONCE_BYTES).hex().encode()
    return ranks.broadcast_from(0, own).decode() or None


def _failure_of(action: Callable[[], None]) -> CheckpointError | None:
    try:
        action()
    except CheckpointError as error:
        return error
    return None
