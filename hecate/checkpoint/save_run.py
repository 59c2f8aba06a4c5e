"""Save the state of a run, by all ranks together.

    rank 0 looks for a whole one, and for room -> the ranks of the first sharding group write -> rank 0 commits, and prunes

On each rank a thread works on the files. It sends no messages; every second the ranks agree on whether all have done their parts. So none
waits in a collective, which has a timeout, for files, which may take long. With `begin_save` and `background` the training goes on beside
the writing.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from hecate.checkpoint.file_system import require_disk_room, require_durable
from hecate.checkpoint.files import CheckpointError, UnreadableError
from hecate.checkpoint.history import prune, set_aside
from hecate.checkpoint.meta import CHAT_TEMPLATE, LOSS, SAVED_AT
from hecate.checkpoint.save import checkpoint_folder, commit, discard, shard_bytes, staging_folder, write_shard
from hecate.checkpoint.train_state import TrainedParts, TrainState
from hecate.checkpoint.verify import first_damage, note_damage
from hecate.checkpoint.write_thread import WriteThread
from hecate.config import Config, to_yaml
from hecate.ranks.ranks import Ranks

_NONCE_BYTES = 8
_POLL_SECONDS = 1.0
"""The longest that a rank waits for its own files before it says that it is still at work."""
_Action = Callable[[Callable[[], None]], None]
"""A rank's part of a save; it gets a function to call now and then (`WriteThread`), and raises CheckpointError where it fails."""
_as_yaml = lru_cache(maxsize=1)(to_yaml)
"""The configuration as YAML, which is the same in each save of a run."""


@dataclass(frozen=True)
class Saved:
    """What a save has done."""

    folder: Path | None
    """The new checkpoint; None: there was a whole one of this step."""
    warnings: tuple[str, ...] = ()
    """What a user should know of other checkpoints; on rank 0 only."""


@dataclass(frozen=True)
class SaveUnderWay:
    """A save that was begun on all ranks and that `end_save` ends."""

    config: Config
    final: Path
    """The folder of the checkpoint once it is committed."""
    staging: Path
    meta: dict[str, Any]
    world_size: int
    """The number of ranks that write."""
    write: _Action | None
    """Writes this rank's part; None: it has none, or `thread` writes it already."""
    thread: WriteThread | None

    def requests(self) -> tuple[bool, bool]:
        """Whether this rank is still writing, and whether it has failed; `end_save` is due once no rank writes, or any has failed."""
        return (False, False) if self.thread is None else (self.thread.is_writing, self.thread.has_failed)

    def break_off(self) -> None:
        """Stop writing. What was written is deleted as the leftover of an unfinished save."""
        if self.thread is not None:
            self.thread.break_off()


def save_state(config: Config, ranks: Ranks, parts: TrainedParts, state: TrainState) -> Saved:
    """Write the checkpoint of `state.step`, unless there is a whole one. A damaged one is moved aside. Every rank must call it.

    Raises:
        CheckpointError: as `begin_save` and `end_save`.
    """
    under_way = begin_save(config, ranks, parts, state)
    return Saved(None) if under_way is None else end_save(ranks, under_way)


def begin_save(config: Config, ranks: Ranks, parts: TrainedParts, state: TrainState, *, background: bool = False) -> SaveUnderWay | None:
    """Begin to write the checkpoint of `state.step`; None: there is a whole one.

    Every rank must call it. The first sharding group, which has a whole copy of the state, writes.

    Args:
        background: a thread writes copies of the tensors, in the host's memory, so that training may go on. Otherwise nothing is written
            before `end_save`, and no tensor may change until then.

    Raises:
        CheckpointError: there is no room; nothing was written.
    """
    root = Path(config.output_dir)
    final = checkpoint_folder(root, state.step)
    nonce = _agreed_nonce(ranks, final)
    if nonce is None:
        return None
    staging = staging_folder(root, state.step, nonce)
    shards = parts.engine.shards
    writes, rank, world_size = shards.in_first_group, shards.rank, shards.world_size
    tensors = parts.optimizer.state_tensors()
    if not ranks.is_first:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("owned/")}
    owners = {str(unit): owner_E.tolist() for unit, owner_E in shards.owners.items()}
    meta = {"config": _as_yaml(config), "owners": owners, "base_model": parts.base_digest, "drawn": parts.drawn_digest, **state.to_json()}
    meta |= {"residency": shards.residency_to_json(), SAVED_AT: int(time.time()), CHAT_TEMPLATE: parts.chat_template}
    meta |= {LOSS: parts.loss} if parts.loss else {}
    needed = int(ranks.all_sum(torch.tensor(shard_bytes(rank, world_size, tensors) if writes else 0)))
    _do_parts(ranks, final, (lambda _: require_disk_room(final, needed)) if ranks.is_first else None)
    if not writes:
        return SaveUnderWay(config, final, staging, meta, world_size, None, None)
    if not background:
        write = lambda go_on: write_shard(staging, rank, world_size, tensors, go_on)  # noqa: E731
        return SaveUnderWay(config, final, staging, meta, world_size, write, None)
    # The next step changes the tensors in place while the thread writes.
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    thread = WriteThread(lambda go_on: write_shard(staging, rank, world_size, copies, go_on))
    return SaveUnderWay(config, final, staging, meta, world_size, None, thread)


