"""A training run on one rank: its state, and the phases that `hecate.train.loop` goes through."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from hecate import faults
from hecate.adapters.trained_output import output_of
from hecate.checkpoint import remove_stale_staging, stopped_early
from hecate.checkpoint.save_run import Saved, SaveUnderWay, begin_save, end_save, save_state
from hecate.checkpoint.train_state import NoCheckpointError, TrainState, load_state, saved_max_steps
from hecate.config import Config, MoeConfig
from hecate.config.rules.of_apps import single_sequences
from hecate.data.batches import Batch, collate, sequence_ranges
from hecate.data.encode import IGNORED
from hecate.data.separate_streams import Stream
from hecate.data.sequences import PackedSequence, empty_sequence
from hecate.elastic.backups import copy_to_backup_ranks
from hecate.elastic.damaged_copies import CopiesRestoredError, CopyChecks
from hecate.elastic.layer_timer import LayerTimer
from hecate.elastic.move_experts import reshard_if_it_pays
from hecate.elastic.rebuild import Group, NoCopyLeft, can_catch_up, catch_up, exchange_rank_states, go_back, named, redeal
from hecate.errors import UserError
from hecate.model.causal_head import TokenLoss, head_with_loss
from hecate.optim.from_config import learning_rate
from hecate.optim.norm_limit import norm_limit
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.loops import jit
from hecate.parallel.values.placement import Placement, new_copies
from hecate.parallel.values.sequence_shares import dense_seconds, sequences_by_speed, slowest_of_each
from hecate.parallel.values.static_ep_imbalance import static_ep_imbalance
from hecate.parallel.values.units import Unit
from hecate.ranks.ranks import Ranks
from hecate.report.events import DenseWork, Evaluation, Rebuilt, Resharding, StepEvent, StepResult
from hecate.report.run_report import RunFacts, trainable_rows
from hecate.train.best_model import ends_early, judged, step_to_leave
from hecate.train.build import build_parts, shard_layers_again
from hecate.train.evaluate import evaluate
from hecate.train.extensions.copies import ComparedCopies
from hecate.train.extensions.from_config import step_extensions
from hecate.train.extensions.of_apps import training_additions
from hecate.train.extensions.rank_figures import RankFigures
from hecate.train.steps.passes_in_order import prepare_for_order, sequences_of_a_group, sequences_of_a_pass, step_sums
from hecate.train.steps.skipped_steps import StepInputs, too_many_skipped
from hecate.train.steps.step import StepBatches, StepRules, train_step
from hecate.train.steps.step_clock import StepClock

_GIVEN_UP = "the checkpoint that was being written is given up, because a rank was lost; the next one comes as planned"


class Training:
    """A run on one rank between its steps. Every method that sends messages must be called on every rank.

    `parts` are built once. Three values change, each as a whole: `state` with every step, `ranks` and `shares` when ranks come or go or
    the plan changes.
    """

    def __init__(
        self, config: Config, ranks: Ranks, topology: Topology | None = None, *, joins: bool = False, loss: TokenLoss | None = None
    ) -> None:
        """Build the run, and load its last checkpoint if the configuration says `resume`.

        Args:
            topology: of the ranks' devices, in place of the configuration's.
            joins: the run is under way, and this process is alone in `ranks` until it joins a group (`join`). It loads no checkpoint.
            loss: is trained for, in place of the cross-entropy of label tokens.

        Raises:
            UserError: as `build_parts`; or there is no checkpoint to resume from, or its run or this model cannot have that loss.
        """
        # Alone, a rank would need room for all experts to re-shard them.
        built = replace(config, resume=False, fssdp=replace(config.fssdp, reshard_interval=None, shard_size=None)) if joins else config
        parts = build_parts(built, ranks, topology)
        self.parts = replace(parts, config=replace(parts.config, resume=config.resume, fssdp=config.fssdp), loss=loss)
        self._head = head_with_loss(parts.base.head, loss)
        self.additions = training_additions(config)
        prepare_for_order(config, ranks.device)
        self.ranks = ranks
        self._sequences_per_epoch = parts.stream.sequences_per_epoch
        """Counted here, because counting takes longer than some steps, and ranks that join would wait for it."""
        self._clock = StepClock(ranks.device)
        self._timer = LayerTimer(parts.moe, ranks.device)
        self._work = DenseWork()
        """This rank's work in the step before."""
        self.copies = CopyChecks(parts.moe.engine, parts.optimizer, config.fssdp)
        self._placed: dict[Unit, Placement] = {}
        """The placements of the step before."""
        self.shares: tuple[int, ...] = ()
        """The number of sequences of each micro-step, by rank, or by tensor group, whose ranks have the same sequences."""
        self.notes: list[str] = []
        """What was found out while the run was built, for its user."""
        self.warnings: tuple[str, ...] = ()
        """The checkpoints that were passed over, and why."""
        self._last: StepInputs | None = None
        """The inputs of the step that was done last, or is under way."""
        self.saving: SaveUnderWay | None = None
        """The save whose writing goes on beside the steps; there is one on all ranks or on none."""
        self.state = None if joins else TrainState.at_start(self.parts.trained)
        """The state that the run has reached; None: it is not known on this rank, which has come new to a run under way."""
        if config.resume and not joins:
            root = Path(config.output_dir)
            try:
                loaded = load_state(self.parts.config, ranks, self.parts.trained)
                self.state, self.warnings = loaded.state, loaded.warnings
            except NoCheckpointError as error:
                if not ranks.all_max(float(ranks.is_first and stopped_early(root))):
                    raise UserError(f"resume=true, but {error}\n  start a new run with resume=false") from error
                self.warnings = (f"{root} holds a run that was stopped before its first checkpoint: it begins again",)
        if not joins:
            self._settle_length()
        for one in self.additions:
            one.check_data(parts)
        if config.resume and not joins and self.run_state.step:
            self.notes += _notes_of_resume(self.parts.config, self.run_state)
        self.notes += _notes_of_routers(self.parts.config.moe)
        self.plan_for(self.parts.moe.engine.shards.config.topology)
        self._copy_backups()

    @property
    def run_state(self) -> TrainState:
        """The state, on a rank that has one."""
        assert self.state is not None, "this rank has not joined the run yet"
        return self.state

    @property
    def epochs(self) -> float:
        """How often the steps done have gone through the data. A resumed run keeps its sequences of a step, whatever its ranks."""
        return self.run_state.step * self.parts.stream.sequences_per_step / self._sequences_per_epoch

    @property
    def epoch_samples(self) -> int | None:
        """The number of samples of an epoch; None: it ends with the longest of sources that are not mixed."""
        return None if self.parts.config.data.separate else sum(len(source) for source in self.parts.stream.sources)

    def plan_for(self, topology: Topology, shares: Sequence[int] | None = None) -> None:
        """Plan for these devices from the next step on, and deal the sequences of a micro-step: by speed, or as given."""
        parts, config = self.parts, self.parts.config
        size = parts.stream.sequences_per_step // config.gradient_accumulation_steps
        speeds = slowest_of_each(topology.flops, self.ranks.tp_size)
        group = sequences_of_a_group(config)
        self.shares = tuple(shares or sequences_by_speed(size, speeds, group))
        assert sum(self.shares) == size, (self.shares, size)
        assert all(share % group == 0 for share in self.shares), (self.shares, group)
        # Experts travel until the last rank is through with its attention; the planner takes that for the slowest device's time.
        flops = parts.dense_flops * dense_seconds(self.shares, speeds) * min(topology.flops)
        engine = parts.moe.engine
        engine.shards.config = replace(engine.shards.config, topology=topology, non_moe_flops=flops)

    def micro_batches(self, sequences: list[PackedSequence]) -> list[Batch]:
        """This rank's share of a global step: micro-step m takes the m-th part of the sequences, and rank or tensor group r the r-th part
        of that.

        A micro-step has `micro_batch_size` sequences for each rank that there was when the run began, however many ranks there are now.
        Where fewer of a rank's sequences are computed together (`single_sequences`, `sequences_of_a_pass`), so many are a micro-batch.
        """
        config, ranks = self.parts.config, self.ranks
        size = len(sequences) // config.gradient_accumulation_steps
        own = sequence_ranges(size, self.shares)[ranks.dp_rank]
        pad_id = self.parts.base.tokenizer.pad_token_id or 0
        shares = [sequences[start + own.start : start + own.stop] or [empty_sequence()] for start in range(0, len(sequences), size)]
        group = 1 if single_sequences(config) else sequences_of_a_pass(config)
        if group is not None:
            most = max(self.shares)  # all ranks run as many micro-batches
            shares = [share[start : start + group] or [empty_sequence()] for share in shares for start in range(0, most, group)]
        multiple = self.parts.base.head.row_multiple(config.data.seq_len)
        return [collate(share, pad_id, config.data.seq_len, ranks.tp_size, multiple).to(ranks.device) for share in shares]

    def train_one(self, requests: Callable[[], Sequence[bool]] = tuple) -> StepEvent:
        """One optimizer step. `requests`: see `RankFigures`."""
        parts, engine = self.parts, self.parts.moe.engine
        started, rate = time.monotonic(), parts.optimizer.learning_rate
        waited = jit.waited_seconds()
        result, tries = None, 0
        while result is None:
            sequences, tries = parts.stream.next_step(), tries + 1
            self._last = StepInputs(self.run_state, sequences)
            try:
                result = self._try_step(sequences, requests)
            except CopiesRestoredError as error:
                error.refuse_after(tries)
                self.run_state.put_back(parts.trained)
        tokens = sum(len(sequence.input_ids) for sequence in sequences)
        # Reading a GPU's events needs no further wait: for the step's totals the host has just waited for the device.
        parts_seconds = self._clock.seconds()
        self._work = self._timer.take()
        self.copies.after_step(self.run_state.step)
        self.state = self.run_state.after_step(parts.trained, tokens=tokens, skipped=result.skipped, grad_norm=result.grad_norm)
        faults.at("trained", sequences)
        # Waiting for the planner's machine code happens once a machine and is none of the training's speed.
        seconds = time.monotonic() - started - (jit.waited_seconds() - waited)
        copies, new = self._count_copies(result.loads)
        return StepEvent(
            step=self.state.step,
            epoch=self.epochs,
            epoch_samples=self.epoch_samples,
            result=result,
            tokens=tokens,
            seconds=seconds,
            learning_rate=rate,
            imbalance=engine.shards.plans.imbalance(result.loads),
            calibrations=engine.shards.plans.calibrations,
            plan_modes=dict(engine.shards.plans.chosen_modes),
            static_imbalance=static_ep_imbalance(result.loads, engine.shards.mesh.shard_size),
            copies=copies,
            new_copies=new,
            work=self._work,
            parts=parts_seconds,
        )

    def _try_step(self, sequences: list[PackedSequence], requests: Callable[[], Sequence[bool]]) -> StepResult:
        """Forward, backward and optimizer step. Raises CopiesRestoredError: see there."""
        parts, config, step = self.parts, self.parts.config, self.run_state.step
        compare = self.copies.of_step(step)
        return train_step(
            parts.moe,
            self._head,
            parts.optimizer,
            StepBatches(
                number=step,
                micro_batches=self.micro_batches(sequences),
                num_labels=sum(int((sequence.targets != IGNORED).sum()) for sequence in sequences),
                num_samples=sum(len(sequence.samples) for sequence in sequences),
            ),
            StepRules(
                aux_coef=config.moe.router_aux_loss_coef,
                max_grad_norm=config.max_grad_norm,
                norm_limit=norm_limit(self.run_state.grad_norms, config.skip_step_sigma_factor),
                sums=step_sums(config, self.shares),
            ),
            [
                *step_extensions(parts, step, sequences, self.additions),
                *([] if compare is None else [ComparedCopies(compare)]),
                RankFigures(requests, self._work),
                self._clock,
            ],
        )

    @property
    def skipped_too_often(self) -> bool:
        """Whether the last `max_skipped_steps` steps were all skipped; the same on every rank."""
        return self.run_state.skipped_in_a_row >= self.parts.config.max_skipped_steps

    def too_many_skipped(self, result: StepResult) -> UserError:
        """See `hecate.train.steps.skipped_steps`; of the step that was done last, with its result.

        Raises:
            UserError: copies of an expert differ, which may be why.
        """
        assert self._last is not None
        self.copies.check_and_restore()
        return too_many_skipped(self.parts.config, self.ranks, self.parts.trained, self._last, self.run_state, result)

    def _count_copies(self, units: Collection[Unit]) -> tuple[int, int]:
        """How many replicas of these units' experts are on other ranks than their owners', and how many of them the step before lacked."""
        before, placements = self._placed, self.parts.moe.engine.shards.placements
        self._placed = {unit: placements[unit] for unit in units}
        copies = sum(new_copies(None, placement) for placement in self._placed.values())
        return copies, sum(new_copies(before.get(unit), placement) for unit, placement in self._placed.items())

    def complete_step(self) -> None:
        """Note that all phases between this step and the next are done."""
        self.state = replace(self.run_state, completed=self.run_state.step)

    def evaluate(self) -> Evaluation:
        """Evaluate on all held-out sources; before the first step on `eval.max_samples_on_start` samples of each at most."""
        parts, config = self.parts, self.parts.config
        most = [count for count in (config.eval.max_samples, config.eval.max_samples_on_start) if count is not None]
        if self.run_state.step == 0 and most:
            config = replace(config, eval=replace(config.eval, max_samples=min(most)))
        return evaluate(config, self.ranks, parts.base, parts.moe, parts.eval_sources, parts.features_UF)

    def judge(self, found: Evaluation) -> None:
        """Count an evaluation after the last step in what is known of the best model."""
        self.state = judged(self.parts.config, self.ranks, self.run_state, found)

    def leave(self) -> Path:
        """Write what the run leaves, and return its folder. It can be done again after a loss.

        Raises:
            UserError: the best checkpoint is to be left and cannot be read, or the disk refuses.
        """
        parts, step = self.parts, step_to_leave(self.parts.config, self.run_state)
        if step != self.run_state.step:
            try:
                load_state(parts.config, self.ranks, parts.trained, step)
            except NoCheckpointError as error:
                raise UserError(f"{error}\n  resume=true load_best_model_at_end=false leaves the last model") from error
        # What is written says for how many steps it was trained.
        output = parts.output if step == parts.config.max_steps else output_of(replace(parts.config, max_steps=step), parts.base)
        return output.replace(Path(parts.config.output_dir), parts.moe, self.ranks)

    def reshard(self, steps: int) -> Resharding | None:
        """Move experts to better owners, if `steps` more steps repay it; at most the run's remaining steps count.

        Raises:
            UserError: copies of an expert differ, and which is damaged is not known; new ones are made of one of them.
        """
        self.copies.check_and_restore()
        parts = self.parts
        rest = min(steps, parts.config.max_steps - self.run_state.step)
        done = reshard_if_it_pays(parts.moe.engine, parts.optimizer, rest, parts.config.fssdp.redundancy)
        if done:
            self.copies.copies_renewed(self.run_state.step)
        return done

    def save(self) -> Saved:
        """Write a checkpoint, unless there is a whole one of this step. No other save may be under way.

        Raises:
            UserError: copies of an expert differ, and which is damaged is not known; or as `save_state`.
        """
        assert self.saving is None
        faults.at("save")
        self.copies.check_and_restore()
        return save_state(self.parts.config, self.ranks, self.parts.trained, self.run_state)

    def begin_save(self) -> None:
        """Begin to write a checkpoint beside the steps that follow. No other save may be under way. Raises UserError: as `save`."""
        assert self.saving is None
        faults.at("save")
        self.copies.check_and_restore()
        self.saving = begin_save(self.parts.config, self.ranks, self.parts.trained, self.run_state, background=True)

    def end_save(self, *, failed: bool = False) -> Saved:
        """Wait until the save under way is written, and commit it; `failed`: see `hecate.checkpoint.save_run.end_save`."""
        assert self.saving is not None
        save, self.saving = self.saving, None
        return end_save(self.ranks, save, failed=failed)

    def drop_save(self) -> bool:
        """Break off the save under way; whether there was one. It sends no messages."""
        save, self.saving = self.saving, None
        if save is not None:
            save.break_off()
        return save is not None

    def join(self, group: Group) -> Rebuilt:
        """Go on with the ranks of a group, from the beginning of a step. All of them must call it; they have left their old groups.

        Raises:
            RuntimeError: a rank was lost meanwhile. This can be called again, with the next group.
            UserError: some experts have no copy left, and there is no checkpoint to go back to.
        """
        parts, config = self.parts.trained, self.parts.config
        # Before the first message, after which rank 0 deletes what is left of the save: a thread of this rank must not write there then.
        warnings: tuple[str, ...] = (_GIVEN_UP,) if self.drop_save() else ()
        self.ranks = group.ranks
        self.parts.base.rejoin(group.ranks)
        self._timer.take()  # of a step that was broken off
        self._work = DenseWork()
        rank_states = exchange_rank_states(group.ranks, self.state, parts.optimizer)
        if group.ranks.is_first:
            remove_stale_staging(Path(config.output_dir))
        dealt: tuple[TrainState, int] | NoCopyLeft = NoCopyLeft(())
        if can_catch_up(rank_states):
            if self.state is not None:
                self.state = catch_up(parts, self.state, rank_states, config)
            dealt = redeal(parts, self.state, rank_states, group, config.fssdp.redundancy)
        if isinstance(dealt, NoCopyLeft):
            # If a rank is lost while the checkpoint is loaded, this rank must not count as one that has a state.
            self.state = None
            loaded = go_back(parts, config, group, dealt.experts)
            self.state, moved, lost = loaded.state, 0, named(dealt.experts)
            warnings += loaded.warnings
        else:
            (self.state, moved), lost = dealt, ""
        self._settle_length()
        self._copy_backups()
        if config.model.shard_non_experts:
            shard_layers_again(config, self.parts.base, self.parts.moe, group.ranks)
        self.plan_for(group.topology)
        return Rebuilt(self.state.step, lost, moved, warnings)

    def facts(self) -> RunFacts:
        """What reports say about the run."""
        config = self.parts.config
        size = self.parts.stream.sequences_per_step // config.gradient_accumulation_steps
        most_sequences = max(len(own) for own in sequence_ranges(size, self.shares)) * config.gradient_accumulation_steps
        return RunFacts(
            step=self.run_state.step,
            is_first=self.ranks.is_first,
            mesh=self.parts.moe.engine.shards.mesh,
            trainable=tuple(trainable_rows(self.parts.moe)),
            tokens_per_rank=most_sequences * config.data.seq_len,
        )

    def _settle_length(self) -> None:
        """Count how many steps the run's epochs are, if the configuration says epochs. What a step takes is known once the state is."""
        parts, epochs = self.parts, self.parts.config.num_train_epochs
        if epochs is None:
            if self.ranks.is_first and not parts.config.resume:
                self.notes.append(data_in_words(parts.stream, parts.config.max_steps))
            return
        steps = steps_of_epochs(epochs, parts.stream)
        config = replace(parts.config, max_steps=steps, num_train_epochs=None)
        parts.optimizer.schedule = learning_rate(config)
        self.parts = replace(parts, config=config, output=output_of(config, parts.base))  # which says how many steps were trained
        shards = parts.moe.engine.shards
        shards.config = replace(shards.config, max_steps=steps)
        what = "the source of the most sequences" if self.epoch_samples is None else f"{self.epoch_samples} samples"
        self.notes.append(f"{epochs:g} epochs of {what} are {steps} steps")
        if self.ranks.is_first and not parts.config.resume and (few := few_steps(epochs, parts.stream)):
            self.notes.append(few)

    def _copy_backups(self) -> None:
        if redundancy := self.parts.config.fssdp.redundancy:
            copy_to_backup_ranks(self.parts.moe.engine, self.parts.optimizer, redundancy)
        self.copies.copies_renewed(None if self.state is None else self.state.step)


