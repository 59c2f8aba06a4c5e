"""A training run from beginning to end, on one rank."""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hecate.adapters.peft_experts import begin_with
from hecate.adapters.trained_output import TrainedOutput, output_of
from hecate.config import Config
from hecate.data.batches import Batch, collate, sequence_ranges
from hecate.data.encode import IGNORED
from hecate.data.sequences import PackedSequence, empty_sequence
from hecate.data.sources import TokenSource
from hecate.data.stream import TrainStream
from hecate.elastic.backups import copy_to_backup_ranks
from hecate.elastic.move_experts import check_room, reshard_if_it_pays
from hecate.elastic.observer import Observer, Order, Watched
from hecate.elastic.rebuild import Controller, rebuild
from hecate.errors import UserError
from hecate.model.base import BaseModel
from hecate.model.checkpointing import checkpoint_activations
from hecate.model.moe_model import MoeModel
from hecate.optim.optimizer import AdamWSettings, ExpertOptimizer, Trainables, owned_parameters, schedule
from hecate.parallel.mesh import make_mesh
from hecate.parallel.sequence_shares import dense_seconds, sequences_by_speed, slowest_of_each
from hecate.parallel.topology import Topology, local_topology
from hecate.parallel.units import Unit
from hecate.ranks.ranks import Ranks
from hecate.report.events import Evaluation, StepResult
from hecate.report.heatmap import write_heatmap
from hecate.report.run_report import Reports
from hecate.report.summary import print_summary
from hecate.train.build import build_moe, encode_sources, front_end, settled
from hecate.train.evaluate import evaluate
from hecate.train.state import load_state, save_state
from hecate.train.step import train_step

_MOST_SKIPPED_IN_A_ROW = 10
_REGROUP, _STOP = 1.0, 2.0
"""what a rank may wish for after a step; the largest wish counts"""


@dataclass(frozen=True)
class StepUnderWay:
    """What is needed to do it again."""

    tokens: int
    """its own, over all ranks"""
    stream: dict[str, Any]
    history: list[dict[Unit, np.ndarray]]


