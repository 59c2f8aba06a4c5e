"""The state of a run between two optimizer steps, as a value; and how a checkpoint of it is loaded by all ranks.

A checkpoint holds each owner's experts with their moments, the replicated parameters once, and the `TrainState`. A rank that joins a run
under way receives the same `TrainState` from another rank (`hecate.elastic.rebuild`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hecate.checkpoint.files import CheckpointError, UnreadableError
from hecate.checkpoint.history import manifests, remove_stale_staging
from hecate.checkpoint.manifest import MANIFEST, Manifest, read_manifest, step_of
from hecate.checkpoint.meta import CHAT_TEMPLATE, LOSS, config_values, owners_of, reading_meta
from hecate.checkpoint.save import checkpoint_folder
from hecate.checkpoint.shard import read_tensors
from hecate.checkpoint.verify import note_damage
from hecate.config import Config, changed_computation
from hecate.config.effective import leaves_of, other_configuration
from hecate.data.separate_streams import Stream
from hecate.engine.protocol import ExpertEngine
from hecate.engine.shards import ExpertShards
from hecate.errors import UserError
from hecate.optim.best_model import NOTHING_KNOWN, BestModel
from hecate.optim.norm_limit import with_norm
from hecate.optim.optimizer import ExpertOptimizer, owned_parameters
from hecate.parallel.transfer.residency import Residency
from hecate.parallel.values.loads import LoadHistory
from hecate.parallel.values.units import Unit
from hecate.ranks.ranks import Ranks

_MOST_SEQUENCES = 1 << 24
"""The largest number of sequences in a step that a checkpoint may say."""


@dataclass(frozen=True)
class TrainedParts:
    """The objects of one rank whose contents make up a run's state."""

    engine: ExpertEngine
    optimizer: ExpertOptimizer
    stream: Stream
    base_digest: str = ""
    """The digest of the base model (`BaseModel.digest`); empty: not known."""
    drawn_digest: str = ""
    """The digest of what low-rank pairs draw from names (`MoeModel.drawn_digest`); empty: they draw nothing."""
    chat_template: str = ""
    """The chat template in which conversations are written; empty: the tokenizer's own."""
    loss: str = ""
    """The name of the calling program's loss (`hecate.api.train`); empty: cross-entropy."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The state of a run between two optimizer steps, without parameters and moments; the same on every rank."""

    step: int
    """The number of optimizer steps done."""
    completed: int
    """The number of steps after which evaluation, checkpoint and all other phases are done, too: `step`, or one less."""
    tokens: int
    """The number of tokens trained so far, padding not counted."""
    skipped: int
    """The number of steps so far that changed nothing, because gradients were not finite or their norm was a spike."""
    skipped_in_a_row: int
    stream: Mapping[str, Any]
    """The position in the data (`Stream.state_dict`)."""
    sequences_per_step: int
    history: list[dict[Unit, np.ndarray]]
    """The loads of the last steps (`LoadHistory.snapshot`)."""
    grad_norms: tuple[float, ...] = ()
    """The last finite gradient norms, oldest first (`hecate.optim.norm_limit`)."""
    best: BestModel = NOTHING_KNOWN

    @staticmethod
    def at_start(parts: TrainedParts) -> TrainState:
        """The state of a run that begins."""
        nothing = TrainState(
            step=0, completed=0, tokens=0, skipped=0, skipped_in_a_row=0, stream={}, sequences_per_step=0, history=[], grad_norms=()
        )
        return nothing.with_positions_of(parts)

    def after_step(self, parts: TrainedParts, *, tokens: int, skipped: bool, grad_norm: float = math.nan) -> TrainState:
        """The state when one more step is done, of so many tokens and with this gradient norm; one that is not finite is not kept."""
        counted = replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + tokens,
            skipped=self.skipped + skipped,
            skipped_in_a_row=self.skipped_in_a_row + 1 if skipped else 0,
            grad_norms=with_norm(self.grad_norms, grad_norm),
        )
        return counted.with_positions_of(parts)

    def with_positions_of(self, parts: TrainedParts) -> TrainState:
        """The state with the positions that stream and history have now."""
        return replace(
            self,
            stream=parts.stream.state_dict(),
            sequences_per_step=parts.stream.sequences_per_step,
            history=parts.engine.shards.history.snapshot(),
        )

    def put_back(self, parts: TrainedParts) -> None:
        """Set stream and history to the positions of this state, and forget the gradients of a step under way."""
        parts.optimizer.abandon()
        parts.stream.load_state_dict(dict(self.stream))
        parts.stream.sequences_per_step = self.sequences_per_step
        parts.engine.shards.history.restore(self.history)

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` reads them."""
        history = LoadHistory(max(1, len(self.history)))
        history.restore(self.history)
        return {
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "rows_per_step": self.sequences_per_step,
            "stream": dict(self.stream),
            "history": history.state_dict(),
            "grad_norms": list(self.grad_norms),
            "best": asdict(self.best),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> TrainState:
        """The state that `to_json` gave. Checkpoints of early versions have no skipped steps, gradient norms or best model."""
        history = LoadHistory(max(1, len(value["history"])))
        history.load_state_dict(value["history"])
        if not 1 <= int(value["rows_per_step"]) <= _MOST_SEQUENCES:
            raise ValueError(f"rows_per_step is {str(value['rows_per_step'])[:40]}")
        return TrainState(
            step=int(value["step"]),
            completed=int(value["step"]),
            tokens=int(value["tokens"]),
            skipped=int(value.get("skipped", 0)),
            skipped_in_a_row=int(value.get("skipped_in_a_row", 0)),
            stream=value["stream"],
            sequences_per_step=int(value["rows_per_step"]),
            history=history.snapshot(),
            grad_norms=tuple(map(float, value.get("grad_norms", ()))),
            best=BestModel.from_json(value.get("best", {})),
        )


class NoCheckpointError(UserError):
    """There is no checkpoint that all ranks can read; the text says where, and why each one was passed over."""


@dataclass(frozen=True)
class LoadedState:
    """The state of the loaded checkpoint, and what was seen on the way to it; the same on every rank."""

    state: TrainState
    warnings: tuple[str, ...]
    """A warning for each newer checkpoint that was passed over: which of its files or tensors is damaged, and from where training goes
    on."""


def load_state(config: Config, ranks: Ranks, parts: TrainedParts, step: int | None = None) -> LoadedState:
    """Load the newest checkpoint that all ranks can read into `parts`, and return its state. Every rank must call it.

    Any number of ranks may have written the checkpoint: experts are dealt anew where a sharding group had another number of ranks. A step
    keeps its number of sequences.

    Args:
        step: load the checkpoint of this step, or none; None: of any.

    Raises:
        NoCheckpointError: there is none.
        UserError: the checkpoint is of another run (other configuration, other data).
        UnreadableError: the system does not let a rank read it, on all ranks.
    """
    root = Path(config.output_dir)
    if ranks.is_first:
        remove_stale_staging(root)
    passed_over: list[tuple[str, str]] = []
    # Rank 0 says which checkpoint is tried next: each rank's own listing of the folder might name others, and then ranks would wait for
    # each other in different collectives.
    candidates = (one for one in manifests(root) if step in (None, step_of(one[0].name))) if ranks.is_first else None
    while True:
        found = next(candidates, None) if candidates else None
        own_name = found[0].name.encode() if found else b""
        name = ranks.broadcast_from(0, own_name if ranks.is_first else None).decode()
        if not name:
            reasons = [f"  {reason}" for _, reason in passed_over[:4]]
            what = f"{root} has no checkpoint" if step is None else f"{checkpoint_folder(root, step)}, of the best model, is no checkpoint"
            raise NoCheckpointError("\n".join([f"{what} that can be read", *reasons]))
        folder = root / name
        described = _described(folder, found[1] if found else None, config, parts)
        read: tuple[dict[str, Tensor], dict[Unit, Residency]] | CheckpointError | None
        # A checkpoint that is damaged for any rank is passed over by all, who agree before they exchange what goes with the owners.
        reason = _first_reason(ranks, described)
        read = described if isinstance(described, CheckpointError) else None
        if reason is None:
            assert not isinstance(described, CheckpointError)
            manifest, state, owners = described
            adopt_owners(parts.engine, parts.optimizer, owners)
            try:
                tensors = _read_own_tensors(folder, manifest, parts.optimizer)
                read = tensors, _residency(folder, manifest, parts.engine.shards)
            except CheckpointError as error:
                read = error
            reason = _first_reason(ranks, read)
        if ranks.all_max(float(isinstance(read, UnreadableError))):
            raise read if isinstance(read, UnreadableError) else UnreadableError(f"{reason}\n  try again; this rank could read its part")
        # Without a reason the checkpoint is whole: each of its tensors was read by a rank that needs it.
        note_damage(folder, reason)
        if reason is not None:
            passed_over.append((name, reason))
            continue
        assert read is not None
        assert not isinstance(read, CheckpointError)
        state = _install(state, *read, ranks, parts)
        goes_on = f"training goes on from {name}"
        return LoadedState(state, tuple(f"{bad} is damaged and was passed over: {why}; {goes_on}" for bad, why in passed_over))


def _described(
    folder: Path, manifest: Manifest | CheckpointError | None, config: Config, parts: TrainedParts
) -> tuple[Manifest, TrainState, dict[Unit, np.ndarray]] | CheckpointError:
    """What a checkpoint says of its run, before any tensor is read. `manifest`: of the folder, or why there is none; None: not read yet."""
    try:
        manifest = read_manifest(folder) if manifest is None else manifest
        if isinstance(manifest, CheckpointError):
            raise manifest
        state, owners = state_of(folder, manifest), _owners_of(folder, manifest, config, parts)
        with reading_meta(folder):
            parts.stream.check_state_dict(dict(state.stream))
        return manifest, state, owners
    except CheckpointError as error:
        return error


def _first_reason(ranks: Ranks, read: object) -> str | None:
    """Why the lowest of the ranks that cannot read a checkpoint cannot, in one line; None: all can. Every rank must call it.

    Args:
        read: what this rank has read, or the CheckpointError that says why it cannot.
    """
    count = int(ranks.all_max(float(ranks.world_size - ranks.rank) if isinstance(read, CheckpointError) else 0.0))
    if count == 0:
        return None
    source = ranks.world_size - count
    return ranks.broadcast_from(source, str(read).splitlines()[0].encode() if ranks.rank == source else None).decode()


def saved_max_steps(root: Path, step: int) -> int:
    """How long the run was to be when it saved the checkpoint of this step, in optimizer steps."""
    folder = checkpoint_folder(root, step)
    with reading_meta(folder):
        return int(config_values(folder, read_manifest(folder).meta)["max_steps"])


def state_of(folder: Path, manifest: Manifest) -> TrainState:
    """Return the state of the run that has written a manifest. Raises CheckpointError: the manifest does not say it, or is damaged."""
    with reading_meta(folder):
        return TrainState.from_json({**manifest.meta, "step": manifest.step})


def adopt_owners(engine: ExpertEngine, optimizer: ExpertOptimizer, owners: dict[Unit, np.ndarray]) -> None:
    """Take over the owners of a checkpoint. Every rank must call it, with the same owners.

    Parameters are zero and have no moments afterwards where their unit's owners differed: the checkpoint is read into them next.
    """
    for unit, store in engine.shards.stores.items():
        if not np.array_equal(engine.shards.owners[unit], owners[unit]):
            mine = np.flatnonzero(owners[unit] == engine.shards.rank).tolist()
            engine.shards.change_owners(unit, owners[unit], {expert: store.owned.new_zeros(store.chunk_numel) for expert in mine})
    optimizer.replace_owned(owned_parameters(engine), {})


def refuse_other_run(
    folder: Path, meta: Mapping[str, Any], config: Config, base_digest: str, drawn_digest: str = "", chat_template: str = ""
) -> None:
    """Refuse to continue a run whose computation the configuration would change.

    The base model is compared by its digest, so that its folder may have been moved. A checkpoint of an early version has no digest; its
    base model is compared by name.

    Args:
        base_digest: of the base model that was loaded; empty: not known.
        drawn_digest: of what low-rank pairs have drawn from names. A checkpoint of an early version does not say what its run drew.
        chat_template: in which conversations are written; empty: the tokenizer's own. A checkpoint of an early version does not say it.

    Raises:
        UserError: it names the keys, or says that other numbers are drawn from the same seed, or that conversations are written otherwise.
    """
    then = config_values(folder, meta)
    known = bool(base_digest and meta.get("base_model"))
    if known and meta["base_model"] != base_digest:
        raise UserError(
            f"{folder}: belongs to a run on another base model than the one in model.name_or_path, {config.model.name_or_path}\n"
            f"  it began with {leaves_of(then).get('model.name_or_path')}; give that model, whose files may have moved, or start a new run"
        )
    if changes := changed_computation(then, config, same_base=known):
        raise UserError(other_configuration(str(folder), changes))
    if meta.get("drawn") and meta["drawn"] != drawn_digest:
        raise UserError(
            f"{folder}: for lora.pairs={config.lora.pairs} its run drew other matrices from seed {config.seed} than are drawn here\n"
            "  what it trained goes with those alone; resume with the version of torch that it ran with, or start a new run"
        )
    if meta.get(CHAT_TEMPLATE, chat_template) != chat_template:
        raise UserError(
            f"{folder}: its run wrote conversations in another chat template, and a run's data stay the same\n"
            f"  it had data.chat_template={leaves_of(then).get('data.chat_template')}; give that, with the text of then, or start a new run"
        )


def _owners_of(folder: Path, manifest: Manifest, config: Config, parts: TrainedParts) -> dict[Unit, np.ndarray]:
    """The owners of this run's experts by a checkpoint, dealt anew where a sharding group had another number of ranks."""
    refuse_other_run(folder, manifest.meta, config, parts.base_digest, parts.drawn_digest, parts.chat_template)
    if (then := manifest.meta.get(LOSS, "")) != parts.loss:
        raise UserError(
            f"{folder}: its run was trained for {_loss_in_words(then)}, and this one is for {_loss_in_words(parts.loss)}\n"
            "  go on with hecate.api.train(..., loss=...) and the loss of then, or start a new run"
        )
    engine = parts.engine
    owners = owners_of(folder, manifest)
    for unit, owner_E in engine.shards.owners.items():
        if unit not in owners or len(owners[unit]) != len(owner_E):
            raise CheckpointError(f"{folder / MANIFEST}: does not say who owns the {len(owner_E)} experts of unit {unit}")
    if manifest.world_size != engine.shards.world_size:
        owners = engine.shards.redealt(owners, engine.shards.world_size)
    return owners


def _loss_in_words(name: object) -> str:
    return f"the loss {str(name)[:80]} of a calling program" if name else "the cross-entropy"


def _read_own_tensors(folder: Path, manifest: Manifest, optimizer: ExpertOptimizer) -> dict[str, Tensor]:
    """The tensors of a checkpoint that this rank needs, after `adopt_owners`."""
    tensor_parts = optimizer.parts.parameters if optimizer.parts else {}
    needed = [f"owned/{name}" for name in optimizer.owned] + [f"replicated/{name}" for name in (*optimizer.alike, *tensor_parts)]
    missing = [name for name in needed if name not in manifest.tensors]
    if missing:
        raise UserError(f"{folder}: has no tensor {missing[0]} ({len(missing)} missing)")
    own = [name for name in manifest.tensors if name.startswith("replicated/") or name.split("/")[1] in optimizer.owned]
    return read_tensors(folder, manifest, own)


def _residency(folder: Path, manifest: Manifest, shards: ExpertShards) -> dict[Unit, Residency]:
    """Which rank held which frozen parts; nothing if the number of ranks was another. Raises CheckpointError."""
    if manifest.world_size != shards.mesh.world_size:
        return {}
    with reading_meta(folder):
        return shards.residency_from_json(manifest.meta.get("residency", {}))


def _install(
    state: TrainState, tensors: Mapping[str, Tensor], held: Mapping[Unit, Residency], ranks: Ranks, parts: TrainedParts
) -> TrainState:
    """Load what was read and checked. An error from now on is a mistake of this program, and no damage of the checkpoint."""
    parts.optimizer.load_state_tensors(tensors, steps_done=state.step)
    state.put_back(parts)
    parts.engine.shards.history.redeal(ranks.world_size)
    parts.engine.shards.adopt_residency(held)
    return state.with_positions_of(parts)
