"""What a run tells of itself while it trains: the terminal, metrics.jsonl, the recorded loads. The first rank alone speaks."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from hecate.config import to_yaml
from hecate.data.batches import sequence_ranges
from hecate.io.durable import write_durable
from hecate.model.moe_model import MoeModel
from hecate.parallel.traces import TraceWriter
from hecate.report.events import Evaluation, Rebuilt, Resharding, StepResult
from hecate.report.metrics import MetricsWriter, eval_record, event_record, reshard_record, step_record
from hecate.report.progress import Progress, StepLine
from hecate.report.summary import EVERY_RANK, NON_EXPERTS, TrainableRow, training_report

if TYPE_CHECKING:
    from hecate.train.loop import Run


class Reports:
    """Every rank has one; those of other ranks than the first do nothing. Which rank is the first may change (`regrouped`)."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self._metrics: MetricsWriter | None = None
        self._trace: TraceWriter | None = None

    def __enter__(self) -> Reports:
        self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def begin(self) -> None:
        """Save the effective configuration and the report of what trains, and show the latter."""
        if self._progress is None:
            return
        self._progress.note(self._write_description())
        mesh = self._run.moe.engine.shards.mesh
        if mesh.num_sharding_groups > 1:
            self._progress.note(
                f"{mesh.num_sharding_groups} sharding groups of {mesh.shard_size} ranks, each with all experts owned like this"
            )
        if self._run.step:
            self._progress.note(f"resumed after step {self._run.step}")

    def note(self, text: str) -> None:
        if self._progress:
            self._progress.note(text)

    def event(self, text: str) -> None:
        if self._progress and self._metrics:
            self._metrics.write(event_record(self._run.step, text))
            self._progress.note(text)

    def step(self, result: StepResult, *, tokens: int, seconds: float, learning_rate: float, bytes_sent: int) -> None:
        run = self._run
        if self._trace:
            self._trace.append(run.step, {unit.layer: loads for unit, loads in result.loads.items()})
        if not (self._progress and self._metrics) or run.step % run.config.logging_steps:
            return
        skew = run.moe.engine.shards.plans.imbalance(result.loads)
        self._metrics.write(
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
                calibrations=run.moe.engine.shards.plans.calibrations,
                loads=result.loads,
            )
        )
        self._progress.step(
            StepLine(run.step, result.loss, result.aux_loss, learning_rate, tokens / seconds, skew, seconds, result.skipped)
        )

    def evaluated(self, found: Evaluation) -> None:
        if self._progress and self._metrics:
            self._metrics.write(eval_record(self._run.step, found.scores))
            self._progress.evaluated(self._run.step, found.scores)

    def resharded(self, done: Resharding) -> None:
        if not (self._progress and self._metrics):
            return
        move, gain, step = done.move, done.gain, self._run.step
        self._metrics.write(
            reshard_record(
                step,
                experts=move.experts,
                bytes_sent=move.num_bytes,
                seconds=done.seconds,
                saved_seconds=gain.saved,
                moving_seconds=gain.moving,
            )
        )
        self._progress.note(
            f"re-sharded after step {step}: {move.experts} experts moved, {move.num_bytes} bytes, {done.seconds:.3f} s; "
            f"predicted to save {gain.saved:.2g} s a step and to cost {gain.moving:.2g} s"
        )

    def saving(self) -> None:
        """Before a checkpoint, so that a run that resumes from it finds the recorded loads up to it."""
        if self._trace:
            self._trace.save()

    def saved(self, path: Path) -> None:
        if self._progress and self._metrics:
            self._metrics.write(event_record(self._run.step, f"saved {path.name}"))
            self._progress.note(f"saved {path}")

    def regrouped(self, done: Rebuilt, seconds: float) -> None:
        """The run goes on with other ranks; this one may have become the first, or another has."""
        if self._run.ranks.is_first and self._progress is None:
            self._open()
        elif not self._run.ranks.is_first:
            self._stack.close()
            self._progress = self._metrics = self._trace = None
        if not (self._progress and self._metrics):
            return
        if done.went_back:
            self._metrics.truncate_after(done.step)
            self._trace = self._open_trace()
        self._write_description()
        text = f"{self._run.ranks.world_size} ranks go on after step {done.step}, {done.moved} experts moved, {seconds:.3f} s"
        self._metrics.write(event_record(done.step, text + (", back at the last checkpoint" if done.went_back else "")))
        self._progress.note(text + ("; back at the last checkpoint, for some experts have no copy left" if done.went_back else ""))

    def _open(self) -> None:
        run = self._run
        if not run.ranks.is_first:
            return
        self._progress = self._stack.enter_context(Progress(run.config.max_steps, run.step))
        self._metrics = self._stack.enter_context(MetricsWriter(run.folder / "metrics.jsonl"))
        self._metrics.truncate_after(run.step)
        self._trace = self._open_trace()

    def _open_trace(self) -> TraceWriter | None:
        run, config = self._run, self._run.config
        if not config.trace:
            return None
        rows = run.stream.sequences_per_step // config.gradient_accumulation_steps
        most = max(len(mine) for mine in sequence_ranges(rows, run.shares))
        return TraceWriter(
            run.folder / "loads.npz",
            top_k=config.moe.experts_per_token,
            tokens_per_rank=most * config.gradient_accumulation_steps * config.data.seq_len,
            model=config.model.name_or_path,
            notes={"data": [source.name for source in config.data.train], "policy": config.fssdp.policy},
            after=run.step,
        )

    def _write_description(self) -> str:
        """The report of what trains, as text."""
        run = self._run
        text, report = training_report(trainable_rows(run.moe))
        (run.folder / "config.yaml").write_text(to_yaml(run.config), encoding="utf-8")
        path = run.folder / "trainable.json"
        path.unlink(missing_ok=True)
        write_durable(path, [json.dumps(report, indent=1).encode()])
        return text


def trainable_rows(moe: MoeModel) -> list[TrainableRow]:
    """What trains, by owner."""
    rows = []
    for layer, owner_E in moe.engine.shards.owners.items():
        store = moe.engine.shards.stores[layer]
        for rank in range(moe.engine.shards.world_size):
            count = int((owner_E == rank).sum())
            if count:
                rows.append(TrainableRow(f"layers.{layer}.experts", count, store.chunk_numel, store.chunk_bytes, f"rank {rank}"))
    for name, parameter in moe.replicated_parameters().items():
        if name in moe.others:
            continue
        rows.append(TrainableRow(name, 1, parameter.numel(), parameter.numel() * parameter.element_size(), EVERY_RANK))
    parts = moe.parts.parameters if moe.parts else {}
    sizes = {EVERY_RANK: 1} | ({f"{moe.parts.groups.tp_size} ranks, a part on each": moe.parts.groups.tp_size} if moe.parts else {})
    for owner, size in sizes.items():
        parameters = [parameter for name, parameter in moe.others.items() if (name in parts) == (owner != EVERY_RANK)]
        if parameters:
            numel = size * sum(parameter.numel() for parameter in parameters)
            num_bytes = size * sum(parameter.numel() * parameter.element_size() for parameter in parameters)
            rows.append(TrainableRow(NON_EXPERTS, 1, numel, num_bytes, owner))
    return rows
