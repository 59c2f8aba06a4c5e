"""Which devices of a job train together, and how each one's part has ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum


class RankEnd(Enum):
    """How a rank's part in a generation has ended."""

    WAITING = "waiting"
    """it has left the generation, with its state, for the next one"""
    FINISHED = "finished"
    STOPPED = "stopped"
    """it has saved and ended, as ordered"""
    MISTAKE = "mistake"
    """the configuration, the data, the model or the disk is wrong, which the user has to mend"""
    FAILED = "failed"
    """training raised an error"""
    LOST = "lost"
    """the process is gone, or does not answer"""
    CONSEQUENCE = "consequence"
    """it stopped because it had lost another rank"""
    KILLED = "killed"
    """it was ended because the others could not go on with it"""


_LIKELIHOOD = (RankEnd.MISTAKE, RankEnd.FAILED, RankEnd.LOST, RankEnd.CONSEQUENCE, RankEnd.KILLED)
"""how likely an end is the cause of the others, the likeliest one first"""


@dataclass(frozen=True)
class JobGeneration:
    """One set of ranks that train together, by their devices' numbers in the job. A value: whatever happens gives a new one."""

    number: int = -1
    """the generation's number, from 0; -1: there is none yet"""
    members: tuple[int, ...] = ()
    """the device of each rank"""
    ends: Mapping[int, RankEnd] = field(default_factory=dict)
    """a device -> how its part has ended, if it has; in the order in which it became known"""
    said: Mapping[int, str] = field(default_factory=dict)
    """a device -> what is known of its end, in words"""

    @property
    def exists(self) -> bool:
        """Whether there is a generation at all."""
        return self.number >= 0

    @property
    def at_work(self) -> list[int]:
        """The members whose part has not ended."""
        return [device for device in self.members if device not in self.ends]

    @property
    def all_ended(self) -> bool:
        """Whether every member's part has ended."""
        return bool(self.members) and not self.at_work

    @property
    def culprit(self) -> int | None:
        """The member whose end is most likely the cause of the others' ends; None: all have ended well."""
        bad = [device for device, end in self.ends.items() if end in _LIKELIHOOD]
        return min(bad, key=lambda device: _LIKELIHOOD.index(self.ends[device])) if bad else None

    def rank_of(self, device: int) -> int | None:
        """The rank of a device; None: it is no member."""
        return self.members.index(device) if device in self.members else None

    def stays(self, device: int) -> bool:
        """Whether a device is a member, and was not lost."""
        return device in self.members and self.ends.get(device) is not RankEnd.LOST

    def with_end(self, device: int, end: RankEnd, said: str = "") -> JobGeneration:
        """The generation when a device's part has ended."""
        return replace(self, ends={**self.ends, device: end}, said={**self.said, device: said})
