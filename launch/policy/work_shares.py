"""What each device of a job gets of a step's rows, by the speed it was planned with and the speed it shows.

Devices are known by the number of their place, which stays; ranks are those of the generation under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hecate.launch.policy.stragglers import MIN_SECONDS, Pace, changed_ranks, relative_speeds, with_speeds, without_ranks
from hecate.launch.ray_job.worker_group import Event
from hecate.parallel.sequence_shares import sequences_by_speed
from hecate.parallel.topology import Topology
from hecate.parallel.topology_file import parse_topology


class Shares:
    """One job's, from generation to generation."""

    def __init__(self, topology: Topology | None, places: Sequence[int]) -> None:
        """
        Args:
            topology: of these places in their order; None: to be measured.
        """
        self.topology = topology
        self._described = list(places) if topology else []
        """places that the topology describes, in its order"""
        self._members: list[int] = []
        """places by rank"""
        self.rows: list[int] = []
        """of a micro-step, by rank; empty until the ranks have begun"""
        self.speeds: dict[int, float] = {}
        """place -> real over planned speed, of the last full window"""
        self._windows: list[dict[int, float]] = []
        self._paces: dict[int, Pace] = {}
        """of the window that is not full yet, by rank"""
        self._reports: dict[int, dict[int, Event]] = {}
        """step -> rank -> what it has told, until all have"""
        self._orders = 0

    def knows(self, places: Sequence[int]) -> bool:
        """Does the topology describe them all?"""
        return all(place in self._described for place in places)

    def begin(self, members: Sequence[int]) -> Topology | None:
        """A generation of these places: what the one before has shown is forgotten. Returns their topology, if it is known."""
        self._members, self.rows, self.speeds = list(members), [], {}
        self._windows, self._paces, self._reports = [], {}, {}
        return self._of_members()

    def begun(self, rows: list[int], topology: str) -> None:
        """The ranks have been built, with these rows and, if theirs was not known, the topology that they have measured."""
        self.rows = rows
        if self.topology is None or not self.knows(self._members):
            self.topology = parse_topology(topology, "the measured topology")
            self._described = list(self._members)

    def hear(self, rank: int, report: Event) -> dict[int, float]:
        """What one rank tells of its steps. Returns the ranks whose speed has left the plan, with the real over the planned one."""
        told = self._reports.setdefault(report["step"], {})
        told[rank] = report
        if len(told) < len(self._members):
            return {}
        self._reports = {step: others for step, others in self._reports.items() if step > report["step"]}
        topology = self._of_members()
        if topology is None:
            return {}
        for its_rank, found in told.items():
            if self.rows[its_rank]:
                self._paces[its_rank] = self._paces.get(its_rank, Pace()) + Pace(found["dense_tokens"], found["dense_seconds"])
        if min(pace.seconds for pace in self._paces.values()) < MIN_SECONDS:
            return {}
        self._windows.append(relative_speeds(self._paces, topology))
        self._paces = {}
        self.speeds = {self._members[its_rank]: speed for its_rank, speed in self._windows[-1].items()}
        return changed_ranks(self._windows)

    def deal_anew(self, changed: dict[int, float]) -> dict[str, Any]:
        """The order for the ranks that deals rows, and experts if that pays, by the speeds that devices have now.

        Args:
            changed: as `hear` has returned it.
        """
        known, ours = self.topology, self._of_members()
        assert known is not None
        assert ours is not None
        ours = with_speeds(ours, changed)
        flops = list(known.flops)
        for rank, place in enumerate(self._members):
            flops[self._described.index(place)] = ours.flops[rank]
        self.topology = replace(known, flops=tuple(flops))
        self._windows, self._paces = [], {}
        self.rows = sequences_by_speed(sum(self.rows), ours.flops)
        self._orders += 1
        return {"number": self._orders, "flops": list(ours.flops), "rows": self.rows, "reshard": True}

    def _of_members(self) -> Topology | None:
        if self.topology is None or not self.knows(self._members):
            return None
        return without_ranks(self.topology, [self._described.index(place) for place in self._members])
