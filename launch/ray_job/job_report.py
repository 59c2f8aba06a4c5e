"""What people read of a job on a Ray cluster: a line when something happens, and the status."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hecate.launch.membership.job_members import JobMembers
from hecate.launch.policy.work_shares import WorkShares
from hecate.launch.ray_job.messages import PartBuilt, StepTotals
from hecate.launch.ray_job.status import DeviceState, DeviceStatus, JobStatus, StatusNote, finite
from hecate.launch.ray_job.worker_group import JobDevice
from hecate.parallel.cluster.topology_file import topology_text

_NOTES = 50
"""how many of the newest notes the status has"""


@dataclass(frozen=True)
class JobView:
    """What the controller holds at one moment, as far as the status tells it."""

    state: JobMembers
    devices: Sequence[JobDevice]
    built: Mapping[int, PartBuilt]
    """a device -> its event in this generation"""
    shares: WorkShares
    spares: int


class JobReport:
    """Gathers what the status tells beside the controller's own state, and says a line for each event that people should see."""

    def __init__(self, max_steps: int, say: Callable[[str], None]) -> None:
        """
        Args:
            say: prints a line for the user.
        """
        self._say = say
        self.max_steps = max_steps
        """the steps of the run; 0 until the ranks have counted how many its epochs are"""
        self._notes: tuple[StatusNote, ...] = ()
        self.detail = ""
        """why the job has failed"""
        self.step = 0
        """the number of optimizer steps done"""
        self.totals: StepTotals | None = None
        """the figures that were reported last"""
        self.checkpoint: str | None = None
        """the name of the newest checkpoint's folder"""

    def note(self, text: str) -> None:
        """Say something that has happened, and keep it for the status."""
        self._notes = (*self._notes, StatusNote(when=time.strftime("%H:%M:%S"), text=text))[-_NOTES:]
        self._say(text)

    def status(self, view: JobView) -> JobStatus:
        """The job's status now."""
        topology, totals = view.shares.topology, self.totals
        return JobStatus(
            state=view.state.phase,
            detail=self.detail,
            generation=max(view.state.generation.number, 0),
            max_steps=self.max_steps,
            step=self.step,
            loss=finite(totals.loss if totals else None),
            tokens_per_s=finite(totals.tokens_per_s if totals else None),
            imbalance=finite(totals.imbalance if totals else None),
            last_checkpoint=self.checkpoint,
            devices=tuple(_device_status(device, view) for device in view.devices),
            spares=view.spares,
            topology=None if topology is None else topology_text(topology),
            notes=self._notes,
            updated=time.time(),
        )


def _device_status(device: JobDevice, view: JobView) -> DeviceStatus:
    rank, built, sequences = view.state.generation.rank_of(device.index), view.built.get(device.index), view.shares.sequences
    return DeviceStatus(
        device=device.index,
        rank=rank,
        state=_device_state(device, view),
        sequences=sequences[rank] if rank is not None and sequences else None,
        experts=built.owned[rank] if built and rank is not None else None,
        speed=finite(view.shares.speeds.get(device.index)),
        kind=device.spec.kind,
        node=f"{device.spec.address} {device.spec.node_id[:8]}",
        pid=device.up.pid if device.up else None,
    )


def _device_state(device: JobDevice, view: JobView) -> DeviceState:
    number = device.index
    if number in view.state.generation.members and device.alive:
        if number in view.state.generation.ends:
            return DeviceState.IDLE
        return DeviceState.TRAINING if number in view.built else DeviceState.STARTING
    if number in view.state.loaded:
        return DeviceState.READY
    return DeviceState.LOADING if device.alive else DeviceState.COMING