def data_in_words(stream: Stream, steps: int) -> str:
    """Say how many samples there are, and how often the steps of a run go through them."""
    most = 8
    sizes = [f"{source.name} {len(source):,}" for source in stream.sources]
    shown = ", ".join(sizes[:most]) + (f" and {len(sizes) - most} more" if len(sizes) > most else "")
    epochs = steps * stream.sequences_per_step / stream.sequences_per_epoch
    times = f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.2g}"
    return f"samples: {shown}; {steps:,} steps of {stream.sequences_per_step:,} sequences go {times} times through them"


def _notes_of_routers(moe: MoeConfig) -> list[str]:
    """What the user should know of new routers whose one expert of a token always has the weight 1."""
    if moe.kind.of_moe_base or not moe.trains_routers or moe.router.weights != "renormalised" or moe.experts_per_token > 1:
        return []
    balances = moe.router_aux_loss_coef > 0 and moe.router.bias != "balancing"
    trains = "only the load-balancing loss trains" if balances else "nothing trains"
    weight = "with moe.top_k=1 and renormalised weights each chosen expert has the weight 1"
    return [f"{weight}, so that {trains} the routers; with moe.router.weights=gate the loss of the text does"]


def _notes_of_resume(config: Config, state: TrainState) -> list[str]:
    """What the user of a resumed run should know of its length."""
    then, now, notes = saved_max_steps(Path(config.output_dir), state.step), config.max_steps, []
    if ends_early(config, state):
        notes.append(f"this run has ended early, after step {state.step}; to train on, give a larger early_stopping_patience, or null")
    elif state.step >= now:
        more = max(2 * now, state.step + 1)
        notes.append(f"all {now} steps of this run are done; to train on, resume it with more: max_steps={more}, or num_train_epochs=...")
    elif then != now and config.lr_scheduler_type != "constant":
        notes.append(f"max_steps was {then} and is {now}: from step {state.step} on, the learning rate is on the curve of {now} steps")
    return notes


