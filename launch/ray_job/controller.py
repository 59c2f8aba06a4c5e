"""Drives a job on a Ray cluster from its first worker to its end: begins generations of ranks, answers failures, and changes the plan when
devices become slower. What to do is decided in `hecate.launch.policy`, without Ray; what travels is in `worker_group` and `rendezvous`.

A *generation* is one set of ranks that train together. Between two generations each of its ranks waits for the next one with its state in
memory (a *warm* start), or its training has ended. A worker that comes later *prepares*: it loads alone, while the others train on. The
controller takes no part in a training step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hecate.checkpoint.history import latest_good
from hecate.config import Config
from hecate.errors import UserError
from hecate.launch.policy.failures import Cause, Decision, FailurePolicy
from hecate.launch.policy.job_generation import JobGeneration, RankEnd
from hecate.launch.policy.job_states import ENDED, NEXT, State
from hecate.launch.policy.scaling import Scaling, ScalingPolicy
from hecate.launch.policy.work_shares import WorkShares
from hecate.launch.ray_job.awake_clock import AwakeClock
from hecate.launch.ray_job.job_report import JobReport, JobView
from hecate.launch.ray_job.messages import (
    Assignment,
    Begin,
    Begun,
    CheckpointSaved,
    Interrupt,
    Join,
    Leave,
    LeftGeneration,
    Outcome,
    Prepare,
    Prepared,
    Replan,
    StepsDone,
    Stop,
    TrainingEnded,
    WorkerEvent,
    WorkerLost,
    WorkerUp,
)
from hecate.launch.ray_job.status import JobStatus
from hecate.launch.ray_job.worker_group import JobDevice, WorkerGroup, check_versions
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cluster.topology_file import topology_text
from hecate.report.events import DenseWork

_PING_SECONDS = 10.0
"""after which a worker that does not answer counts as hung"""
_POLL_SECONDS = 0.25
"""longest wait for an event before the controller looks at its clocks"""
_PAUSE_SECONDS = 5.0
"""from one growth of the job to the next"""
_DEATH_SECONDS = 3.0
"""how long an error of a rank may come before the news of the lost rank that caused it"""
_LAST_OUTPUT_SECONDS = 1.0
"""Ray forwards what workers print with a delay, and drops the output of workers that are gone."""
_SILENT = f"for {_PING_SECONDS:.0f} s"

_END_OF = {
    Outcome.FINISHED: RankEnd.FINISHED,
    Outcome.STOPPED: RankEnd.STOPPED,
    Outcome.FAILED: RankEnd.FAILED,
    Outcome.USER_ERROR: RankEnd.FAILED,
}


class JobFailed(Exception):
    """The job ends without success; the text says why."""


class Controller:
    """The controller of one job. `run` returns when the job has ended."""

    def __init__(
        self,
        group: WorkerGroup,
        config: Config,
        topology: Topology | None,
        say: Callable[[str], None],
        show: Callable[[JobStatus], None],
    ) -> None:
        """
        Args:
            topology: of all devices in their order; None: the first ranks measure it.
            say: prints a line for the user.
            show: called with the status whenever it has changed.
        """
        self._group, self._config = group, config
        self._show, self._report = show, JobReport(config.max_steps, say)
        self._policy = FailurePolicy(config.ray.max_failures, config.ray.min_workers)
        self._scaling = ScalingPolicy(_PAUSE_SECONDS)
        self._state = State.INITIALIZING
        self._clock = AwakeClock()
        self._deadline, self._changed_at, self._grown_at = 0.0, self._clock(), -math.inf
        self._generation = JobGeneration()
        self._begun: dict[int, Begun] = {}
        """device -> its event in this generation"""
        self._prepared: set[int] = set()
        """devices outside the generation whose workers have loaded and wait to join"""
        self._awaited: set[int] = set()
        """devices without which the next generation does not begin"""
        self._causes: set[Cause] = set()
        """why ranks of this generation were lost"""
        self._interrupted: int | None = None
        """the generation whose ranks were told last to break off"""
        self._shares = WorkShares(topology, [device.index for device in group.devices], config.deterministic_group)
        self._shown_at = 0.0
        self.shown = self._status()
        """the status that was shown last"""
        self.stop_wanted = False
        """set by a signal"""

    def run(self) -> int:
        """Drive the job to its end, and return its exit status. All workers are ended, whatever happened."""
        try:
            self._enter(State.PLACING, self._config.ray.start_timeout)
            self._group.reserve(self._config.ray.start_timeout)
            self._enter(State.STARTING, self._config.ray.start_timeout)
            self._awaited = {device.index for device in self._group.devices}
            for device in self._group.devices:
                self._group.request_worker(device)
            while self._state not in ENDED:
                for device, event in self._group.poll(_POLL_SECONDS):
                    self._handle(device, event)
                self._end_stopped()
                self._advance()
                if self._clock() - self._shown_at > 1:
                    self._show_status()
            time.sleep(_LAST_OUTPUT_SECONDS)
        except UserError as error:
            self._report.detail = str(error).splitlines()[0]
            self._enter(State.FAILED)
            raise
        except JobFailed as failed:
            self._report.detail = str(failed)
            self._enter(State.FAILED)
            self._report.note(f"the job has failed: {failed}")
            return 1
        finally:
            if self._state not in ENDED:
                self._enter(State.FAILED)
            self._group.close()
        return 0

    @property
    def began(self) -> bool:
        """Whether any rank has begun to build its part of the run."""
        return self._generation.has_begun

    @property
    def _members(self) -> list[JobDevice]:
        """The devices of the generation, by rank."""
        return [self._group.devices[index] for index in self._generation.members]

    # Events of workers

    def _handle(self, device: JobDevice, event: WorkerEvent) -> None:
        match event:
            case WorkerUp():
                try:
                    check_versions(self._group.devices)
                except UserError as error:
                    self._leave_out(device, error)
                    return
                if self._generation.has_begun:
                    self._group.send(device, Prepare())
            case Prepared():
                self._prepared.add(device.index)
                if device.index in self._generation.at_work:  # it was let in, and could not connect
                    self._generation = self._generation.with_end(device.index, RankEnd.FAILED)
            case WorkerLost():
                self._lost(device, event.text, cannot_import=event.cannot_import)
            case Begun():
                self._begun[device.index] = event
            case CheckpointSaved():
                self._report.checkpoint = Path(event.path).name
            case StepsDone():
                self._add_report(device, event)
            case LeftGeneration():
                if event.generation == self._generation.number:
                    self._generation = self._generation.with_end(device.index, RankEnd.WAITING)
            case TrainingEnded():
                self._training_ended(device, event)

    def _training_ended(self, device: JobDevice, event: TrainingEnded) -> None:
        failed = event.outcome in (Outcome.FAILED, Outcome.USER_ERROR)
        if event.generation == self._generation.number:
            error = event.reason if event.outcome is Outcome.FAILED else None
            self._generation = self._generation.with_end(device.index, _END_OF[event.outcome], error)
            # Where a rank was lost without any checkpoint, a user's error may be due to that: all ranks begin anew.
            if event.outcome is Outcome.USER_ERROR and (self._generation.number == 0 or self._has_checkpoint()):
                raise UserError(event.text)
        elif event.generation < 0 and failed:
            self._lost(device, event.reason)  # it could not load what a rank needs

    def _lost(self, device: JobDevice, text: str, *, cannot_import: bool = False) -> None:
        if cannot_import:
            self._leave_out(
                device,
                UserError(
                    f"{device.name}: hecate cannot be imported there: {text}\n"
                    "  install it on all nodes, in the Python that runs Ray, in the same version"
                ),
            )
            return
        is_member, end = device.index in self._generation.members, self._generation.ends.get(device.index)
        if is_member and end in (RankEnd.FINISHED, RankEnd.STOPPED):
            return
        if is_member and end is not RankEnd.LOST:
            alive = self._group.node_lives(device)
            self._answer(Cause.ACTOR_DIED if alive else Cause.NODE_DIED, device, text)
        else:
            self._answer(Cause.START, device, text)

    def _answer(self, cause: Cause, device: JobDevice | None, text: str) -> None:
        """Decide what follows a failure, and begin to carry it out.

        Args:
            device: whose worker has failed; None: training has failed on all ranks.
        """
        who = "the workers" if device is None else f"{device.name} (rank {self._rank_text(device)})"
        is_member = device is not None and device.index in self._generation.members
        loses_rank = device is not None and is_member and self._generation.ends.get(device.index) is not RankEnd.LOST
        if self._state is State.STOPPING:
            self._note(f"{who}: {cause.value} ({text[:160]}); the job stops without it")
            self._give_up(device)
            if loses_rank:
                self._interrupt()
            return
        alive = sum(each.alive for each in self._group.devices)
        # Before the topology is known no rank has trained anything, and one that was measured without the lost device could not grow again.
        measured = self._shares.topology is not None
        copied = self._config.fssdp.redundancy > 0 and measured and not self._generation.loss_answered
        counted = not loses_rank or cause not in self._causes  # the ranks of a lost node are one failure
        decision, self._policy = self._policy.decide(cause, alive, copied=copied, counted=counted)
        self._note(f"{who}: {cause.value} ({text[:160]}); {decision.value}")
        if decision is Decision.RAISE and device is not None and not loses_rank and self._others_train:
            self._note(f"{device.name} is left out, because it cannot start; the others go on")
            self._give_up(device)
            return
        if decision is Decision.RAISE:
            raise JobFailed(f"{who}: {cause.value}, {self._policy.counts[cause]} times in a row without a finished step: {text[:200]}")
        if device is not None:
            self._give_up(device)
            self._group.request_worker(device)  # it starts now, or when a node returns
            if decision is Decision.REPLACE and (is_member or not self._generation.has_begun):
                self._awaited.add(device.index)
        if loses_rank:
            self._causes.add(cause)
            if self._state in (State.STARTING, State.RUNNING, State.RESIZING):
                self._begin_recovery()

    @property
    def _others_train(self) -> bool:
        """Whether ranks train, whom a worker that is not among them yet need not end."""
        return self._state in (State.RUNNING, State.RESIZING)

    def _leave_out(self, device: JobDevice, error: UserError) -> None:
        """Go on without a device where others train; raises the error otherwise."""
        if not self._others_train or device.index in self._generation.at_work:
            raise error
        self._note(f"{device.name} is left out: {error}")
        self._give_up(device)

    def _give_up(self, device: JobDevice | None) -> None:
        """End the worker of a device, whose part in the generation counts as lost."""
        if device is None:
            return
        if device.index in self._generation.members:
            self._generation = self._generation.with_end(device.index, RankEnd.LOST)
        self._group.kill(device)
        self._prepared.discard(device.index)

    def _add_report(self, device: JobDevice, report: StepsDone) -> None:
        rank = self._generation.rank_of(device.index)
        if rank is None or self._state not in (State.RUNNING, State.RESIZING, State.STOPPING):
            return  # of an earlier generation
        self._policy = self._policy.after_progress()
        if report.totals is not None:
            self._report.step, self._report.totals = report.step, report.totals
        work = DenseWork(report.dense_tokens, report.dense_seconds)
        changed = self._shares.add_report(rank, report.step, work)
        if changed and self._state is State.RUNNING:
            self._replan(changed)

    def _replan(self, changed: Mapping[int, float]) -> None:
        before, members = self._shares.sequences, self._members
        new = self._shares.share_anew(changed)
        for rank, factor in changed.items():
            word = "straggler" if factor < 1 else "faster than planned"
            self._note(
                f"{word}: {members[rank].name} (rank {rank}) computes at {factor:.2f} of its planned speed; "
                f"sequences {_text(before)} become {_text(new.sequences)}"
            )
        order = Replan(generation=self._generation.number, number=new.number, flops=new.flops, sequences=new.sequences, reshard=True)
        self._group.send(members[0], order)

    # From state to state

    def _advance(self) -> None:
        if self.stop_wanted and self._state is not State.STOPPING:
            self._stop()
        all_ended = self._generation.all_ended
        if self._generation.all_finished:
            self._enter(State.FINISHED)
        elif self._state is State.STARTING:
            self._advance_start()
        elif self._state in (State.RUNNING, State.RESIZING):
            self._watch()
            if self._state is State.RESIZING and all_ended:
                self._begin_generation()
            elif self._state is State.RUNNING and self._may_grow():
                self._grown_at = self._clock()
                self._note("a device has returned and joins")
                for device in self._members:
                    self._group.send(device, Leave())
                self._enter(State.RESIZING)
        elif self._state in (State.RECOVERING, State.WAITING):
            self._recover()
        elif self._state is State.STOPPING:
            self._advance_stop()

    def _advance_start(self) -> None:
        if not self._generation.has_begun:
            if all(self._group.devices[index].alive for index in self._awaited):
                self._begin_generation()
        elif all(device in self._begun for device in self._generation.members):
            self._generation_begun(self._begun[self._generation.members[0]])
            return
        else:
            self._watch()
        if self._state is not State.STARTING or self._clock() <= self._deadline:
            return
        if not self._generation.has_begun:
            late = next(device for device in self._group.devices if not device.alive)
            raise UserError(
                f"{late.name}: its worker did not start within {self._config.ray.start_timeout} s (ray.start_timeout)\n"
                "  `ray list actors` shows what it waits for"
            )
        late = next(device for device in self._members if device.index not in self._begun)
        self._answer(Cause.HUNG, late, "its part of the run was not built in time (ray.start_timeout)")

    def _advance_stop(self) -> None:
        """Wait until all ranks have saved and ended. Steps and saves may take long; once a rank is lost, nothing more is saved."""
        if not self._generation.all_ended:
            self._watch()
            if self._clock() > self._deadline:
                raise JobFailed("the workers did not stop in time; the last checkpoint is what is left")
            return
        if not set(self._generation.ends.values()) <= {RankEnd.FINISHED, RankEnd.STOPPED}:
            left = "the last checkpoint is what is left" if self._has_checkpoint() else "there is no checkpoint"
            self._note(f"the ranks could not save together; {left}")
        self._enter(State.STOPPED)

    def _generation_begun(self, of_first: Begun) -> None:
        self._shares.generation_begun(of_first.sequences, of_first.topology)
        self._report.max_steps = of_first.max_steps
        self._report.step = of_first.step  # lower than before if the ranks went back to a checkpoint
        self._enter(State.RUNNING)
        self._group.keep_spares()
        shares = ", ".join(f"{device.name} {count}" for device, count in zip(self._members, self._shares.sequences, strict=True))
        generation = self._generation
        self._note(f"generation {generation.number}: {len(generation.members)} ranks from step {of_first.step}; sequences: {shares}")

    def _end_stopped(self) -> None:
        """End the workers whose processes were stopped. Nothing else would, since neither Ray nor their connections notice it."""
        for device, seconds in self._group.stopped():
            if self._generation.ends.get(device.index) is not RankEnd.FINISHED:
                self._answer(Cause.STOPPED, device, f"for {seconds:.1f} s, as by SIGSTOP")

    def _watch(self) -> None:
        """Find workers that hang, and ranks whose training has ended while that of others goes on."""
        silent = self._silent()
        if silent is not None:
            self._answer(Cause.HUNG, silent, _SILENT)
            return
        ends = self._generation.ends.values()
        if RankEnd.FAILED in ends or (self._state is not State.RESIZING and RankEnd.WAITING in ends):
            if self._state is State.STOPPING:
                self._interrupt()
            else:
                self._begin_recovery()

    def _silent(self) -> JobDevice | None:
        """Send pings to all workers at work, and return one that has not answered for a while, if there is any."""
        seconds = {device.index: self._group.ping(device, self._clock()) for device in self._at_work()}
        return next((self._group.devices[index] for index, silence in seconds.items() if silence > _PING_SECONDS), None)

    def _begin_recovery(self) -> None:
        self._enter(State.RECOVERING, self._config.ray.start_timeout)
        self._interrupt()

    def _interrupt(self) -> None:
        """Have the ranks at work break off, once in a generation."""
        if self._interrupted == self._generation.number:
            return
        self._interrupted = self._generation.number
        self._deadline = self._clock() + self._config.ray.start_timeout
        for device in self._at_work():
            self._group.send(device, Interrupt(generation=self._generation.number))

    def _recover(self) -> None:
        if not self._generation.all_ended:
            self._end_hung()
            return
        if not self._generation.loss_answered:
            if self._clock() - self._changed_at < _DEATH_SECONDS:
                return
            errors = self._generation.errors
            self._answer(Cause.ERROR, None, errors[0] if errors else "a message among the ranks failed")
            self._generation = replace(self._generation, error_answered=True)
        ready = sum(self._ready(device) for device in self._group.devices)
        complete = all(self._ready(self._group.devices[index]) for index in self._awaited)
        late = self._clock() > self._deadline
        needed = self._config.ray.min_workers
        if ready >= needed and (complete or late):
            self._begin_generation()
        elif late:
            raise JobFailed(f"{ready} devices are left, {needed} are needed, and none returned in time (ray.start_timeout)")
        elif ready < needed and self._state is not State.WAITING and not self._awaited:
            self._enter(State.WAITING, self._config.ray.start_timeout)

    def _end_hung(self) -> None:
        """End a rank that gives no sign of life, or has not ended its part in time. One that loads or saves notices a loss late."""
        late = self._clock() > self._deadline
        silent = self._silent()
        if silent is not None:
            self._answer(Cause.HUNG, silent, _SILENT)
        elif late:
            seconds = self._config.ray.start_timeout
            device = self._group.devices[self._generation.at_work[0]]
            self._answer(Cause.HUNG, device, f"it went on for {seconds} s without the others (ray.start_timeout)")
        if silent is not None or late:  # the others may have waited for it, and a new worker has to load
            self._deadline = self._clock() + self._config.ray.start_timeout

    def _may_grow(self) -> bool:
        since = self._clock() - self._grown_at
        decision = self._scaling.decide(working=len(self._generation.members), ready=len(self._prepared), seconds_since_growth=since)
        return decision is Scaling.GROW and self._topology_describes(self._group.devices)

    def _begin_generation(self) -> None:
        """Have all devices that can go on begin the next generation."""
        ready = [device for device in self._group.devices if self._ready(device)]
        has_checkpoint = self._has_checkpoint()
        self._generation, warm = self._generation.following(
            [device.index for device in ready],
            self._prepared,
            described=self._topology_describes(ready),
            recoverable=self._config.fssdp.redundancy > 0 or has_checkpoint,
            fewest=self._config.ray.min_workers,
        )
        members = self._members
        self._begun, self._awaited, self._causes = {}, set(), set()
        self._prepared -= set(self._generation.members)
        topology = self._shares.begin_generation(self._generation.members)
        for rank, device in enumerate(members):
            assignment = Assignment(
                generation=self._generation.number,
                rank=rank,
                world_size=len(members),
                nodes=tuple(member.spec.node_id for member in members),
                topology=None if topology is None else topology_text(topology),
                resume=self._config.resume or has_checkpoint,
            )
            self._group.send(device, Join(assignment=assignment) if warm else Begin(assignment=assignment))
        for device in ready:
            if device not in members:  # its training has raised an error: it loads anew, and joins a later generation
                self._group.send(device, Prepare())
        self._enter(State.STARTING, self._config.ray.start_timeout)

    def _ready(self, device: JobDevice) -> bool:
        """Whether the device could be in the next generation."""
        return device.alive and self._generation.may_go_on(device.index, self._prepared)

    def _has_checkpoint(self) -> bool:
        latest = latest_good(Path(self._config.output_dir))
        self._report.checkpoint = latest.name if latest else None
        return latest is not None

    def _stop(self) -> None:
        if self._state not in (State.STARTING, State.RUNNING, State.RESIZING) or not self._generation.has_begun:
            self._enter(State.STOPPED)  # no rank is in a step that it could end; the last checkpoint is what is left
            return
        self._enter(State.STOPPING, math.inf)
        for device in self._members:
            self._group.send(device, Stop())

    # Small things

    def _topology_describes(self, devices: Sequence[JobDevice]) -> bool:
        return self._shares.describes([device.index for device in devices])

    def _at_work(self) -> list[JobDevice]:
        """The devices whose workers live and whose part in the generation has not ended."""
        return [device for index in self._generation.at_work if (device := self._group.devices[index]).alive]

    def _rank_text(self, device: JobDevice) -> str:
        rank = self._generation.rank_of(device.index)
        return "none yet" if rank is None else str(rank)

    def _enter(self, state: State, seconds: float = 0.0) -> None:
        """Change the state; `seconds` later its deadline has passed."""
        if state is self._state:
            return
        assert state in (State.FAILED, State.STOPPED) or state in NEXT[self._state], (self._state, state)
        self._state, self._changed_at = state, self._clock()
        self._deadline = self._changed_at + seconds
        self._show_status()

    def _note(self, text: str) -> None:
        self._report.note(text)
        self._show_status()

    def _show_status(self) -> None:
        self._shown_at, self.shown = self._clock(), self._status()
        self._show(self.shown)

    def _status(self) -> JobStatus:
        view = JobView(
            state=self._state,
            generation=self._generation,
            devices=self._group.devices,
            begun=self._begun,
            prepared=self._prepared,
            shares=self._shares,
            spares=self._group.ready_spares(),
        )
        return self._report.status(view)


def _text(sequences: Sequence[int]) -> str:
    return ":".join(map(str, sequences))
