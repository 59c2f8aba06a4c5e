"""A training run on one rank: its parts, where it stands, and the phases that `hecate.train.loop` goes through."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from hecate.adapters.peft_experts import begin_with
from hecate.adapters.trained_output import TrainedOutput, output_of
from hecate.checkpoint import remove_stale_staging
from hecate.checkpoint.train_state import NoCheckpointError, TrainedParts, TrainState, load_state, save_state
from hecate.config import Config
from hecate.data.batches import Batch, collate, sequence_ranges
from hecate.data.encode import IGNORED
from hecate.data.sequences import PackedSequence, empty_sequence
from hecate.data.sources import TokenSource
from hecate.data.stream import TrainStream
from hecate.elastic.backups import copy_to_backup_ranks
from hecate.elastic.move_experts import check_room, reshard_if_it_pays
from hecate.elastic.rebuild import Group, can_catch_up, catch_up, exchange_standings, go_back, redeal
from hecate.errors import UserError
from hecate.model.base import BaseModel
from hecate.model.checkpointing import checkpoint_activations
from hecate.model.moe_model import MoeModel
from hecate.optim.optimizer import AdamWSettings, ExpertOptimizer, Trainables, owned_parameters, schedule
from hecate.parallel import jit
from hecate.parallel.mesh import make_mesh
from hecate.parallel.sequence_shares import dense_seconds, sequences_by_speed, slowest_of_each
from hecate.parallel.topology import Topology
from hecate.ranks.ranks import Ranks
from hecate.report.events import Evaluation, Rebuilt, Resharding, StepEvent
from hecate.report.run_report import RunFacts, trainable_rows
from hecate.train.build import build_moe, config_of_model, encode_sources, front_end
from hecate.train.evaluate import evaluate
from hecate.train.step import train_step

_MOST_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True)
class RunParts:
    """What a run is made of on one rank, built once from its configuration."""

    config: Config
    """with the numbers that the model brings"""
    base: BaseModel
    moe: MoeModel
    optimizer: ExpertOptimizer
    stream: TrainStream
    eval_sources: list[TokenSource]
    output: TrainedOutput
    """what the run leaves at its end"""
    dense_flops: float
    """FLOPs that hide a unit's gather, for each sequence"""

    @property
    def trained(self) -> TrainedParts:
        """The parts whose contents make up the run's state."""
        return TrainedParts(self.moe.engine, self.optimizer, self.stream)


def build_parts(config: Config, ranks: Ranks, topology: Topology | None = None) -> RunParts:
    """Build the parts of a run. Every rank must call it.

    Args:
        topology: of the ranks' devices, in place of the configuration's.

    Raises:
        UserError: whatever of the configuration, the data or the model is wrong.
    """
    mesh = make_mesh(ranks.world_size, config.fssdp.shard_size)
    assert dist.get_world_size(ranks.groups.experts) == mesh.shard_size, "the ranks were joined for another fssdp.shard_size"
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    base = front_end(config, ranks, topology)
    config = config_of_model(config, base)
    output = output_of(config, base)
    train_sources, eval_sources = (encode_sources(sources, config, base, ranks) for sources in (config.data.train, config.data.eval))
    stream = TrainStream(
        train_sources,
        seq_len=config.data.seq_len,
        packing=config.data.packing,
        sequences_per_step=config.micro_batch_size * config.gradient_accumulation_steps * ranks.dp_size,
        seed=config.seed,
    )
    moe = build_moe(config, base, ranks, topology)
    if config.lora.init_from and not config.resume:
        begin_with(config, base, moe)
    if config.gradient_checkpointing:
        checkpoint_activations(moe)
    if config.fssdp.reshard_interval:
        check_room(moe.engine)
    optimizer = ExpertOptimizer(
        Trainables(owned_parameters(moe.engine), moe.replicated_parameters(), moe.parts),
        AdamWSettings(
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            epsilon=config.adam_epsilon,
            exclude=config.weight_decay_exclude,
            factor=schedule(config.lr_scheduler_type, config.max_steps, config.warmup_ratio),
        ),
        ranks.device,
    )
    dense_flops = moe.engine.shards.config.non_moe_flops / config.micro_batch_size
    return RunParts(config, base, moe, optimizer, stream, eval_sources, output, dense_flops)


