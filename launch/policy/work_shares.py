"""Decides how many sequences of a step each device of a job computes, from its planned speed and the speed that is measured.

A device has a number that stays the same for the whole job; a rank is its number in the present generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hecate.elastic.stragglers import SpeedWindows, with_speeds
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cluster.topology_file import parse_topology
from hecate.parallel.values.sequence_shares import sequences_by_speed
from hecate.report.events import DenseWork


@dataclass(frozen=True)
class NewShares:
    """The speeds and shares that all ranks are to use after a device's speed has changed."""

    number: int
    """the number of the change in the job, from 1"""
    flops: tuple[float, ...]
    """the FLOP/s of each rank's device"""
    sequences: tuple[int, ...]
    """the number of sequences in a micro-step, by rank"""


class WorkShares:
    """Each device's share of the sequences, from one generation of a job to the next."""

    def __init__(self, topology: Topology | None, devices: Sequence[int], group_size: int = 1) -> None:
        """
        Args:
            topology: the topology of these devices, in their order; None: the first ranks measure it.
            devices: the numbers of the devices that the job begins with.
            group_size: so many neighbouring sequences stay on one rank (`deterministic_group`).
        """
        self._group_size = group_size
        self.topology = topology
        self._described = list(devices) if topology else []
        """the devices that the topology describes, in its order"""
        self._members: list[int] = []
        """the device of each rank"""
        self.sequences: tuple[int, ...] = ()
        """the number of sequences in a micro-step, by rank; empty until the ranks train"""
        self.speeds: dict[int, float] = {}
        """a device -> its real over its planned speed, in the last full window"""
        self._windows = SpeedWindows()
        self._reports: dict[int, dict[int, DenseWork]] = {}
        """a step -> a rank -> its report, until all ranks have reported"""
        self._changes = 0

    def describes(self, devices: Sequence[int]) -> bool:
        """Whether the topology has all of these devices."""
        return all(device in self._described for device in devices)

    def begin_generation(self, members: Sequence[int]) -> Topology | None:
        """Begin a generation with these devices, and forget earlier measurements. Returns the devices' topology, if it is known."""
        self._members, self.sequences, self.speeds = list(members), (), {}
        self._windows, self._reports = SpeedWindows(), {}
        return self._of_members()

    def generation_begun(self, sequences: tuple[int, ...], topology: str) -> None:
        """Take in what the ranks of a new generation have reported.

        Args:
            sequences: number of sequences in a micro-step, by rank.
            topology: the topology of the ranks' devices as YAML, measured by the ranks or given to them.
        """
        self.sequences = sequences
        if self.topology is None or not self.describes(self._members):
            self.topology = parse_topology(topology, "the measured topology")
            self._described = list(self._members)

    def add_report(self, rank: int, step: int, work: DenseWork) -> dict[int, float]:
        """Take in one rank's report of its steps.

        Returns:
            The ranks whose speed differs from the plan, with the real over the planned speed; empty while nothing has changed.
        """
        reports = self._reports.setdefault(step, {})
        reports[rank] = work
        if len(reports) < len(self._members):
            return {}
        self._reports = {later: others for later, others in self._reports.items() if later > step}
        topology = self._of_members()
        if topology is None:
            return {}
        changed = self._windows.add({of: found for of, found in reports.items() if self.sequences[of]}, topology)
        if changed is None:
            return {}
        self.speeds = {self._members[of]: speed for of, speed in self._windows.speeds.items()}
        return changed

    def share_anew(self, changed: Mapping[int, float]) -> NewShares:
        """Share out the sequences by the speeds that the devices have now.

        Args:
            changed: what `add_report` has returned.
        """
        whole, ours = self.topology, self._of_members()
        assert whole is not None
        assert ours is not None
        ours = with_speeds(ours, changed)
        flops = list(whole.flops)
        for rank, device in enumerate(self._members):
            flops[self._described.index(device)] = ours.flops[rank]
        self.topology = replace(whole, flops=tuple(flops))
        self._windows = SpeedWindows()
        self.sequences = tuple(sequences_by_speed(sum(self.sequences), ours.flops, self._group_size))
        self._changes += 1
        return NewShares(self._changes, ours.flops, self.sequences)

    def _of_members(self) -> Topology | None:
        if self.topology is None or not self.describes(self._members):
            return None
        return self.topology.take([self._described.index(device) for device in self._members])
