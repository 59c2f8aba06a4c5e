"""A training run from beginning to end, on one rank."""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from hecate.checkpoint import checkpoint_folder
from hecate.checkpoint.files import write_durable
from hecate.config import Config, to_yaml
from hecate.data.batches import Batch, collate, row_ranges
from hecate.data.encode import IGNORED, EncodedSource
from hecate.data.rows import Row, empty_row
from hecate.data.stream import TrainStream
from hecate.errors import UserError
from hecate.model.checkpointing import checkpoint_activations
from hecate.model.surgery import MoeModel
from hecate.parallel.token_shares import dense_seconds, rows_by_speed
from hecate.parallel.topology import Topology
from hecate.parallel.topology_file import topology_text
from hecate.parallel.traces import TraceWriter
from hecate.train.build import BaseModel, build_moe, encode_sources, front_end, settled
from hecate.train.evaluate import Evaluation, evaluate
from hecate.train.heatmap import write_heatmap
from hecate.train.metrics import MetricsWriter, eval_record, event_record, reshard_record, step_record
from hecate.train.observer import Observer, Order, StepFacts
from hecate.train.optimizer import ExpertOptimizer
from hecate.train.output import TrainedOutput, output_of
from hecate.train.pace import Pace
from hecate.train.peft_adapter import begin_with
from hecate.train.progress import Progress, StepLine
from hecate.train.ranks import Ranks
from hecate.train.resharding import check_room, owned_parameters, reshard_if_it_pays
from hecate.train.schedule import schedule
from hecate.train.state import load_state, save_state
from hecate.train.step import StepResult, train_step
from hecate.train.summary import EVERY_RANK, NON_EXPERTS, TrainableRow, print_summary, training_report

_MOST_SKIPPED_IN_A_ROW = 10


class Run:
    """The parts of one rank's run, and what happened so far."""

    def __init__(self, config: Config, ranks: Ranks, topology: Topology | None = None) -> None:
        self.ranks = ranks
        self.folder = Path(config.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.base: BaseModel = front_end(config, ranks, topology)
        self.config = config = settled(config, self.base)
        self.output: TrainedOutput = output_of(config, self.base)
        sources = encode_sources(config.data.train, config, self.base, ranks)
        self.eval_sources: list[EncodedSource] = encode_sources(config.data.eval, config, self.base, ranks)
        self.stream = TrainStream(
            sources,
            seq_len=config.data.seq_len,
            packing=config.data.packing,
            rows_per_step=config.micro_batch_size * config.gradient_accumulation_steps * ranks.world_size,
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
            owned_parameters(self.moe.engine),
            self.moe.replicated_parameters(),
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            schedule=schedule(config.lr_scheduler_type, config.max_steps, config.warmup_ratio),
        )
        self.shares: tuple[int, ...] = ()
        """rows of each micro-step, by rank"""
        self._dense_flops = self.moe.engine.config.non_moe_flops / config.micro_batch_size
        """that hide a layer's gather, for each row"""
        self.step, self.tokens = 0, 0
        self.skipped = self.skipped_in_a_row = 0
        if config.resume:
            self.step, self.tokens = load_state(config, ranks, self.moe, self.optimizer, self.stream)
        self.plan_for(self.moe.engine.config.topology)

    def plan_for(self, topology: Topology, rows: Sequence[int] | None = None) -> None:
        """Plan with these devices from the next step on, and deal the rows of a micro-step: by speed, or as given. The links stay as
        they are. Every rank must call it, with the same values."""
        size = self.stream.rows_per_step // self.config.gradient_accumulation_steps
        self.shares = tuple(rows or rows_by_speed(size, topology.flops))
        assert sum(self.shares) == size, (self.shares, size)
        # Experts travel while the last rank is through with its attention; the planner takes that for the slowest device's time.
        flops = self._dense_flops * dense_seconds(self.shares, topology.flops) * min(topology.flops)
        self.moe.engine.config = replace(self.moe.engine.config, topology=topology, non_moe_flops=flops)

    def micro_batches(self, rows: list[Row]) -> list[Batch]:
        """This rank's share of a global step: micro-step m takes the m-th part of the rows, rank r the r-th part of that.

        A run has as many rows in a micro-step as it had ranks when it began times `micro_batch_size`, however many ranks it has now.
        """
        size = len(rows) // self.config.gradient_accumulation_steps
        mine = row_ranges(size, self.shares)[self.ranks.rank]
        pad_id = self.base.tokenizer.pad_token_id or 0
        parts = [rows[start + mine.start : start + mine.stop] or [empty_row()] for start in range(0, len(rows), size)]
        return [collate(part, pad_id, self.config.data.seq_len).to(self.ranks.device) for part in parts]

    def train_one(self) -> tuple[StepResult, int]:
        """One optimizer step; its result and its number of tokens over all ranks."""
        rows = self.stream.next_step()
        result = train_step(
            self.moe,
            self.base.head,
            self.optimizer,
            self.micro_batches(rows),
            num_labels=sum(int((row.targets != IGNORED).sum()) for row in rows),
            aux_coef=self.config.moe.router_aux_loss_coef,
            max_grad_norm=self.config.max_grad_norm,
            step=self.step,
        )
        self.step += 1
        tokens = sum(len(row.input_ids) for row in rows)
        self.tokens += tokens
        self.skipped += result.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if self.skipped_in_a_row == _MOST_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{_MOST_SKIPPED_IN_A_ROW} steps in a row, up to step {self.step}, had gradients that were not finite; all were skipped.\n"
                "  lower learning_rate, or resume from an earlier checkpoint"
            )
        return result, tokens

    def save(self) -> Path | None:
        return save_state(self.config, self.ranks, self.moe, self.optimizer, self.stream, step=self.step, tokens=self.tokens)


