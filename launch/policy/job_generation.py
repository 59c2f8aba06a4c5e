"""Which devices of a job train together, how each one's part has ended, and which of them train together next. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from enum import Enum


class RankEnd(Enum):
    """How a rank's part in a generation has ended."""

    WAITING = "waiting"
    """it has left the generation, and waits with its state for the next one"""
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    """training raised an error; the worker lives"""
    LOST = "lost"
    """the worker is gone, hung, or was ended"""


@dataclass(frozen=True)
class JobGeneration:
    """One set of ranks that train together, by their devices' numbers in the job. A value: whatever happens gives a new one."""

    number: int = -1
    """from 0; -1: none has begun yet"""
    members: tuple[int, ...] = ()
    """device of each rank"""
    ends: Mapping[int, RankEnd] = field(default_factory=dict)
    """device -> how its part has ended, if it has"""
    errors: tuple[str, ...] = ()
    """what training has raised on its ranks, in the order in which it became known"""
    error_answered: bool = False
    """an error of training on all ranks has been decided on"""

    @property
    def has_begun(self) -> bool:
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
    def all_finished(self) -> bool:
        """Whether training is done on every rank."""
        return self.all_ended and not self.error_answered and set(self.ends.values()) == {RankEnd.FINISHED}

    @property
    def loss_answered(self) -> bool:
        """Whether a failure in this generation has been decided on."""
        return self.error_answered or RankEnd.LOST in self.ends.values()

    def rank_of(self, device: int) -> int | None:
        """The rank of a device; None: it is no member."""
        return self.members.index(device) if device in self.members else None

    def with_end(self, device: int, end: RankEnd, error: str | None = None) -> JobGeneration:
        """The generation when a device's part has ended, with an error of its training or without."""
        errors = self.errors if error is None else (*self.errors, error)
        return replace(self, ends={**self.ends, device: end}, errors=errors)

    def may_go_on(self, device: int, prepared: AbstractSet[int]) -> bool:
        """Whether a device whose worker lives could be in the next generation.

        Args:
            prepared: devices that are no members and whose workers have loaded.
        """
        stays = device in self.members and self.ends.get(device, RankEnd.LOST) is not RankEnd.LOST
        return not self.has_begun or stays or device in prepared

    def following(
        self, ready: Sequence[int], prepared: AbstractSet[int], *, described: bool, recoverable: bool, fewest: int = 1
    ) -> tuple[JobGeneration, bool]:
        """The generation that follows, and whether it begins warm.

        It begins warm if possible: waiting ranks go on with their state in memory, and prepared workers join them. Else all ready devices
        begin from the last checkpoint.

        Args:
            ready: devices that may go on (`may_go_on`), in their order in the job.
            described: whether the topology has all of them.
            recoverable: whether the state of a lost rank can be had from copies or from a checkpoint.
            fewest: with fewer members no generation begins warm.
        """
        waiting = [device for device in self.members if self.ends.get(device) is RankEnd.WAITING and device in ready]
        nobody_lost = not self.error_answered and all(end is RankEnd.WAITING for end in self.ends.values())
        loaded = [device for device in ready if device in waiting or device in prepared]
        warm = bool(waiting) and len(loaded) >= fewest and described and (nobody_lost or recoverable)
        return JobGeneration(self.number + 1, tuple(loaded if warm else ready)), warm