class Run:
    """The parts of one rank's run, and what happened so far."""

    def __init__(self, config: Config, ranks: Ranks, topology: Topology | None = None) -> None:
        self.ranks = ranks
        mesh = make_mesh(ranks.world_size, config.fssdp.shard_size)
        assert dist.get_world_size(ranks.groups.experts) == mesh.shard_size, "the ranks were joined for another fssdp.shard_size"
        self.folder = Path(config.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.base: BaseModel = front_end(config, ranks, topology)
        self.config = config = settled(config, self.base)
        self.output: TrainedOutput = output_of(config, self.base)
        sources = encode_sources(config.data.train, config, self.base, ranks)
        self.eval_sources: list[TokenSource] = encode_sources(config.data.eval, config, self.base, ranks)
        self.stream = TrainStream(
            sources,
            seq_len=config.data.seq_len,
            packing=config.data.packing,
            sequences_per_step=config.micro_batch_size * config.gradient_accumulation_steps * ranks.dp_size,
            seed=config.seed,
        )
        self.moe: MoeModel = build_moe(config, self.base, ranks, topology)
        if config.lora.init_from and not config.resume:
            begin_with(config, self.base, self.moe)
        if config.gradient_checkpointing:
            checkpoint_activations(self.moe)
        if config.fssdp.reshard_interval:
            check_room(self.moe.engine)
        self.optimizer = ExpertOptimizer(
            Trainables(owned_parameters(self.moe.engine), self.moe.replicated_parameters(), self.moe.parts),
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
        self.shares: tuple[int, ...] = ()
        """rows of each micro-step, by rank, or by tensor group, whose ranks have the same rows"""
        self._dense_flops = self.moe.engine.shards.config.non_moe_flops / config.micro_batch_size
        """that hide a layer's gather, for each row"""
        self.step, self.tokens = 0, 0
        self.under_way: StepUnderWay | None = None
        self.fresh = False
        """nothing of the run's state is here but its beginning: see `rebuild`"""
        self.skipped = self.skipped_in_a_row = 0
        if config.resume:
            self.step, self.tokens = load_state(config, ranks, self.moe, self.optimizer, self.stream)
        self.plan_for(self.moe.engine.shards.config.topology)
        self.settled = self.step
        """steps done whose evaluation, checkpoint and all that comes between steps are done, too"""
        if config.fssdp.redundancy:
            copy_to_backup_ranks(self.moe.engine, self.optimizer)

    def plan_for(self, topology: Topology, rows: Sequence[int] | None = None) -> None:
        """Plan with these devices from the next step on, and deal the rows of a micro-step: by speed, or as given. The links stay as
        they are. Every rank must call it, with the same values."""
        size = self.stream.sequences_per_step // self.config.gradient_accumulation_steps
        speeds = slowest_of_each(topology.flops, self.ranks.tp_size)
        self.shares = tuple(rows or sequences_by_speed(size, speeds))
        assert sum(self.shares) == size, (self.shares, size)
        # Experts travel while the last rank is through with its attention; the planner takes that for the slowest device's time.
        flops = self._dense_flops * dense_seconds(self.shares, speeds) * min(topology.flops)
        self.moe.engine.shards.config = replace(self.moe.engine.shards.config, topology=topology, non_moe_flops=flops)

    def micro_batches(self, rows: list[PackedSequence]) -> list[Batch]:
        """This rank's share of a global step: micro-step m takes the m-th part of the rows, rank or tensor group r the r-th part
        of that.

        A run has as many rows in a micro-step as it had ranks when it began times `micro_batch_size`, however many ranks it has now.
        """
        size = len(rows) // self.config.gradient_accumulation_steps
        mine = sequence_ranges(size, self.shares)[self.ranks.dp_rank]
        pad_id = self.base.tokenizer.pad_token_id or 0
        parts = [rows[start + mine.start : start + mine.stop] or [empty_sequence()] for start in range(0, len(rows), size)]
        return [collate(part, pad_id, self.config.data.seq_len, self.ranks.tp_size).to(self.ranks.device) for part in parts]

    def train_one(self) -> tuple[StepResult, int]:
        """One optimizer step; its result and its number of tokens over all ranks."""
        self.under_way = None
        state = self.stream.state_dict()
        rows = self.stream.next_step()
        self.under_way = StepUnderWay(sum(len(row.input_ids) for row in rows), state, self.moe.engine.shards.history.snapshot())
        result = train_step(
            self.moe,
            self.base.head,
            self.optimizer,
            self.micro_batches(rows),
            num_labels=sum(int((row.targets != IGNORED).sum()) for row in rows),
            aux_coef=self.config.moe.router_aux_loss_coef,
            max_grad_norm=self.config.max_grad_norm,
            step=self.step,
            redundancy=self.config.fssdp.redundancy,
        )
        tokens = self.under_way.tokens
        self.count(tokens, skipped=result.skipped)
        return result, tokens

    def count(self, tokens: int, *, skipped: bool) -> None:
        """A step of so many tokens is done."""
        self.step += 1
        self.tokens += tokens
        self.under_way = None
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row == _MOST_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{_MOST_SKIPPED_IN_A_ROW} steps in a row, up to step {self.step}, had gradients that were not finite; all were skipped.\n"
                "  lower learning_rate, or resume from an earlier checkpoint"
            )

    def rewind(self) -> None:
        """Be as before the step under way, if there is one: it will be done again."""
        self.optimizer.abandon()
        if self.under_way is not None:
            self.stream.load_state_dict(self.under_way.stream)
            self.moe.engine.shards.history.restore(self.under_way.history)
            self.under_way = None

    def save(self) -> Path | None:
        return save_state(self.config, self.ranks, self.moe, self.optimizer, self.stream, step=self.step, tokens=self.tokens)


def train(
    config: Config,
    ranks: Ranks,
    controller: Controller | None = None,
    *,
    joins: bool = False,
    topology: Topology | None = None,
    observer: Observer | None = None,
) -> bool:
    """Train as configured, then evaluate, save, export and show. Every rank must call it.

    Args:
        controller: who says with whom to go on when a rank is lost or has come; None: a lost rank is the end.
        joins: this process has come new to a run under way. `ranks` is it alone until the controller lets it in.
        topology: of the ranks' devices, in place of the configuration's.
        observer: is told of every step, and may change the plan or ask for a stop.

    Returns:
        Whether it came to its end; False: it was asked to stop before, and has saved.

    Raises:
        UserError: whatever of the configuration, the data, the model or the disk is wrong.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        stopping = stack.enter_context(_stop_on_signals())
        if joins:
            assert controller is not None
            run = _joined(config, ranks, controller)
        else:
            run = Run(config, ranks, topology)
        reports = stack.enter_context(Reports(run))
        reports.begin()
        watched = Watched(run, observer) if observer else None
        if watched:
            watched.begins()
        before = _evaluate(run, reports) if config.eval.on_start and run.eval_sources and run.step == 0 and not joins else None
        last: Evaluation | None = None
        train_seconds, first_tokens = 0.0, run.tokens
        while run.settled < config.max_steps:
            try:
                if run.settled == run.step:
                    train_seconds += _train_one(run, reports, watched)
                wish, ordered = run.ranks.all_most(
                    [_wish(stopping, controller, observer), float(watched is not None and watched.has_order())]
                )
                if ordered and watched:
                    _carry_out(run, watched.take_order(), reports)
                stop, done = wish == _STOP, run.step == config.max_steps
                if config.fssdp.reshard_interval and run.step % config.fssdp.reshard_interval == 0:
                    _reshard(run, config.fssdp.reshard_interval, reports)
                if run.eval_sources and not stop and (done or (config.eval_steps and run.step % config.eval_steps == 0)):
                    last = _evaluate(run, reports)
                if done or stop or (config.save_steps and run.step % config.save_steps == 0):
                    _save(run, reports, observer)
                run.settled = run.step
                if stop:
                    reports.note(
                        f"stopped by a signal after step {run.step}; go on with: hecate train {run.folder / 'config.yaml'} resume=true"
                    )
                    return False
                if wish == _REGROUP:
                    assert controller is not None
                    _regroup(run, controller, reports, watched)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if controller is None or not _regroup(run, controller, reports, watched):
                    raise
                reports.note(f"went on after: {str(error).splitlines()[0][:120]}")
        written = run.output.replace(run.folder, run.moe, run.ranks)
        peak_bytes = int(run.ranks.all_max(float(peak_memory())))
    if run.ranks.is_first:
        speed = f"{(run.tokens - first_tokens) / train_seconds:.0f}" if train_seconds else "-"
        facts = [
            ("steps", f"{run.step}" + (f", {run.skipped} skipped" if run.skipped else "")),
            ("tokens trained", f"{run.tokens}"),
            ("training tokens/s", speed),
            ("time", f"{time.monotonic() - started:.0f} s, of which training {train_seconds:.0f} s"),
            ("peak memory", f"{peak_bytes / 2**30:.2f} GiB on the fullest rank"),
            (run.output.name, str(written)),
        ]
        if last:
            path = run.folder / "expert_load.png"
            write_heatmap(path, _shares(last), "Share of each task's tokens by layer and expert")
            facts.append(("expert loads", str(path)))
        print_summary(before.scores if before else None, last.scores if last else {}, facts)
    return True


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Stopping:
    is_set = False


@contextmanager
def _stop_on_signals() -> Iterator[_Stopping]:
    """SIGINT and SIGTERM ask for a stop after the step under way, however often they come. In the main thread: no other gets signals."""
    stopping = _Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(_number: int, _frame: FrameType | None) -> None:
        # From a terminal the launcher and the ranks all get the signal, and the launcher passes it on: one wish, several signals.
        stopping.is_set = True

    for number in previous:
        signal.signal(number, ask)
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wish(stopping: _Stopping, controller: Controller | None, observer: Observer | None) -> float:
    if stopping.is_set or (observer is not None and observer.wants_stop()):
        return _STOP
    return _REGROUP if controller is not None and controller.wants_regroup() else 0.0


def _joined(config: Config, ranks: Ranks, controller: Controller) -> Run:
    """Load alone, so that the others train on meanwhile, then join them."""
    alone = replace(config, resume=False, fssdp=replace(config.fssdp, reshard_interval=None))
    run = Run(alone, ranks, local_topology(1, cuda=ranks.device.type == "cuda"))
    run.config, run.fresh = settled(config, run.base), True
    ranks.leave()
    while True:
        group = controller.first_group()
        try:
            rebuild(run, group.ranks, group.topology)
        except RuntimeError:
            group.ranks.leave()
        else:
            return run


def _regroup(run: Run, controller: Controller, reports: Reports, watched: Watched | None) -> bool:
    """Go on with whom the controller names; False: it names nobody. Every rank of the old groups that is left must call it."""
    started = time.monotonic()
    run.ranks.leave()
    while group := controller.next_group():
        try:
            done = rebuild(run, group.ranks, group.topology)
        except RuntimeError:  # another one is lost
            group.ranks.leave()
        else:
            reports.regrouped(done, time.monotonic() - started)
            if watched:
                watched.begins()
            return True
    return False


def _carry_out(run: Run, order: Order, reports: Reports) -> None:
    """Change the plan as whoever watches the run wants it. Every rank must call it, with the same order."""
    now = run.moe.engine.shards.config.topology
    run.plan_for(now if order.flops is None else replace(now, flops=order.flops), order.rows)
    reports.event(f"re-planned after step {run.step}: rows {':'.join(map(str, run.shares))}")
    if order.reshard:
        _reshard(run, run.config.max_steps, reports)


def _train_one(run: Run, reports: Reports, watched: Watched | None) -> float:
    """One optimizer step; its seconds."""
    started, sent = time.monotonic(), run.moe.engine.shards.bytes_sent
    learning_rate = run.optimizer.learning_rate
    result, tokens = run.train_one()
    seconds = time.monotonic() - started
    bytes_sent = int(run.ranks.all_sum(torch.tensor([run.moe.engine.shards.bytes_sent - sent]))[0])
    reports.step(result, tokens=tokens, seconds=seconds, learning_rate=learning_rate, bytes_sent=bytes_sent)
    if watched:
        watched.stepped(result, tokens=tokens, seconds=seconds, bytes_sent=bytes_sent)
    return seconds


def _evaluate(run: Run, reports: Reports) -> Evaluation:
    found = evaluate(run.config, run.ranks, run.base, run.moe, run.eval_sources)
    reports.evaluated(found)
    return found


def _reshard(run: Run, interval: int, reports: Reports) -> None:
    done = reshard_if_it_pays(run.moe.engine, run.optimizer, min(interval, run.config.max_steps - run.step))
    if done:
        if run.config.fssdp.redundancy:
            copy_to_backup_ranks(run.moe.engine, run.optimizer)
        reports.resharded(done)


def _save(run: Run, reports: Reports, observer: Observer | None) -> None:
    reports.saving()
    path = run.save()
    if path:
        reports.saved(path)
        if observer and run.ranks.is_first:
            observer.saved(run.step, path)


def _shares(evaluation: Evaluation) -> dict[str, list[list[float]]]:
    """Per source and layer, each expert's share of the token-slots."""
    return {
        source: [[count / max(sum(counts), 1) for count in counts] for _, counts in sorted(layers.items())]
        for source, layers in evaluation.loads.items()
    }
