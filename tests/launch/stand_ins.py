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
        fewest: number of devices without which it does not.
    """

    def __init__(self, devices: int, fewest: int) -> None:
        self.devices, self.fewest = devices, fewest
        self.started: list[tuple[int, int, Beginning | None]] = []
        self.gone: set[int] = set()
        self.new: list[int] = []

    def start(self, member: int, device: int, begins: Beginning | None) -> StandIn | None:
        self.started.append((member, device, begins))
        return None if device in self.gone else StandIn()

    def devices_to_begin(self) -> list[int] | None:
        left = [device for device in range(self.devices) if device not in self.gone]
        return left if len(left) >= self.fewest else None

    def new_devices(self) -> list[int]:
        new, self.new = self.new, []
        return new