def end_save(ranks: Ranks, save: SaveUnderWay, *, failed: bool = False) -> Saved:
    """Wait until all ranks have written, then commit, and delete old checkpoints as the configuration says. Every rank must call it.

    Args:
        failed: a rank has failed (`SaveUnderWay.requests`); the others need not write on.

    Raises:
        CheckpointError: a rank could not write. No rank then has a checkpoint of this step, and older ones are untouched.
    """
    if failed:
        save.break_off()
    try:
        _do_parts(ranks, save.final, save.write, save.thread)
    except CheckpointError:
        if ranks.is_first:
            discard(save.staging)
        raise
    warnings: list[str] = []
    _do_parts(ranks, save.final, (lambda _: _commit(save, warnings)) if ranks.is_first else None)
    # On all ranks: any of them may be the first after a loss, and prune.
    note_damage(save.final, None)
    return Saved(save.final, tuple(warnings))


def require_durable_folder(config: Config, ranks: Ranks) -> None:
    """Have rank 0 try whether checkpoints can be saved in output_dir. Every rank must call it. Raises CheckpointError, on all ranks."""
    root = Path(config.output_dir)
    _do_parts(ranks, root, (lambda _: require_durable(root)) if ranks.is_first else None)


def _commit(save: SaveUnderWay, warnings: list[str]) -> None:
    final, config = save.final, save.config
    if os.path.lexists(final):  # it was damaged, or else nothing would have been written; a read that failed once may succeed now
        damage = first_damage(final, again=True)
        if damage is None:
            discard(save.staging)
            return
        warnings.append(f"{final.name} is damaged and was moved aside to {set_aside(final).name}: {damage}")
    commit(save.staging, final, save.meta, save.world_size)
    note_damage(final, None)
    if config.save_total_limit is not None:
        try:
            best = save.meta["best"]["step"]
            prune(final.parent, config.save_total_limit, config.save_retain_steps, config.save_retain_hours, warnings.append, best)
        except CheckpointError as error:  # the new checkpoint is there, and the run can go on
            warnings.append(f"{error}; the next save tries again")


def _agreed_nonce(ranks: Ranks, final: Path) -> str | None:
    """The nonce of a new save, as rank 0 has drawn it; None: rank 0 sees a whole checkpoint in `final`. Every rank must call it."""
    own: bytes | None = None

    def look(_go_on: Callable[[], None]) -> None:
        nonlocal own
        try:
            is_whole = os.path.lexists(final) and first_damage(final) is None
        except UnreadableError:  # `_commit` looks once more
            is_whole = False
        own = b"" if is_whole else secrets.token_bytes(_NONCE_BYTES).hex().encode()

    _do_parts(ranks, final, look if ranks.is_first else None)
    return ranks.broadcast_from(0, own).decode() or None


def _do_parts(ranks: Ranks, final: Path, action: _Action | None, thread: WriteThread | None = None) -> None:
    """Do this rank's part of a save. Every rank must call it, and all return, or raise, after all have ended their parts.

    Args:
        action: this rank's part; None: it has none, or `thread` does it already.

    Raises:
        Exception: that of this rank's part, or a CheckpointError that names the rank that has failed and its error.
    """
    if action is not None:
        thread = WriteThread(partial(_on_device, ranks.device, action))
    failure: Exception | None = None
    anyone_works, failed = True, 0
    try:
        while anyone_works:
            works = thread is not None and not thread.ends_within(_POLL_SECONDS)
            if thread is not None and not works:
                try:
                    thread.wait()
                except Exception as error:  # noqa: BLE001  (the others wait to hear of it)
                    failure = error
            most = ranks.all_most([float(works), 0.0 if failure is None else ranks.rank + 1.0])
            anyone_works, failed = most[0] > 0, int(most[1])
    finally:
        if thread is not None:
            # If a rank is lost, the message above raises: whatever comes next must not meet a thread that is still at work.
            thread.break_off()
    if failed:
        said = str(failure) if isinstance(failure, CheckpointError) else f"{type(failure).__name__}: {failure}"
        source = failed - 1
        reason = ranks.broadcast_from(source, said.encode(errors="replace") if ranks.rank == source else None).decode()
        raise failure or CheckpointError(f"{final}: rank {source} could not write its part: {reason}")


def _on_device(device: torch.device, action: _Action, go_on: Callable[[], None]) -> None:
    """Do a rank's part in a thread, which would else use the process's first GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    action(go_on)
