"""Drives a job on a Ray cluster from its first worker to its end: begins generations of ranks, answers failures, and changes the plan when
devices become slower.

A *generation* is one set of ranks that train together. Between two generations each of its ranks waits for the next one with its state in
memory (a *warm* start), or its training has ended. A worker that comes later *prepares*: it loads alone, while the others train on. The
controller takes no part in a training step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from hecate.checkpoint.history import latest_good
from hecate.config import Config
from hecate.errors import UserError
from hecate.launch.policy.failures import Cause, Decision, FailurePolicy
from hecate.launch.policy.job_states import ENDED, NEXT, State
from hecate.launch.policy.scaling import Scaling, ScalingPolicy
from hecate.launch.policy.stragglers import DenseWork
from hecate.launch.policy.work_shares import WorkShares
from hecate.launch.ray_job.awake_clock import AwakeClock
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
    StepTotals,
    Stop,
    TrainingEnded,
    WorkerEvent,
    WorkerLost,
    WorkerUp,
)
from hecate.launch.ray_job.rendezvous import Rendezvous
from hecate.launch.ray_job.worker_group import JobDevice, WorkerGroup, check_versions
from hecate.parallel.topology import Topology
from hecate.parallel.topology_file import topology_text

_PING_SECONDS = 10.0
"""after which a worker that does not answer counts as hung"""
_SETTLE_SECONDS = 15.0
"""after which a rank counts as hung that goes on training though the other ranks cannot"""
_POLL_SECONDS = 0.5
"""longest wait for an event before the controller looks at its clocks"""
_PAUSE_SECONDS = 5.0
"""from one growth of the job to the next"""
_DEATH_SECONDS = 3.0
"""how long an error of a rank may come before the news of the lost rank that caused it"""
_LAST_OUTPUT_SECONDS = 1.0
"""Ray forwards what workers print with a delay, and drops the output of workers that are gone."""
_NOTES = 50


class RankEnd(Enum):
    """How a rank's part in the present generation has ended."""

    WAITING = "waiting"
    """it has left the generation, and waits with its state for the next one"""
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    """training raised an error; the worker lives"""
    LOST = "lost"
    """the worker is gone, hung, or was ended"""


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
        rendezvous: Rendezvous,
        topology: Topology | None,
        say: Callable[[str], None],
        show: Callable[[dict[str, Any]], None],
    ) -> None:
        """
        Args:
            topology: of all devices in their order; None: the first ranks measure it.
            say: prints a line for the user.
            show: called with the status whenever it has changed.
        """
        self._group, self._config, self._rendezvous = group, config, rendezvous
        self._say, self._show = say, show
        self._policy = FailurePolicy(config.ray.max_failures, config.ray.min_workers)
        self._scaling = ScalingPolicy(_PAUSE_SECONDS)
        self._state, self._detail, self._notes = State.INITIALIZING, "", list[dict[str, str]]()
        self._clock = AwakeClock()
        self._deadline, self._changed_at, self._grown_at = 0.0, self._clock(), -math.inf
        self._generation = -1
        self._members: list[JobDevice] = []
        """devices of the generation, by rank"""
        self._ends: dict[int, RankEnd] = {}
        """device -> how its part in the generation has ended"""
        self._error_answered = False
        """in this generation"""
        self._prepared: set[int] = set()
        """devices outside the generation whose workers have loaded and wait to join"""
        self._begun: dict[int, Begun] = {}
        """device -> its event in this generation"""
        self._awaited: set[int] = set()
        """devices without which the next generation does not begin"""
        self._failures: list[str] = []
        self._shares = WorkShares(topology, [device.index for device in group.devices])
        self._step = 0
        self._totals: StepTotals | None = None
        """as last reported"""
        self._checkpoint: str | None = None
        self._shown = 0.0
        self.stop_wanted = False
        """set by a signal"""

    def run(self) -> int:
        """The job's exit status. Ends all workers, whatever happened."""
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
                self._advance()
                if self._clock() - self._shown > 1:
                    self._show_status()
            time.sleep(_LAST_OUTPUT_SECONDS)
        except UserError as error:
            self._detail = str(error).splitlines()[0]
            self._enter(State.FAILED)
            raise
        except JobFailed as failed:
            self._detail = str(failed)
            self._enter(State.FAILED)
            self._say(f"the job has failed: {failed}")
            return 1
        finally:
            if self._state not in ENDED:
                self._enter(State.FAILED)
            self._group.close()
        return 0

    @property
    def began(self) -> bool:
        """Whether any rank has begun to build its part of the run."""
        return self._generation >= 0

    def status(self) -> dict[str, Any]:
        """JSON values; see docs/launch.md."""
        return {
            "state": self._state.value,
            "ended": self._state in ENDED,
            "detail": self._detail,
            "generation": max(self._generation, 0),
            "max_steps": self._config.max_steps,
            "step": self._step,
            "loss": self._totals and self._totals.loss,
            "tokens_per_s": self._totals and self._totals.tokens_per_s,
            "imbalance": self._totals and self._totals.imbalance,
            "last_checkpoint": self._checkpoint,
            "devices": [self._status_of(device) for device in self._group.devices],
            "spares": self._group.ready_spares(),
            "topology": None if self._shares.topology is None else topology_text(self._shares.topology),
            "notes": self._notes,
            "updated": time.time(),
        }

    def _status_of(self, device: JobDevice) -> dict[str, Any]:
        rank = self._members.index(device) if device in self._members else None
        begun = self._begun.get(device.index)
        return {
            "device": device.index,
            "rank": rank,
            "state": self._state_of(device),
            "sequences": self._shares.sequences[rank] if rank is not None and self._shares.sequences else None,
            "experts": begun.owned[rank] if begun and rank is not None else None,
            "speed": self._shares.speeds.get(device.index),
            "kind": device.spec.kind,
            "node": f"{device.spec.address} {device.spec.node_id[:8]}",
            "pid": device.up and device.up.pid,
        }

    # Events of workers

    def _handle(self, device: JobDevice, event: WorkerEvent) -> None:
        match event:
            case WorkerUp():
                check_versions(self._group.devices)
                if self._generation >= 0:
                    self._group.send(device, Prepare())
            case Prepared():
                self._prepared.add(device.index)
            case WorkerLost():
                self._lost(device, event.text, cannot_import=event.cannot_import)
            case Begun():
                self._begun[device.index] = event
            case CheckpointSaved():
                self._checkpoint = Path(event.path).name
            case StepsDone():
                self._add_report(device, event)
            case LeftGeneration():
                if event.generation == self._generation:
                    self._ends[device.index] = RankEnd.WAITING
            case TrainingEnded():
                self._training_ended(device, event)

    def _training_ended(self, device: JobDevice, event: TrainingEnded) -> None:
        failed = event.outcome in (Outcome.FAILED, Outcome.USER_ERROR)
        if event.generation == self._generation:
            self._ends[device.index] = _END_OF[event.outcome]
            # Where a rank was lost without any checkpoint, a user's error may be due to that: all ranks begin anew.
            if event.outcome is Outcome.USER_ERROR and (self._generation == 0 or self._has_checkpoint()):
                raise UserError(event.text)
            if event.outcome is Outcome.FAILED:
                self._failures.append(event.reason)
        elif event.generation < 0 and failed:
            self._lost(device, event.reason)  # it could not load what a rank needs

    def _lost(self, device: JobDevice, text: str, *, cannot_import: bool = False) -> None:
        if cannot_import:
            raise UserError(
                f"{device.name}: hecate cannot be imported there: {text}\n"
                "  install it on all nodes, in the Python that runs Ray, in the same version"
            )
        end = self._ends.get(device.index)
        if device in self._members and end is RankEnd.FINISHED:
            return
        if device in self._members and end is not RankEnd.LOST:
            alive = self._group.node_lives(device)
            self._answer(Cause.ACTOR_DIED if alive else Cause.NODE_DIED, device, text)
        else:
            self._answer(Cause.START, device, text)

    def _answer(self, cause: Cause, device: JobDevice | None, text: str) -> None:
        """Decide what follows a failure, and begin to carry it out.

        Args:
            device: whose worker has failed; None: training has failed on all ranks.
        """
        alive = sum(each.alive for each in self._group.devices)
        copied = self._config.fssdp.redundancy > 0 and not self._loss_answered()
        decision, self._policy = self._policy.decide(cause, alive, copied=copied)
        who = "the workers" if device is None else f"{device.name} (rank {self._rank(device)})"
        self._note(f"{who}: {cause.value} ({text[:160]}); {decision.value}")
        if decision is Decision.RAISE:
            raise JobFailed(f"{who}: {cause.value}, {self._policy.counts[cause]} times in a row without a finished step: {text[:200]}")
        if device is not None:
            if device in self._members:
                self._ends[device.index] = RankEnd.LOST
            self._group.kill(device)
            self._prepared.discard(device.index)
            self._group.request_worker(device)  # it starts now, or when a node returns
            if decision is Decision.REPLACE and (device in self._members or self._generation < 0):
                self._awaited.add(device.index)
        if self._generation >= 0 and self._state in (State.STARTING, State.RUNNING, State.RESIZING):
            self._begin_recovery()

    def _loss_answered(self) -> bool:
        """Whether a failure of this generation has been decided on."""
        return self._error_answered or RankEnd.LOST in self._ends.values()

    def _add_report(self, device: JobDevice, report: StepsDone) -> None:
        if device not in self._members or self._state not in (State.RUNNING, State.RESIZING, State.STOPPING):
            return  # of an earlier generation
        self._policy = self._policy.after_progress()
        if report.totals is not None:
            self._step, self._totals = report.step, report.totals
        work = DenseWork(report.dense_tokens, report.dense_seconds)
        changed = self._shares.add_report(self._members.index(device), report.step, work)
        if changed and self._state is State.RUNNING:
            self._replan(changed)

    def _replan(self, changed: Mapping[int, float]) -> None:
        before = self._shares.sequences
        new = self._shares.share_anew(changed)
        for rank, factor in changed.items():
            word = "straggler" if factor < 1 else "faster than planned"
            self._note(
                f"{word}: {self._members[rank].name} (rank {rank}) computes at {factor:.2f} of its planned speed; "
                f"sequences {_text(before)} become {_text(new.sequences)}"
            )
        order = Replan(generation=self._generation, number=new.number, flops=new.flops, sequences=new.sequences, reshard=True)
        self._group.send(self._members[0], order)

    # From state to state

    def _advance(self) -> None:
        if self.stop_wanted and self._state is not State.STOPPING:
            self._stop()
        all_ended = bool(self._members) and all(device.index in self._ends for device in self._members)
        if all_ended and not self._error_answered and set(self._ends.values()) == {RankEnd.FINISHED}:
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
            self._recover(all_ended)
        elif self._state is State.STOPPING:
            if all_ended:
                self._enter(State.STOPPED)
            elif self._clock() > self._deadline:
                raise JobFailed("the workers did not stop in time; the last checkpoint is what is left")

    def _advance_start(self) -> None:
        if self._generation < 0:
            if all(self._group.devices[index].alive for index in self._awaited):
                self._begin_generation()
        elif all(device.index in self._begun for device in self._members):
            self._generation_begun(self._begun[self._members[0].index])
            return
        else:
            self._watch()
        if self._state is not State.STARTING or self._clock() <= self._deadline:
            return
        if self._generation < 0:
            late = next(device for device in self._group.devices if not device.alive)
            raise UserError(
                f"{late.name}: its worker did not start within {self._config.ray.start_timeout} s (ray.start_timeout)\n"
                "  `ray list actors` shows what it waits for"
            )
        late = next(device for device in self._members if device.index not in self._begun)
        self._answer(Cause.HUNG, late, "its part of the run was not built in time (ray.start_timeout)")

    def _generation_begun(self, of_first: Begun) -> None:
        self._shares.generation_begun(of_first.sequences, of_first.topology)
        self._step = of_first.step  # lower than before if the ranks went back to a checkpoint
        self._enter(State.RUNNING)
        self._group.keep_spares()
        shares = ", ".join(f"{device.name} {count}" for device, count in zip(self._members, self._shares.sequences, strict=True))
        self._note(f"generation {self._generation}: {len(self._members)} ranks from step {self._step}; sequences: {shares}")

    def _watch(self) -> None:
        """Find workers that hang, and ranks whose training has ended while that of others goes on."""
        for device in self._members:
            if device.alive and device.index not in self._ends and self._group.ping(device, self._clock()) > _PING_SECONDS:
                self._answer(Cause.HUNG, device, f"for {_PING_SECONDS:.0f} s")
                return
        ends = self._ends.values()
        if RankEnd.FAILED in ends or (self._state is not State.RESIZING and RankEnd.WAITING in ends):
            self._begin_recovery()

    def _begin_recovery(self) -> None:
        self._enter(State.RECOVERING, self._config.ray.start_timeout)
        for device in self._members:
            if device.alive and device.index not in self._ends:
                self._group.send(device, Interrupt(generation=self._generation))

    def _recover(self, all_ended: bool) -> None:
        if not all_ended:
            # A rank notices a lost peer at its next message. One that does not is hung, or the news of its death is on its way.
            if self._clock() - self._changed_at > _SETTLE_SECONDS:
                device = next(each for each in self._members if each.index not in self._ends)
                self._answer(Cause.HUNG, device, f"it went on for {_SETTLE_SECONDS:.0f} s without the others")
            return
        if not self._loss_answered():
            if self._clock() - self._changed_at < _DEATH_SECONDS:
                return
            text = self._failures[0] if self._failures else "a message among the ranks failed"
            self._answer(Cause.ERROR, None, text)
            self._error_answered = True
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

    def _may_grow(self) -> bool:
        since = self._clock() - self._grown_at
        decision = self._scaling.decide(working=len(self._members), ready=len(self._prepared), seconds_since_growth=since)
        return decision is Scaling.GROW and self._topology_describes(self._group.devices)

    def _begin_generation(self) -> None:
        """Begin warm if possible: waiting ranks go on with their state, prepared workers join. Else all begin from the last checkpoint."""
        ready = [device for device in self._group.devices if self._ready(device)]
        waiting = [device for device in self._members if self._ends.get(device.index) is RankEnd.WAITING and device in ready]
        nobody_lost = not self._error_answered and all(end is RankEnd.WAITING for end in self._ends.values())
        state_is_left = nobody_lost or self._config.fssdp.redundancy > 0 or self._has_checkpoint()
        warm = bool(waiting) and self._topology_describes(ready) and state_is_left
        self._generation += 1
        self._members = [device for device in ready if device in waiting or device.index in self._prepared] if warm else ready
        self._ends, self._begun, self._awaited, self._failures, self._error_answered = {}, {}, set(), [], False
        self._prepared -= {device.index for device in self._members}
        topology = self._shares.begin_generation([device.index for device in self._members])
        resume = self._config.resume or self._has_checkpoint()
        for rank, device in enumerate(self._members):
            assignment = Assignment(
                generation=self._generation,
                rank=rank,
                world_size=len(self._members),
                host=self._rendezvous.host,
                port=self._rendezvous.port,
                nodes=tuple(member.spec.node_id for member in self._members),
                topology=None if topology is None else topology_text(topology),
                resume=resume,
            )
            self._group.send(device, Join(assignment=assignment) if warm else Begin(assignment=assignment))
        self._enter(State.STARTING, self._config.ray.start_timeout)

    def _ready(self, device: JobDevice) -> bool:
        """Whether it could be in the next generation."""
        if not device.alive:
            return False
        stays = device in self._members and self._ends.get(device.index, RankEnd.LOST) is not RankEnd.LOST
        return self._generation < 0 or stays or device.index in self._prepared

    def _has_checkpoint(self) -> bool:
        latest = latest_good(Path(self._config.output_dir))
        self._checkpoint = latest.name if latest else None
        return latest is not None

    def _stop(self) -> None:
        if self._state not in (State.STARTING, State.RUNNING, State.RESIZING) or not self._members:
            self._enter(State.STOPPED)  # no rank is in a step that it could end; the last checkpoint is what is left
            return
        self._enter(State.STOPPING, self._config.ray.start_timeout)
        for device in self._members:
            self._group.send(device, Stop())

    # Small things

    def _topology_describes(self, devices: Sequence[JobDevice]) -> bool:
        return self._shares.describes([device.index for device in devices])

    def _rank(self, device: JobDevice) -> int | str:
        return self._members.index(device) if device in self._members else "none yet"

    def _state_of(self, device: JobDevice) -> str:
        if device in self._members and device.alive:
            return "idle" if device.index in self._ends else "training" if device.index in self._begun else "starting"
        return "ready" if device.index in self._prepared else "loading" if device.alive else "coming"

    def _enter(self, state: State, seconds: float = 0.0) -> None:
        """Change the state; `seconds` later its deadline has passed."""
        if state is self._state:
            return
        assert state in (State.FAILED, State.STOPPED) or state in NEXT[self._state], (self._state, state)
        self._state, self._changed_at = state, self._clock()
        self._deadline = self._changed_at + seconds
        self._show_status()

    def _note(self, text: str) -> None:
        self._notes = [*self._notes, {"when": time.strftime("%H:%M:%S"), "text": text}][-_NOTES:]
        self._say(text)
        self._show_status()

    def _show_status(self) -> None:
        self._shown = self._clock()
        self._show(self.status())


def _text(sequences: Sequence[int]) -> str:
    return ":".join(map(str, sequences))
