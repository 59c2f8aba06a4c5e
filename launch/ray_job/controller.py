"""Drives a job on a Ray cluster from its first worker to its end: begins generations of ranks, answers failures, re-plans around slow
devices.

A *generation* is one set of ranks that train together. Between two of them every member is *idle*: it waits for the next one with its state
in memory (warm), or its training has ended. A worker that comes later is *prepared*: it loads alone, while the others train on. Steps are
the ranks' business; nothing here is on their way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hecate.checkpoint.history import latest_good
from hecate.config import Config
from hecate.errors import UserError
from hecate.launch.policy.failures import Cause, Decision, FailurePolicy
from hecate.launch.policy.job_states import ENDED, NEXT, State
from hecate.launch.policy.scaling import Scaling, ScalingPolicy
from hecate.launch.policy.work_shares import Shares
from hecate.launch.ray_job.awake_clock import AwakeClock
from hecate.launch.ray_job.order_store import Rendezvous
from hecate.launch.ray_job.worker_group import Event, Place, WorkerGroup, check_versions
from hecate.parallel.topology import Topology
from hecate.parallel.topology_file import topology_text

_PING_SECONDS, _SETTLE_SECONDS = 10.0, 15.0
"""after which a worker that does not answer, and one that goes on training though its peers could not, is taken for hung"""
_POLL_SECONDS = 0.5
"""without news; news comes at once"""
_PAUSE_SECONDS = 5.0
_DEATH_SECONDS = 3.0
_LAST_WORDS_SECONDS = 1.0
"""Ray hands on what workers print with a delay, and nothing of those that are gone"""
_NOTES = 50


class JobFailed(Exception):
    """The job gives up; the text says why."""


class Controller:
    """One job's. `run` returns when it has ended."""

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
            topology: of all places in their order; None: to be measured.
            say: a line for the user.
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
        self._members: list[Place] = []
        """of the generation, by rank"""
        self._idle: dict[int, str] = {}
        """place -> how its part in the generation has ended"""
        self._prepared: set[int] = set()
        """places beside the members that have loaded and wait to be let in"""
        self._begun: dict[int, Event] = {}
        self._awaited: set[int] = set()
        """places without which the next generation does not begin"""
        self._failures: list[str] = []
        self._shares = Shares(topology, [place.index for place in group.places])
        self._latest: Event = {"step": 0, "loss": None, "tokens_per_s": None, "imbalance": None}
        self._checkpoint: str | None = None
        self._shown = 0.0
        self.stop_wanted = False
        """set by a signal"""

    def run(self) -> int:
        """The job's exit status. Ends all workers, whatever happened."""
        try:
            self._enter(State.PLACING, self._config.ray.start_timeout)
            self._group.place(self._config.ray.start_timeout)
            self._enter(State.STARTING, self._config.ray.start_timeout)
            self._awaited = {place.index for place in self._group.places}
            for place in self._group.places:
                self._group.ask_for(place)
            while self._state not in ENDED:
                for place, event in self._group.poll(_POLL_SECONDS):
                    self._handle(place, event)
                self._advance()
                if self._clock() - self._shown > 1:
                    self._show_status()
            time.sleep(_LAST_WORDS_SECONDS)
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
        """Has any rank begun to build its part of the run?"""
        return self._generation >= 0

    def status(self) -> dict[str, Any]:
        """JSON values; see docs/launch.md."""
        rank_of = {place.index: rank for rank, place in enumerate(self._members)}
        devices = []
        for place in self._group.places:
            rank = rank_of.get(place.index)
            begun = self._begun.get(place.index)
            devices.append(
                {
                    "device": place.index,
                    "rank": rank,
                    "state": self._state_of(place),
                    "rows": self._shares.rows[rank] if rank is not None and self._shares.rows else None,
                    "experts": begun["owned"][rank] if begun and rank is not None else None,
                    "speed": self._shares.speeds.get(place.index),
                    "kind": place.device.kind,
                    "node": f"{place.device.address} {place.device.node_id[:8]}",
                    "pid": place.facts.get("pid"),
                }
            )
        return {
            "state": self._state.value,
            "ended": self._state in ENDED,
            "detail": self._detail,
            "generation": max(self._generation, 0),
            "max_steps": self._config.max_steps,
            **{key: self._latest[key] for key in ("step", "loss", "tokens_per_s", "imbalance")},
            "last_checkpoint": self._checkpoint,
            "devices": devices,
            "spares": self._group.ready_spares(),
            "topology": None if self._shares.topology is None else topology_text(self._shares.topology),
            "notes": self._notes,
            "updated": time.time(),
        }

    # What workers tell

    def _handle(self, place: Place, event: Event) -> None:
        kind = event["kind"]
        if kind == "up":
            check_versions(self._group.places)
            if self._generation >= 0:
                self._group.tell(place, "prepare")
        elif kind == "prepared":
            self._prepared.add(place.index)
        elif kind == "down":
            self._lost(place, event["text"])
        elif kind == "begins":
            self._begun[place.index] = event
        elif kind == "saved":
            self._checkpoint = Path(event["path"]).name
        elif kind == "report":
            self._report(place, event)
        elif event["generation"] == self._generation:
            self._idle[place.index] = kind
            if kind == "mistake":
                if self._generation == 0 or self._has_checkpoint():
                    raise UserError(event["text"])
                self._idle[place.index] = "failed"  # what was lost is in no checkpoint: all begin anew
            if kind == "failed":
                self._failures.append(event["text"].strip().splitlines()[-1])
        elif event["generation"] < 0 and kind in ("failed", "mistake") and "was not needed" not in event["text"]:
            self._lost(place, event["text"].strip().splitlines()[-1])  # it could not even load

    def _lost(self, place: Place, text: str) -> None:
        if text.startswith(("ModuleNotFoundError:", "ImportError:")):
            raise UserError(
                f"{place.name}: hecate cannot be imported there: {text}\n"
                "  install it on all nodes, in the Python that runs Ray, in the same version"
            )
        if place in self._members and self._idle.get(place.index) == "finished":
            return
        if place in self._members and self._idle.get(place.index) != "lost":
            alive = self._group.node_lives(place)
            self._answer(Cause.ACTOR_DIED if alive else Cause.NODE_DIED, place, text)
        else:
            self._answer(Cause.START, place, text)

    def _answer(self, cause: Cause, place: Place | None, text: str) -> None:
        """Decide on a failure, and begin to carry it out."""
        left = sum(p.alive for p in self._group.places)
        copied = self._config.fssdp.redundancy > 0 and "lost" not in self._idle.values()
        decision, self._policy = self._policy.decide(cause, left, copied=copied)
        who = "the workers" if place is None else f"{place.name} (rank {self._rank(place)})"
        self._note(f"{who}: {cause.value} ({text[:160]}); {decision.value}")
        if decision is Decision.RAISE:
            raise JobFailed(f"{who}: {cause.value}, {self._policy.counts[cause]} times in a row without a finished step: {text[:200]}")
        if place is not None:
            if place in self._members:
                self._idle[place.index] = "lost"
            self._group.kill(place)
            self._prepared.discard(place.index)
            self._group.ask_for(place)  # comes up now, or when a node returns
            if decision is Decision.REPLACE and (place in self._members or self._generation < 0):
                self._awaited.add(place.index)
        if self._generation >= 0 and self._state in (State.STARTING, State.RUNNING, State.RESIZING):
            self._begin_recovery()

    def _report(self, place: Place, event: Event) -> None:
        if place not in self._members or self._state not in (State.RUNNING, State.RESIZING, State.STOPPING):
            return  # of a generation that is over
        self._policy = self._policy.after_progress()
        if "loss" in event:
            self._latest = event
        changed = self._shares.hear(self._members.index(place), event)
        if changed and self._state is State.RUNNING:
            self._replan(changed)

    def _replan(self, changed: dict[int, float]) -> None:
        before = self._shares.rows
        order = self._shares.deal_anew(changed)
        for rank, factor in changed.items():
            word = "straggler" if factor < 1 else "faster than planned"
            self._note(
                f"{word}: {self._members[rank].name} (rank {rank}) computes at {factor:.2f} of its planned speed; "
                f"rows {_text(before)} become {_text(self._shares.rows)}"
            )
        self._group.tell(self._members[0], "order", self._generation, order)

    # From state to state

    def _advance(self) -> None:
        if self.stop_wanted and self._state is not State.STOPPING:
            self._stop()
        idle = bool(self._members) and all(place.index in self._idle for place in self._members)
        if idle and set(self._idle.values()) == {"finished"}:
            self._enter(State.FINISHED)
        elif self._state is State.STARTING:
            self._advance_start()
        elif self._state in (State.RUNNING, State.RESIZING):
            self._watch()
            if self._state is State.RESIZING and idle:
                self._begin_generation()
            elif self._state is State.RUNNING and self._may_grow():
                self._grown_at = self._clock()
                self._note("a device has returned and joins")
                for place in self._members:
                    self._group.tell(place, "regroup")
                self._enter(State.RESIZING)
        elif self._state in (State.RECOVERING, State.WAITING):
            self._recover(idle)
        elif self._state is State.STOPPING:
            if idle:
                self._enter(State.STOPPED)
            elif self._clock() > self._deadline:
                raise JobFailed("the workers did not stop in time; the last checkpoint is what is left")

    def _advance_start(self) -> None:
        if self._generation < 0:
            if all(self._group.places[index].alive for index in self._awaited):
                self._begin_generation()
        elif all(place.index in self._begun for place in self._members):
            of_first = self._begun[self._members[0].index]
            self._shares.begun(of_first["rows"], of_first["topology"])
            self._latest = {**self._latest, "step": of_first["step"]}  # it may have gone back
            self._enter(State.RUNNING)
            self._group.keep_spares()
            shares = ", ".join(f"{p.name} {rows}" for p, rows in zip(self._members, self._shares.rows, strict=True))
            self._note(f"generation {self._generation}: {len(self._members)} ranks from step {self._latest['step']}; rows: {shares}")
            return
        else:
            self._watch()
        if self._state is State.STARTING and self._clock() > self._deadline:
            late = [p for p in self._members or self._group.places if p.index not in self._begun and not (self._generation < 0 and p.alive)]
            if self._generation < 0:
                raise UserError(
                    f"{late[0].name}: its worker did not come up within {self._config.ray.start_timeout} s (ray.start_timeout)\n"
                    "  `ray list actors` tells what it waits for"
                )
            self._answer(Cause.HUNG, late[0], "its part of the run was not built in time (ray.start_timeout)")

    def _watch(self) -> None:
        """Workers that hang, or whose training has ended while that of others goes on."""
        for place in self._members:
            if place.alive and place.index not in self._idle and self._group.ping(place, self._clock()) > _PING_SECONDS:
                self._answer(Cause.HUNG, place, f"for {_PING_SECONDS:.0f} s")
                return
        if "failed" in self._idle.values() or (self._state is not State.RESIZING and "regrouping" in self._idle.values()):
            self._begin_recovery()

    def _begin_recovery(self) -> None:
        self._enter(State.RECOVERING, self._config.ray.start_timeout)
        for place in self._members:
            if place.alive and place.index not in self._idle:
                self._group.tell(place, "interrupt", self._generation)

    def _recover(self, idle: bool) -> None:
        if not idle:
            # They notice a lost peer at their next message; one that does not is hung, or about to be reported dead.
            if self._clock() - self._changed_at > _SETTLE_SECONDS:
                place = next(p for p in self._members if p.index not in self._idle)
                self._answer(Cause.HUNG, place, f"it went on for {_SETTLE_SECONDS:.0f} s without the others")
            return
        if "lost" not in self._idle.values():
            if self._clock() - self._changed_at < _DEATH_SECONDS:
                return  # an error that a death has caused comes before the news of it
            text = self._failures[0] if self._failures else "a message among the ranks failed"
            self._answer(Cause.ERROR, None, text)
            self._idle[-1] = "lost"  # answered
        ready = sum(self._ready(place) for place in self._group.places)
        here = all(self._ready(self._group.places[index]) for index in self._awaited)
        late = self._clock() > self._deadline
        if ready >= self._config.ray.min_workers and (here or late):
            self._begin_generation()
        elif late:
            needed = self._config.ray.min_workers
            raise JobFailed(f"{ready} devices are left, {needed} are needed, and none returned in time (ray.start_timeout)")
        elif ready < self._config.ray.min_workers and self._state is not State.WAITING and not self._awaited:
            self._enter(State.WAITING, self._config.ray.start_timeout)

    def _may_grow(self) -> bool:
        since = self._clock() - self._grown_at
        decision = self._scaling.decide(working=len(self._members), ready=len(self._prepared), seconds_since_growth=since)
        return decision is Scaling.GROW and self._knows(self._group.places)

    def _begin_generation(self) -> None:
        """Warm where it can be: who waits with its state goes on, who was prepared is let in. Else all begin from the last checkpoint."""
        ready = [place for place in self._group.places if self._ready(place)]
        standing = [place for place in self._members if self._idle.get(place.index) == "regrouping" and place in ready]
        complete = all(ended == "regrouping" for ended in self._idle.values())
        warm = bool(standing) and self._knows(ready) and (complete or self._config.fssdp.redundancy > 0 or self._has_checkpoint())
        self._generation += 1
        self._members = [p for p in ready if p in standing or p.index in self._prepared] if warm else ready
        self._idle, self._begun, self._awaited, self._failures = {}, {}, set(), []
        self._prepared -= {place.index for place in self._members}
        topology = self._shares.begin([place.index for place in self._members])
        assignment = {
            "generation": self._generation,
            "world_size": len(self._members),
            "host": self._rendezvous.host,
            "port": self._rendezvous.port,
            "nodes": [member.device.node_id for member in self._members],
            "topology": None if topology is None else topology_text(topology),
            "resume": self._config.resume or self._has_checkpoint(),
        }
        for rank, place in enumerate(self._members):
            self._group.tell(place, "join" if warm else "begin", {**assignment, "rank": rank})
        self._enter(State.STARTING, self._config.ray.start_timeout)

    def _ready(self, place: Place) -> bool:
        """Could it be in the next generation?"""
        if not place.alive:
            return False
        stays = place in self._members and self._idle.get(place.index, "lost") != "lost"
        return self._generation < 0 or stays or place.index in self._prepared

    def _has_checkpoint(self) -> bool:
        latest = latest_good(Path(self._config.output_dir))
        self._checkpoint = latest.name if latest else None
        return latest is not None

    def _stop(self) -> None:
        if self._state not in (State.STARTING, State.RUNNING, State.RESIZING) or not self._members:
            self._enter(State.STOPPED)  # nobody is in a step that he could end; the last checkpoint is what is left
            return
        self._enter(State.STOPPING, self._config.ray.start_timeout)
        for place in self._members:
            self._group.tell(place, "stop")

    # Small things

    def _knows(self, places: Sequence[Place]) -> bool:
        return self._shares.knows([place.index for place in places])

    def _rank(self, place: Place) -> int | str:
        return self._members.index(place) if place in self._members else "none yet"

    def _state_of(self, place: Place) -> str:
        if place in self._members and place.alive:
            return "idle" if place.index in self._idle else "training" if place.index in self._begun else "starting"
        return "ready" if place.index in self._prepared else "loading" if place.alive else "coming"

    def _enter(self, state: State, seconds: float = 0.0) -> None:
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


def _text(rows: list[int]) -> str:
    return ":".join(map(str, rows))