def train(config: Config, ranks: Ranks, topology: Topology | None = None, observer: Observer | None = None) -> bool:
    """Train as configured, then evaluate, save, export and show. Every rank must call it.

    Args:
        topology: in place of the configuration's.
        observer: is told of every step, and may change the plan or ask for a stop.

    Returns:
        Whether it came to its end; False: it was asked to stop before, and has saved.

    Raises:
        UserError: whatever of the configuration, the data, the model or the disk is wrong.
    """
    started = time.monotonic()
    run = Run(config, ranks, topology)
    pace = Pace(run.moe, ranks.device) if observer else None
    with ExitStack() as stack:
        stopping = stack.enter_context(_stop_on_signals())
        progress = stack.enter_context(Progress(config.max_steps, run.step)) if ranks.is_first else None
        metrics = stack.enter_context(_metrics(run)) if ranks.is_first else None
        trace = _trace(run) if config.trace and ranks.is_first else None
        if progress:
            _announce(run, progress)
        before = _evaluate(run, progress, metrics) if config.eval.on_start and run.eval_sources and run.step == 0 else None
        last: Evaluation | None = None
        train_seconds, first_tokens = 0.0, run.tokens
        order_done = 0
        if observer:
            observer.begins(_beginning(run))
        while run.step < config.max_steps:
            step_started, sent = time.monotonic(), run.moe.engine.bytes_sent
            learning_rate = run.optimizer.learning_rate
            result, tokens = run.train_one()
            seconds = time.monotonic() - step_started
            train_seconds += seconds
            bytes_sent = int(ranks.all_sum(torch.tensor([run.moe.engine.bytes_sent - sent]))[0])
            order = observer.order() if observer and ranks.is_first else None
            text = b"" if order is None or order.number <= order_done else order.to_bytes()
            wants_stop = stopping.is_set or (observer is not None and observer.wants_stop())
            stop, has_order = ranks.all_most([float(wants_stop), float(bool(text))])
            if observer and pace:
                observer.stepped(_facts(run, result, seconds, tokens, bytes_sent, pace))
            if has_order:
                order = Order.from_bytes(ranks.broadcast_from(0, text or None))
                order_done = order.number
                _carry_out(run, order, progress, metrics)
            if trace:
                trace.append(run.step, result.loads)
            if progress and metrics and run.step % config.logging_steps == 0:
                skew = run.moe.engine.imbalance(result.loads)
                metrics.write(
                    step_record(
                        step=run.step,
                        loss=result.loss,
                        aux_loss=result.aux_loss,
                        learning_rate=learning_rate,
                        grad_norm=result.grad_norm,
                        skipped=result.skipped,
                        tokens=tokens,
                        step_seconds=seconds,
                        imbalance=skew,
                        bytes_sent=bytes_sent,
                        calibrations=run.moe.engine.calibrations,
                        loads=result.loads,
                    )
                )
                progress.step(
                    StepLine(run.step, result.loss, result.aux_loss, learning_rate, tokens / seconds, skew, seconds, result.skipped)
                )
            if config.fssdp.reshard_interval and run.step % config.fssdp.reshard_interval == 0:
                _reshard(run, config.fssdp.reshard_interval, progress, metrics)
            done = run.step == config.max_steps
            if run.eval_sources and not stop and (done or (config.eval_steps and run.step % config.eval_steps == 0)):
                last = _evaluate(run, progress, metrics)
            if done or stop or (config.save_steps and run.step % config.save_steps == 0):
                if trace:  # before the checkpoint, so that a run that resumes from it finds the steps up to it
                    trace.save()
                _save(run, progress, metrics)
                if observer and ranks.is_first:
                    observer.saved(run.step, checkpoint_folder(run.folder, run.step))
            if stop:
                if progress:
                    progress.note(
                        f"stopped by a signal after step {run.step}; go on with: hecate train {run.folder / 'config.yaml'} resume=true"
                    )
                return False
        written = run.output.replace(run.folder, run.moe, ranks)
        peak_bytes = int(ranks.all_max(float(peak_memory())))
    if ranks.is_first:
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


def _metrics(run: Run) -> MetricsWriter:
    writer = MetricsWriter(run.folder / "metrics.jsonl")
    writer.truncate_after(run.step)
    return writer


