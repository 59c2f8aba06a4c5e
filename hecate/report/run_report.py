"""Writes what a run reports while it trains: to the terminal, metrics.jsonl, the file of loads and trackers. Only the first rank does."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import yaml

from hecate.config import Config, to_yaml
from hecate.errors import UserError
from hecate.io.durable import replace_file
from hecate.model.moe_model import MoeModel
from hecate.parallel.cluster.mesh import Mesh
from hecate.parallel.values.traces import TraceWriter
from hecate.report.events import EvalScore, Evaluation, Rebuilt, Resharding, StepEvent
from hecate.report.metrics import (
    REGROUPED,
    RESUMED,
    SAVED,
    MetricsWriter,
    Record,
    eval_record,
    event_record,
    expert_figures,
    reshard_record,
    step_record,
)
from hecate.report.progress import Progress, StepLine
from hecate.report.summary import EVERY_RANK, NON_EXPERTS, TrainableRow, training_report
from hecate.report.tracking.tracker_threads import Trackers
from hecate.report.tracking.trackers import ADAPTERS, TrackedRun


@dataclass(frozen=True)
class RunFacts:
    """The facts about a run that reports need when it begins, or goes on with other ranks."""

    step: int
    """number of optimizer steps done"""
    is_first: bool
    """whether this rank reports"""
    mesh: Mesh
    trainable: tuple[TrainableRow, ...]
    tokens_per_rank: int
    """largest number of tokens, with padding, that a rank may have in a step"""


class Reports:
    """The reports of one rank. Only the first rank's do anything; which rank is the first may change (`regrouped`)."""

    def __init__(self, config: Config, facts: RunFacts) -> None:
        self._config = config
        self._folder = Path(config.output_dir)
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self._metrics: MetricsWriter | None = None
        self._trace: TraceWriter | None = None
        self._trackers: Trackers | None = None
        self._facts = facts
        self._step = facts.step
        """of the last record"""
        self._evaluated = -1
        """the step after which this process has evaluated last"""
        self._lost = 0
        """how many of the last records the disk has refused"""

    def __enter__(self) -> Reports:
        try:
            self._open(self._facts)
        except BaseException:  # nobody calls __exit__ then, and the terminal's panel is there
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def begin(self) -> None:
        """Write the effective configuration and the table of what trains to the run's folder, and show the table."""
        if self._progress is None:
            return
        try:
            self._progress.note(self._write_description(self._facts))
        except OSError as error:
            raise UserError(f"{self._folder}: the run's configuration cannot be written: {error.strerror or error}") from error
        mesh = self._facts.mesh
        if mesh.num_sharding_groups > 1:
            self._progress.note(
                f"{mesh.num_sharding_groups} sharding groups of {mesh.shard_size} ranks, each with all experts owned like this"
            )
        if self._facts.step:
            self.event(self._facts.step, f"{RESUMED} step {self._facts.step}")
            self._tell_missing_records(self._facts.step)

    def _tell_missing_records(self, step: int) -> None:
        """Say which steps of a run that is resumed have no record, and where damaged records are."""
        if not self._metrics:
            return
        if aside := self._metrics.set_aside:
            self.event(step, f"metrics.jsonl was damaged; its records stay, and all of it is in {aside.name}")
        if missing := self._metrics.steps_without_record(step, self._config.logging_steps):
            some = ", ".join(map(str, missing[:5])) + (f" to {missing[-1]}" if len(missing) > 5 else "")
            self.event(step, f"{len(missing)} of {step // self._config.logging_steps} steps have no record in metrics.jsonl: {some}")

    def note(self, text: str) -> None:
        """Show a line on the terminal."""
        if self._progress:
            self._progress.note(text)

    def event(self, step: int, text: str) -> None:
        """Show a line on the terminal, and record it in metrics.jsonl."""
        if self._progress and self._metrics:
            self._record(event_record(step, text))
            self._progress.note(text)

    def step(self, event: StepEvent) -> None:
        """Record a step, and show it if it is one of every `logging_steps`."""
        result = event.result
        if self._trace:
            self._recording_loads(event.step, partial(self._trace.append, event.step, result.loads))
        if not (self._progress and self._metrics) or event.step % self._config.logging_steps:
            return
        self._record(step_record(event))
        aux_loss, imbalance, static_imbalance = expert_figures(event)
        speed = event.tokens / event.seconds
        rate, seconds, skipped = event.learning_rate, event.seconds, result.why_skipped
        figures = (result.loss, aux_loss, rate, speed, imbalance, static_imbalance, seconds)
        self._progress.step(StepLine(event.step, event.epoch, *figures, skipped))

    def evaluated(self, step: int, found: Evaluation) -> None:
        """Record and show an evaluation."""
        self._evaluated = step
        if self._progress and self._metrics:
            self._record(eval_record(step, found.scores, found.answers))
            self._progress.evaluated(step, found.scores)

    def scores_after(self, step: int) -> dict[str, EvalScore]:
        """By source, what is recorded of the last evaluation after so many steps, by this process or one before it."""
        return self._metrics.scores_after(step) if self._metrics else {}

    def lacks_evaluation(self, step: int) -> bool:
        """Whether nobody has recorded an evaluation after so many steps. Only the first rank knows of those of another process."""
        return self._evaluated != step and not (self._metrics and self._metrics.has_record("eval", step))

    def resharded(self, step: int, done: Resharding) -> None:
        """Record and show a re-sharding."""
        if not (self._progress and self._metrics):
            return
        move, gain = done.move, done.gain
        self._record(reshard_record(step, done))
        self._progress.note(
            f"re-sharded after step {step}: {move.experts} experts moved, {move.num_bytes} bytes, {done.seconds:.3f} s; "
            f"predicted to save {gain.saved:.2g} s a step and to cost {gain.moving:.2g} s"
        )

    def saving(self) -> None:
        """Make durable what was recorded, so that a run that resumes from the checkpoint that follows finds it up to its step."""
        if self._trace:
            self._recording_loads(self._step, self._trace.save)
        if self._metrics:
            try:
                self._metrics.sync()
            except UserError as error:
                self.note(f"{error}; the run goes on")

    def saved(self, step: int, path: Path) -> None:
        """Record and show that a checkpoint is complete."""
        if self._progress and self._metrics:
            self._record(event_record(step, f"{SAVED}{path.name}"))
            self._progress.note(f"saved {path}")

    def regrouped(self, done: Rebuilt, facts: RunFacts, seconds: float) -> None:
        """Record and show that the run goes on with other ranks. This rank may have become the first, or may no longer be the first."""
        if facts.is_first and self._progress is None:
            self._open(facts, going_on=True)
        elif not facts.is_first:
            self._stack.close()
            self._progress = self._metrics = self._trace = self._trackers = None
        if not (self._progress and self._metrics):
            return
        if done.lost:
            self._forget_after(done.step)
            self._trace = self._open_trace(facts)
            self._open_trackers(facts)
        try:
            self._write_description(facts)
        except OSError as error:
            self.note(f"{self._folder}: config.yaml and trainable.json stay as they were: {error.strerror or error}")
        moved = "" if self._config.adapter == "lora" else f", {done.moved} experts moved"
        text = f"{facts.mesh.world_size} {REGROUPED} after step {done.step}{moved}, {seconds:.3f} s"
        self._record(event_record(done.step, text + (", back at the last checkpoint" if done.lost else "")))
        self._progress.note(text + (f"; back at the last checkpoint, because no copy is left of {done.lost}" if done.lost else ""))
        for warning in done.warnings:
            self.event(done.step, warning)
        self._tell_missing_step(self._metrics, done.step)

    def _tell_missing_step(self, metrics: MetricsWriter, step: int) -> None:
        """Say so where the step that was done last should have a record and has none: only one who has taken it as usual writes one."""
        if step == 0 or step % self._config.logging_steps:
            return
        with suppress(UserError):  # what is wrong with the file is told where it matters
            if not metrics.has_record("step", step):
                self.event(step, f"step {step} is done and has no record: a rank was lost before the first one had written it")

    def _open(self, facts: RunFacts, *, going_on: bool = False) -> None:
        """Open the reports where this rank is the first; `going_on`: of a run that a full disk does not end any more."""
        if not facts.is_first:
            return
        self._metrics = self._stack.enter_context(MetricsWriter(self._folder / "metrics.jsonl"))
        if not going_on:
            self._metrics.truncate_after(facts.step)
        self._progress = self._stack.enter_context(Progress(self._config.max_steps, facts.step))
        if going_on:
            self._forget_after(facts.step)
        self._trace = self._open_trace(facts)
        self._open_trackers(facts)

    def _forget_after(self, step: int) -> None:
        """Remove the records of later steps, or note that the disk refuses."""
        assert self._metrics is not None
        try:
            self._metrics.truncate_after(step)
        except UserError as error:
            self.note(f"{error}; records of steps after {step} stay, and the run goes on")

    def _record(self, record: Record) -> None:
        """Write a record to metrics.jsonl, and send it to the trackers. What they do to it, they do later."""
        self._step = record["step"]
        if self._metrics:
            self._write(self._metrics, record)
        if self._trackers:
            self._trackers.record(record)

    def _write(self, metrics: MetricsWriter, record: Record) -> None:
        """Write a record, or note once that the disk refuses; as soon as it does not, an event says how many records are missing."""
        try:
            if self._lost:
                text = f"{self._lost} records before this one are missing, because the disk has refused them"
                metrics.write(event_record(record["step"], text))
                self._lost = 0
                self.note(f"metrics.jsonl is written again; {text}")
            metrics.write(record)
        except UserError as error:
            if not self._lost:
                self.note(f"{error}; the run goes on, and later records are tried")
            self._lost += 1

    def _recording_loads(self, step: int, action: Callable[[], None]) -> None:
        """Record loads; where the disk refuses, the run goes on without them.

        Raises:
            UserError: the folder holds loads of another run.
        """
        try:
            action()
        except UserError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            self._trace = None
            self.event(step, f"{error}; the run goes on and records no more loads")

    def _open_trackers(self, facts: RunFacts) -> None:
        """Begin to report to the trackers, or again: they forget what they have of steps after those that are done."""
        if self._trackers:
            self._trackers.close()
        adapters = {name: ADAPTERS[name] for name in self._config.report_to}
        config = yaml.safe_load(to_yaml(self._config))
        run = TrackedRun(name=self._folder.name, folder=self._folder, config=config, step=facts.step, known_as=None)
        self._trackers = self._stack.enter_context(Trackers(adapters, run, lambda text: self.event(self._step, text)))

    def _open_trace(self, facts: RunFacts) -> TraceWriter | None:
        config = self._config
        if not config.trace:
            return None
        return TraceWriter(
            self._folder / "loads",
            top_k=config.moe.experts_per_token,
            tokens_per_rank=facts.tokens_per_rank,
            model=config.model.name_or_path,
            notes={"data": [source.name for source in config.data.train], "policy": config.fssdp.policy},
            after=facts.step,
        )

    def _write_description(self, facts: RunFacts) -> str:
        """Write the configuration and the table of what trains, and return the table as text."""
        text, report = training_report(facts.trainable)
        replace_file(self._folder / "config.yaml", [to_yaml(self._config).encode()])
        replace_file(self._folder / "trainable.json", [json.dumps(report, indent=1).encode()])
        return text


def trainable_rows(moe: MoeModel) -> list[TrainableRow]:
    """What a model trains, as one row for each group of equal tensors with the same owner."""
    rows = []
    for unit, store in moe.engine.shards.trained.items():
        owner_E, what = moe.engine.shards.owners[unit], "blocks" if unit in moe.engine.shards.pools else "experts"
        trains_E = True if unit in moe.engine.shards.pools else moe.engine.shards.families[unit].trains_E
        for rank in range(moe.engine.shards.world_size):
            count = int(((owner_E == rank) & trains_E).sum())
            if count:
                rows.append(TrainableRow(f"layers.{unit}.{what}", count, store.chunk_numel, store.chunk_bytes, f"rank {rank}"))
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
