"""Drives a job on a Ray cluster from its first worker to its end: tells the automaton what becomes of workers, carries out its orders, and
changes the plan when devices become slower. Who goes on is decided in `hecate.launch.membership`; what travels is in `worker_group` and
`rendezvous`.

Between two generations each rank waits for the next one with its state in memory (a *warm* start), or its training has ended. A worker that
comes later *prepares*: it loads alone, while the others train on. The controller takes no part in a training step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hecate.checkpoint.history import latest_good
from hecate.config import Config
from hecate.errors import UserError
from hecate.launch.membership.automaton import step
from hecate.launch.membership.facts import Cause, Do, Event, Fact, Order
from hecate.launch.membership.job_generation import RankEnd
from hecate.launch.membership.job_members import JobMembers
from hecate.launch.membership.job_policy import JobPolicy, Limits
from hecate.launch.membership.job_states import ENDED, State
from hecate.launch.policy.work_shares import WorkShares
from hecate.launch.ray_job.job_report import JobReport, JobView
from hecate.launch.ray_job.messages import (
    Assignment,
    Begin,
    CheckpointSaved,
    Interrupt,
    Join,
    Leave,
    LeftGeneration,
    Outcome,
    PartBuilt,
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
from hecate.launch.ray_job.status import JobStatus
from hecate.launch.ray_job.worker_group import JobDevice, WorkerGroup, check_versions
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cluster.topology_file import topology_text
from hecate.report.events import DenseWork

_PING_SECONDS = 10.0
"""the silence after which a worker counts as hung"""
_POLL_SECONDS = 0.25
"""the longest wait for an event before the controller looks at its clocks"""
_PAUSE_SECONDS = 5.0
"""the time from one growth of the job to the next"""
_DEATH_SECONDS = 3.0
"""how long an error of a rank may come before the news of the lost rank that caused it"""
_LONGEST_TICK = 2.0
"""the most seconds that count between two looks at `AwakeClock`"""
_LAST_OUTPUT_SECONDS = 1.0
"""Ray forwards what workers print with a delay, and drops the output of workers that are gone."""

_END_OF = {
    Outcome.FINISHED: RankEnd.FINISHED,
    Outcome.STOPPED: RankEnd.STOPPED,
    Outcome.FAILED: RankEnd.FAILED,
    Outcome.USER_ERROR: RankEnd.MISTAKE,
}


def policy_of(config: Config) -> JobPolicy:
    """The rules of a job on Ray."""
    ray, limit = config.ray, float(config.ray.start_timeout)
    limits = Limits(limit, limit, limit, limit, _DEATH_SECONDS, _PAUSE_SECONDS, " (ray.start_timeout)")
    return JobPolicy(config.fssdp.redundancy > 0, True, ray.max_failures, ray.min_workers, ray.min_workers, limits=limits)


class AwakeClock:
    """Counts the seconds in which this process runs.

    While a signal stops this process, or its machine is suspended, it receives no answers, so this time must not count as silence of
    other processes. At most two seconds count between two calls.
    """

    def __init__(self, read: Callable[[], float] = time.monotonic) -> None:
        self._read, self._last, self._seconds = read, read(), 0.0

    def __call__(self) -> float:
        """Seconds since the clock was set up."""
        now = self._read()
        self._seconds += min(now - self._last, _LONGEST_TICK)
        self._last = now
        return self._seconds


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
        self._clock = AwakeClock()
        devices = frozenset(device.index for device in group.devices)
        self._state = JobMembers(
            policy_of(config),
            described=devices if topology else frozenset(),
            names={device.index: device.name for device in group.devices},
            awaited=devices,
        )
        self._built: dict[int, PartBuilt] = {}
        """a device -> its event in this generation"""
        self._shares = WorkShares(topology, sorted(devices), config.deterministic_group)
        self._shown_at = 0.0
        self.shown = self._status()
        """the status that was shown last"""
        self.stop_wanted = False
        """whether a signal has asked that the job save and stop"""

    def run(self) -> int:
        """Drive the job to its end, and return its exit status. All workers are ended, whatever happened.

        Raises:
            UserError: the user has to mend something.
        """
        try:
            self._show_status()
            self._group.reserve(self._config.ray.start_timeout)
            for device in self._group.devices:
                self._group.request_worker(device)
            saved = [Event(Fact.SAVED)] if self._has_checkpoint() else []
            self._step([Event(Fact.PLACED), *saved])
            while self._state.phase not in ENDED:
                facts = [fact for device, event in self._group.poll(_POLL_SECONDS) for fact in self._facts(device, event)]
                self._step([*facts, *self._looks(), *([Event(Fact.STOP)] if self.stop_wanted else [])])
                if self._clock() - self._shown_at > 1:
                    self._show_status()
            self._raise_mistake()
            time.sleep(_LAST_OUTPUT_SECONDS)
            return int(self._state.phase is State.FAILED)
        finally:
            self._show_end()
            self._group.close()

    def _raise_mistake(self) -> None:
        ending = self._state.ending
        if ending is None or not ending.mistake:
            return
        if not ending.never_up:
            raise UserError(ending.text)
        name, seconds = self._state.names[ending.device or 0], self._config.ray.start_timeout
        raise UserError(
            f"{name}: its worker did not start within {seconds} s (ray.start_timeout)\n  `ray list actors` shows what it waits for"
        )

    @property
    def began(self) -> bool:
        """Whether any rank was ordered to build its part of the run."""
        return self._state.generation.exists

    @property
    def _members(self) -> list[JobDevice]:
        """The devices of the generation, by rank."""
        return [self._group.devices[index] for index in self._state.generation.members]

    # What has happened

    def _facts(self, device: JobDevice, event: WorkerEvent) -> list[Event]:
        """What an event of a worker means for who goes on."""
        index, number = device.index, self._state.generation.number
        match event:
            case WorkerUp():
                try:
                    check_versions(self._group.devices)
                except UserError as error:
                    return [Event(Fact.UNFIT, index, str(error))]
                return [Event(Fact.UP, index, device.name)]
            case Prepared():
                return [Event(Fact.LOADED, index)]
            case WorkerLost():
                return [self._loss(device, event)]
            case PartBuilt():
                self._built[index] = event
                return [Event(Fact.BUILT, index)]
            case CheckpointSaved():
                self._report.checkpoint = Path(event.path).name
                self._report.step = max(self._report.step, event.step)
                return [Event(Fact.SAVED)]
            case StepTotals():
                if self._rank_at_work(device) is not None:
                    self._report.step, self._report.totals = event.step, event
                return []
            case StepsDone():
                return self._add_report(device, event)
            case LeftGeneration():
                return [Event(Fact.LEFT, index)] if event.generation == number else []
            case TrainingEnded():
                if event.generation == number:
                    said = event.text if event.outcome is Outcome.USER_ERROR else event.reason
                    return [Event(Fact.ENDED, index, said, end=_END_OF[event.outcome])]
                failed = event.generation < 0 and event.outcome in (Outcome.FAILED, Outcome.USER_ERROR)
                return [Event(Fact.LOST, index, event.reason)] if failed else []  # it could not load what a rank needs

    def _loss(self, device: JobDevice, event: WorkerLost) -> Event:
        if event.cannot_import:
            said = (
                f"{device.name}: hecate cannot be imported there: {event.text}\n"
                "  install it on all nodes, in the Python that runs Ray, in the same version"
            )
            return Event(Fact.UNFIT, device.index, said)
        cause = Cause.PROCESS_DIED if self._group.node_lives(device) else Cause.NODE_DIED
        return Event(Fact.LOST, device.index, event.text, cause=cause)

    def _looks(self) -> list[Event]:
        """The workers whose processes are stopped, which neither Ray nor their connections notice, and one that gives no sign of life."""
        events = [Event(Fact.HALTED, device.index, f"for {seconds:.1f} s, as by SIGSTOP") for device, seconds in self._group.stopped()]
        at_work = [device for device in self._members if device.alive and device.index not in self._state.generation.ends]
        silence = {device.index: self._group.ping(device, self._clock()) for device in at_work}
        silent = next((index for index, seconds in silence.items() if seconds > _PING_SECONDS), None)
        if silent is not None:
            events.append(Event(Fact.LOST, silent, f"for {_PING_SECONDS:.0f} s", cause=Cause.HUNG))
        return events

    def _rank_at_work(self, device: JobDevice) -> int | None:
        """The rank of a device that trains in this generation; None: what it tells of steps is of an earlier one."""
        trains = self._state.phase in (State.RUNNING, State.RESIZING, State.STOPPING)
        return self._state.generation.rank_of(device.index) if trains else None

    def _add_report(self, device: JobDevice, report: StepsDone) -> list[Event]:
        rank = self._rank_at_work(device)
        if rank is None:
            return []
        work = DenseWork(report.dense_tokens, report.dense_seconds)
        changed = self._shares.add_report(rank, report.step, work)
        if changed and self._state.phase is State.RUNNING:
            self._replan(changed)
        return [Event(Fact.STEPPED)]

    def _replan(self, changed: Mapping[int, float]) -> None:
        before, members = self._shares.sequences, self._members
        new = self._shares.share_anew(changed)
        for rank, factor in changed.items():
            word = "straggler" if factor < 1 else "faster than planned"
            self._note(
                f"{word}: {members[rank].name} (rank {rank}) computes at {factor:.2f} of its planned speed; "
                f"sequences {_text(before)} become {_text(new.sequences)}"
            )
        order = Replan(generation=self._state.generation.number, number=new.number, flops=new.flops, sequences=new.sequences, reshard=True)
        self._group.send(members[0], order)

    # What is to be done

    def _step(self, events: Sequence[Event]) -> None:
        before = self._state.phase
        self._state, orders = step(self._state, events, self._clock())
        for order in orders:
            self._carry_out(order)
        if self._state.phase is not before:
            if self._state.phase is State.RUNNING:
                self._generation_begun(self._built[self._state.generation.members[0]])
            self._show_status()

    def _carry_out(self, order: Order) -> None:
        devices = [self._group.devices[index] for index in order.devices]
        generation = self._state.generation.number
        match order.do:
            case Do.SAY:
                self._note(order.text)
            case Do.REQUEST:
                for device in devices:
                    self._group.request_worker(device)
            case Do.END:
                for device in devices:
                    self._group.kill(device)
            case Do.BEGIN | Do.GO_ON:
                self._assign(warm=order.do is Do.GO_ON)
            case Do.PREPARE:
                self._send(devices, Prepare())
            case Do.MAKE_WAY:
                self._send(devices, Leave())
            case Do.BREAK_OFF:
                self._send(devices, Interrupt(generation=generation))
            case Do.STOP:
                self._send(devices, Stop())

    def _send(self, devices: Sequence[JobDevice], order: Prepare | Leave | Interrupt | Stop) -> None:
        for device in devices:
            self._group.send(device, order)

    def _assign(self, *, warm: bool) -> None:
        """Have the members of the new generation begin, or go on."""
        members, generation = self._members, self._state.generation
        self._built = {}
        topology = self._shares.begin_generation(generation.members)
        has_checkpoint = self._has_checkpoint()
        for rank, device in enumerate(members):
            assignment = Assignment(
                generation=generation.number,
                rank=rank,
                world_size=len(members),
                nodes=tuple(member.spec.node_id for member in members),
                topology=None if topology is None else topology_text(topology),
                resume=self._config.resume or has_checkpoint,
            )
            self._group.send(device, Join(assignment=assignment) if warm else Begin(assignment=assignment))

    def _generation_begun(self, of_first: PartBuilt) -> None:
        self._shares.generation_begun(of_first.sequences, of_first.topology)
        self._report.max_steps = of_first.max_steps
        self._report.step = of_first.step  # lower than before if the ranks went back to a checkpoint
        self._group.keep_spares()
        shares = ", ".join(f"{device.name} {count}" for device, count in zip(self._members, self._shares.sequences, strict=True))
        generation = self._state.generation
        self._note(f"generation {generation.number}: {len(generation.members)} ranks from step {of_first.step}; sequences: {shares}")

    def _has_checkpoint(self) -> bool:
        latest = latest_good(Path(self._config.output_dir))
        self._report.checkpoint = latest.name if latest else None
        return latest is not None

    # What people read

    def _note(self, text: str) -> None:
        self._report.note(text)
        self._show_status()

    def _show_end(self) -> None:
        """Show how the job has ended. One that an error of this process ends has failed."""
        if self._state.phase not in ENDED:
            self._state = replace(self._state, phase=State.FAILED)
        ending = self._state.ending
        if ending is not None:
            self._report.detail = next(iter(ending.text.splitlines()), "")
            if not ending.mistake:
                self._report.note(f"the job has failed: {ending.text}")
        self._show_status()

    def _show_status(self) -> None:
        self._shown_at, self.shown = self._clock(), self._status()
        self._show(self.shown)

    def _status(self) -> JobStatus:
        view = JobView(self._state, self._group.devices, self._built, self._shares, self._group.ready_spares())
        return self._report.status(view)


def _text(sequences: Sequence[int]) -> str:
    return ":".join(map(str, sequences))