def _trace(run: Run) -> TraceWriter:
    config = run.config
    rows = run.stream.rows_per_step // config.gradient_accumulation_steps
    most = max(len(mine) for mine in row_ranges(rows, run.shares))
    return TraceWriter(
        run.folder / "loads.npz",
        top_k=config.moe.choices,
        tokens_per_rank=most * config.gradient_accumulation_steps * config.data.seq_len,
        model=config.model.name_or_path,
        notes={"data": [source.name for source in config.data.train], "policy": config.fssdp.policy},
        after=run.step,
    )


def _announce(run: Run, progress: Progress) -> None:
    """Save the effective configuration and the report of what trains, and show the latter."""
    text, report = training_report(trainable_rows(run.moe))
    config_path = run.folder / "config.yaml"
    config_path.write_text(to_yaml(run.config), encoding="utf-8")
    report_path = run.folder / "trainable.json"
    report_path.unlink(missing_ok=True)
    write_durable(report_path, [json.dumps(report, indent=1).encode()])
    progress.note(text)
    if run.step:
        progress.note(f"resumed after step {run.step}")


def trainable_rows(moe: MoeModel) -> list[TrainableRow]:
    """What trains, by owner."""
    rows = []
    for layer, owner_E in moe.engine.owners.items():
        store = moe.engine.stores[layer]
        for rank in range(moe.engine.world_size):
            count = int((owner_E == rank).sum())
            if count:
                rows.append(TrainableRow(f"layers.{layer}.experts", count, store.chunk_numel, store.chunk_bytes, f"rank {rank}"))
    for name, parameter in moe.replicated_parameters().items():
        if name in moe.others:
            continue
        rows.append(TrainableRow(name, 1, parameter.numel(), parameter.numel() * parameter.element_size(), EVERY_RANK))
    if moe.others:
        numel = sum(parameter.numel() for parameter in moe.others.values())
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in moe.others.values())
        rows.append(TrainableRow(NON_EXPERTS, 1, numel, num_bytes, EVERY_RANK))
    return rows


def _beginning(run: Run) -> dict[str, Any]:
    """See `Observer.begins`."""
    return {
        "step": run.step,
        "max_steps": run.config.max_steps,
        "rows": list(run.shares),
        "owned": np.bincount(np.concatenate([*run.moe.engine.owners.values(), []]).astype(int), minlength=len(run.shares)).tolist(),
        "topology": topology_text(run.moe.engine.config.topology),
    }


def _facts(run: Run, result: StepResult, seconds: float, tokens: int, bytes_sent: int, pace: Pace) -> StepFacts:
    dense_tokens, dense_seconds = pace.take()
    return StepFacts(
        step=run.step,
        seconds=seconds,
        dense_tokens=dense_tokens,
        dense_seconds=dense_seconds,
        loss=result.loss,
        tokens=tokens,
        imbalance=run.moe.engine.imbalance(result.loads),
        bytes_sent=bytes_sent,
        loads={layer: loads_SE.sum(0).tolist() for layer, loads_SE in result.loads.items()},
    )


def _carry_out(run: Run, order: Order, progress: Progress | None, metrics: MetricsWriter | None) -> None:
    """Change the plan as whoever watches the run wants it. Every rank must call it, with the same order."""
    now = run.moe.engine.config.topology
    run.plan_for(now if order.flops is None else replace(now, flops=order.flops), order.rows)
    if progress and metrics:
        text = f"re-planned after step {run.step}: rows {':'.join(map(str, run.shares))}"
        metrics.write(event_record(run.step, text))
        progress.note(text)
    if order.reshard:
        _reshard(run, run.config.max_steps, progress, metrics)


def _evaluate(run: Run, progress: Progress | None, metrics: MetricsWriter | None) -> Evaluation:
    found = evaluate(run.config, run.ranks, run.base, run.moe, run.eval_sources)
    if metrics and progress:
        metrics.write(eval_record(run.step, found.scores))
        progress.evaluated(run.step, found.scores)
    return found


def _reshard(run: Run, interval: int, progress: Progress | None, metrics: MetricsWriter | None) -> None:
    done = reshard_if_it_pays(run.moe.engine, run.optimizer, min(interval, run.config.max_steps - run.step))
    if done and progress and metrics:
        move, gain = done.move, done.gain
        text = (
            f"re-sharded after step {run.step}: {move.experts} experts moved, {move.num_bytes} bytes, {done.seconds:.3f} s; "
            f"predicted to save {gain.saved:.2g} s a step and to cost {gain.moving:.2g} s"
        )
        metrics.write(
            reshard_record(
                run.step,
                experts=move.experts,
                bytes_sent=move.num_bytes,
                seconds=done.seconds,
                saved_seconds=gain.saved,
                moving_seconds=gain.moving,
            )
        )
        progress.note(text)


def _save(run: Run, progress: Progress | None, metrics: MetricsWriter | None) -> None:
    path = run.save()
    if path and progress and metrics:
        metrics.write(event_record(run.step, f"saved {path.name}"))
        progress.note(f"saved {path}")


def _shares(evaluation: Evaluation) -> dict[str, list[list[float]]]:
    """Per source and layer, each expert's share of the token-slots."""
    return {
        source: [[count / max(sum(counts), 1) for count in counts] for _, counts in sorted(layers.items())]
        for source, layers in evaluation.loads.items()
    }