_FEW_STEPS = 10
"""Fewer steps than this hardly train: most of them are warm-up, and the rest see the end of the learning rate's curve."""


def few_steps(epochs: float, stream: Stream) -> str | None:
    """Say that the data make a run of fewer than ten steps, and what would make it longer; None: they do not."""
    steps = steps_of_epochs(epochs, stream)
    if steps >= _FEW_STEPS:
        return None
    sequences = epochs * stream.sequences_per_epoch
    fewer = int(sequences // _FEW_STEPS)
    smaller = f"let a step take at most {fewer} (micro_batch_size, gradient_accumulation_steps, ranks), or " if fewer else ""
    return (
        f"few data: {steps} steps are too few to learn much, because a step takes {stream.sequences_per_step} sequences and "
        f"{epochs:g} epochs have about {sequences:.0f}\n"
        f"  for {_FEW_STEPS} steps {smaller}set num_train_epochs={math.ceil(epochs * _FEW_STEPS * stream.sequences_per_step / sequences):g}"
    )


def steps_of_epochs(epochs: float, stream: Stream) -> int:
    """The number of steps, at least 1, that take as many samples as so many epochs have (`TrainStream.sequences_per_epoch`)."""
    steps = epochs * stream.sequences_per_epoch / stream.sequences_per_step
    return max(1, math.ceil(steps - 1e-6))  # 0.1 * 30 is more than 3
