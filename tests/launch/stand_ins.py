"""Processes of ranks that end when a test says so, and machines on which they are started."""

from __future__ import annotations

import signal

from hecate.launch.rank_command import Beginning


class StandIn:
    """A process of a rank."""

    def __init__(self) -> None:
        self.returncode: int | None = None
        self.saves = False
        """whether it saves and ends with status 0 after a signal"""

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int:
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int, /) -> None:
        self.returncode = (0 if self.saves else -number) if self.returncode is None else self.returncode

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class StandInMachines:
    """Machines (`hecate.launch.surviving_ranks.Machines`), some of whose devices may be gone.

    Args:
        devices: number of devices that the run begins with.
    """

    def __init__(self, devices: int) -> None:
        self.devices = devices
        self.started: list[tuple[int, int, Beginning | None]] = []
        self.gone: set[int] = set()
        self.new: set[int] = set()
        """further devices, which have come since"""

    def start(self, member: int, device: int, begins: Beginning | None) -> StandIn:
        self.started.append((member, device, begins))
        process = StandIn()
        if device in self.gone:
            process.kill()
        return process

    def present(self) -> set[int]:
        return (set(range(self.devices)) | self.new) - self.gone
