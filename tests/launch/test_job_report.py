"""What the status says of each device of a job."""

from __future__ import annotations

from hecate.launch.membership.job_generation import JobGeneration, RankEnd
from hecate.launch.membership.job_members import JobMembers
from hecate.launch.membership.job_policy import JobPolicy
from hecate.launch.membership.job_states import State
from hecate.launch.policy.devices import Device
from hecate.launch.policy.work_shares import WorkShares
from hecate.launch.ray_job.job_report import JobReport, JobView
from hecate.launch.ray_job.messages import PartBuilt, WorkerUp
from hecate.launch.ray_job.status import DeviceState
from hecate.launch.ray_job.worker_group import JobDevice
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.cluster.topology_file import topology_text


def test_the_state_of_each_device_and_the_newest_notes() -> None:
    up = WorkerUp(pid=7, host="h", gpus=None, versions={})
    devices = [JobDevice(number, Device("0123456789", "10.0.0.1", "CPU", (), ()), up=None if number == 5 else up) for number in range(6)]
    begun = PartBuilt(step=3, max_steps=9, sequences=(2, 1, 1), owned=(4, 2, 2), topology=topology_text(local_topology(3, cuda=False)))
    shares = WorkShares(None, range(6))
    shares.begin_generation([0, 1, 2])
    shares.generation_begun(begun.sequences, begun.topology)
    view = JobView(
        state=JobMembers(
            JobPolicy(),
            phase=State.RUNNING,
            generation=JobGeneration(1, (0, 1, 2), {1: RankEnd.WAITING}),
            loaded=frozenset({3}),
        ),
        devices=devices,
        built={0: begun, 1: begun},
        shares=shares,
        spares=2,
    )
    said: list[str] = []
    report = JobReport(9, said.append)
    for number in range(60):
        report.note(str(number))
    status = report.status(view)
    states = [DeviceState.TRAINING, DeviceState.IDLE, DeviceState.STARTING, DeviceState.READY, DeviceState.LOADING, DeviceState.COMING]
    assert [device.state for device in status.devices] == states
    assert [(device.rank, device.sequences, device.experts, device.pid) for device in status.devices[:3]] == [
        (0, 2, 4, 7), (1, 1, 2, 7), (2, 1, None, 7),
    ]  # fmt: skip
    assert (status.devices[5].rank, status.devices[5].pid, status.devices[0].node) == (None, None, "10.0.0.1 01234567")
    assert (status.generation, status.max_steps, status.spares, status.loss) == (1, 9, 2, None)
    assert len(said) == 60
    assert [note.text for note in status.notes] == [str(number) for number in range(10, 60)]