class Training:
    """A run on one rank between its steps. Every method that sends messages must be called on every rank."""

    def __init__(self, config: Config, ranks: Ranks, topology: Topology | None = None) -> None:
        """Build the run, and load its last checkpoint if the configuration says `resume`; arguments as for `build_parts`."""
        self.parts = build_parts(config, ranks, topology)
        self.ranks = ranks
        self.shares: tuple[int, ...] = ()
        """sequences of each micro-step, by rank, or by tensor group, whose ranks have the same sequences"""
        self.state: TrainState | None = TrainState.at_start(self.parts.trained)
        """where the run stands; None: not known on this rank, which comes new to a run under way"""
        if config.resume:
            try:
                self.state = load_state(self.parts.config, ranks, self.parts.trained)
            except NoCheckpointError as error:
                raise UserError(f"resume=true, but {error}\n  start a new run with resume=false") from error
        self.plan_for(self.parts.moe.engine.shards.config.topology)
        self._copy_backups()

    @property
    def standing(self) -> TrainState:
        """The state, on a rank that has one."""
        assert self.state is not None, "this rank has not joined the run yet"
        return self.state

    def plan_for(self, topology: Topology, shares: Sequence[int] | None = None) -> None:
        """Plan for these devices from the next step on, and deal the sequences of a micro-step: by speed, or as given."""
        parts, config = self.parts, self.parts.config
        size = parts.stream.sequences_per_step // config.gradient_accumulation_steps
        speeds = slowest_of_each(topology.flops, self.ranks.tp_size)
        self.shares = tuple(shares or sequences_by_speed(size, speeds))
        assert sum(self.shares) == size, (self.shares, size)
        # Experts travel until the last rank is through with its attention; the planner takes that for the slowest device's time.
        flops = parts.dense_flops * dense_seconds(self.shares, speeds) * min(topology.flops)
        engine = parts.moe.engine
        engine.shards.config = replace(engine.shards.config, topology=topology, non_moe_flops=flops)

    def micro_batches(self, sequences: list[PackedSequence]) -> list[Batch]:
        """This rank's share of a global step: micro-step m takes the m-th part of the sequences, and rank or tensor group r the r-th part
        of that.

        A micro-step has `micro_batch_size` sequences for each rank that there was when the run began, however many ranks there are now.
        """
        config, ranks = self.parts.config, self.ranks
        size = len(sequences) // config.gradient_accumulation_steps
        own = sequence_ranges(size, self.shares)[ranks.dp_rank]
        pad_id = self.parts.base.tokenizer.pad_token_id or 0
        shares = [sequences[start + own.start : start + own.stop] or [empty_sequence()] for start in range(0, len(sequences), size)]
        return [collate(share, pad_id, config.data.seq_len, ranks.tp_size).to(ranks.device) for share in shares]

    def train_one(self) -> StepEvent:
        """One optimizer step; `bytes_sent` of the event are this rank's own.

        Raises:
            UserError: too many steps in a row had gradients that were not finite.
        """
        parts, config, engine = self.parts, self.parts.config, self.parts.moe.engine
        started, sent, learning_rate = time.monotonic(), engine.shards.bytes_sent, parts.optimizer.learning_rate
        waited = jit.waited_seconds()
        sequences = parts.stream.next_step()
        tokens = sum(len(sequence.input_ids) for sequence in sequences)
        result = train_step(
            parts.moe,
            parts.base.head,
            parts.optimizer,
            self.micro_batches(sequences),
            num_labels=sum(int((sequence.targets != IGNORED).sum()) for sequence in sequences),
            aux_coef=config.moe.router_aux_loss_coef,
            max_grad_norm=config.max_grad_norm,
            step=self.standing.step,
            redundancy=config.fssdp.redundancy,
        )
        self.state = self.standing.after_step(parts.trained, tokens=tokens, skipped=result.skipped)
        _refuse_endless_skipping(self.state)
        # Waiting for the planner's machine code happens once a machine and is none of the training's speed.
        seconds = time.monotonic() - started - (jit.waited_seconds() - waited)
        return StepEvent(
            step=self.state.step,
            result=result,
            tokens=tokens,
            seconds=seconds,
            learning_rate=learning_rate,
            imbalance=engine.shards.plans.imbalance(result.loads),
            calibrations=engine.shards.plans.calibrations,
            bytes_sent=engine.shards.bytes_sent - sent,
        )

    def complete_step(self) -> None:
        """Note that everything that comes between this step and the next is done."""
        self.state = replace(self.standing, completed=self.standing.step)

    def evaluate(self) -> Evaluation:
        """Evaluate on all held-out sources."""
        return evaluate(self.parts.config, self.ranks, self.parts.base, self.parts.moe, self.parts.eval_sources)

    def reshard(self, steps: int) -> Resharding | None:
        """Move experts to better owners, if `steps` more steps repay it; at most the run's remaining steps count."""
        parts = self.parts
        done = reshard_if_it_pays(parts.moe.engine, parts.optimizer, min(steps, parts.config.max_steps - self.standing.step))
        if done:
            self._copy_backups()
        return done

    def save(self) -> Path | None:
        """Write a checkpoint; its folder, or None if there is one of this step already."""
        return save_state(self.parts.config, self.ranks, self.parts.trained, self.standing)

    def join(self, group: Group) -> Rebuilt:
        """Go on with the ranks of a group, from the beginning of a step. All of them must call it; they have left their old groups.

        Raises:
            RuntimeError: a rank was lost meanwhile. This can be called again, with the next group.
            UserError: some experts have no copy left, and there is no checkpoint to go back to.
        """
        parts, config = self.parts.trained, self.parts.config
        self.ranks = group.ranks
        standings = exchange_standings(group.ranks, self.state, parts.optimizer)
        if group.ranks.is_first:
            remove_stale_staging(Path(config.output_dir))
        dealt = None
        if can_catch_up(standings):
            if self.state is not None:
                self.state = catch_up(parts, self.state, standings, config.max_grad_norm)
                _refuse_endless_skipping(self.state)
            dealt = redeal(parts, self.state, standings, group)
        if dealt is not None:
            self.state, moved = dealt
        else:
            self.state = None  # until the checkpoint is loaded, nothing that this rank holds counts
            self.state, moved = go_back(parts, config, group), 0
        self._copy_backups()
        self.plan_for(group.topology)
        return Rebuilt(self.state.step, dealt is None, moved)

    def facts(self) -> RunFacts:
        """What reports say about the run."""
        config = self.parts.config
        size = self.parts.stream.sequences_per_step // config.gradient_accumulation_steps
        most_sequences = max(len(own) for own in sequence_ranges(size, self.shares)) * config.gradient_accumulation_steps
        return RunFacts(
            step=self.standing.step,
            is_first=self.ranks.is_first,
            mesh=self.parts.moe.engine.shards.mesh,
            trainable=tuple(trainable_rows(self.parts.moe)),
            tokens_per_rank=most_sequences * config.data.seq_len,
        )

    def _copy_backups(self) -> None:
        if self.parts.config.fssdp.redundancy:
            copy_to_backup_ranks(self.parts.moe.engine, self.parts.optimizer)


def _refuse_endless_skipping(state: TrainState) -> None:
    if state.skipped_in_a_row == _MOST_SKIPPED_IN_A_ROW:
        raise UserError(
            f"{_MOST_SKIPPED_IN_A_ROW} steps in a row, up to step {state.step}, had gradients that were not finite; all were skipped.\n"
            "  lower learning_rate, or resume from an earlier checkpoint"
        )
