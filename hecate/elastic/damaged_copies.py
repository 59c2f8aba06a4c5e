"""Finds experts whose copies differ, says which copy is the right one, and restores the others from it.

The owner of an expert and its backup ranks take the same steps from the same numbers (`hecate.elastic.backups`). So copies differ only if
the memory of one of their ranks has changed by itself. Which of them is right is known in two ways:

- Each rank notes the digests of what it holds after a step, and compares them before the next one changes anything. What has changed in
  between is damaged.
- Of three copies, two are equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from hecate.config import FssdpConfig
from hecate.elastic.backups import holders
from hecate.elastic.rebuild import named
from hecate.engine.protocol import ExpertEngine
from hecate.errors import UserError
from hecate.optim.optimizer import MASTER, ExpertOptimizer
from hecate.parallel.comm.aborts import read
from hecate.parallel.comm.reshard import reshard
from hecate.parallel.values.units import expert_name

_MOST_TRIES = 3
ALIKE, UNKNOWN = -1, -2
"""What `right_copies` says of an expert whose copies are all equal, and of one whose copies differ, of which none is known to be right."""


@dataclass(frozen=True)
class Compared:
    """What a comparison of all copies of all experts has found; the same on every rank."""

    restored: tuple[str, ...] = ()
    """The experts of which copies were damaged and are right again, each with the ranks of the damaged copies."""
    lost: tuple[str, ...] = ()
    """The names of the experts whose copies differ, and of which none is known to be right."""


class CopiesRestoredError(Exception):
    """Copies were damaged while a step was under way, and are right again. Nothing else has changed: the step is to be done again."""

    def __init__(self, restored: Sequence[str]) -> None:
        super().__init__(*restored)
        self.restored = tuple(restored)

    def refuse_after(self, tries: int) -> None:
        """Raises UserError: this was the last of so many tries of a step that should be made."""
        if tries >= _MOST_TRIES:
            raise UserError(
                f"memory has changed by itself in each of {tries} tries of a step: expert {'; '.join(self.restored)}\n"
                "  leave that rank's machine out; resume=true goes on from the last checkpoint"
            ) from self


class CopyChecks:
    """When the copies of one run's experts are compared, and what was noted and restored, on one rank."""

    def __init__(self, engine: ExpertEngine, optimizer: ExpertOptimizer, config: FssdpConfig) -> None:
        self._engine, self._optimizer, self._backups = engine, optimizer, config.redundancy
        self._every = config.verify_copies_steps if config.redundancy else None
        self._noted: dict[str, int] | None = None
        """The digests of the experts that this rank has held since the last step; None: they were not noted."""
        self._restored: list[str] = []

    def of_step(self, step: int) -> Callable[[], None] | None:
        """What compares all copies when the gradients of the step after `step` are complete (`check`); None: nothing does."""
        return self.check if self._every and (step + 1) % self._every == 0 else None

    def after_step(self, step: int) -> None:
        """Note what the optimizer has left in the step after `step`, if copies are compared in the next one."""
        self._noted = own_digests(self._optimizer) if self.of_step(step + 1) else None

    def copies_renewed(self, step: int | None) -> None:
        """Copies were made anew, after so many steps; note them if the next one compares them. None: the number is not known yet."""
        self._noted = own_digests(self._optimizer) if step is not None and self.of_step(step) else None

    def check(self) -> None:
        """Compare all copies, and restore those that are damaged. Every rank must call it while nothing may change.

        Raises:
            CopiesRestoredError: some were damaged.
            UserError: some are damaged, and which is not known.
        """
        compared = compare_copies(self._engine, self._optimizer, self._backups, self._noted)
        if compared.lost:
            raise UserError(
                f"{named(compared.lost)}: the copies on different ranks differ, so the memory of one of them has changed by itself; "
                "which one is not known, and nothing was saved\n"
                "  check the memory of this job's machines; resume=true goes on from the last checkpoint, which was saved before\n"
                f"  {'fssdp.verify_copies_steps=1 or ' if self._every != 1 else ''}fssdp.redundancy=2 would have told which copy is right"
            )
        if compared.restored:
            self._restored += compared.restored
            # A copy that was damaged before it was noted has a wrong note, by which the restored one would count as changed.
            if self._noted is not None:
                self._noted = own_digests(self._optimizer)
            raise CopiesRestoredError(compared.restored)

    def check_and_restore(self) -> None:
        """As `check`, if there are backups, but what was restored raises nothing: the run goes on with it."""
        if self._backups:
            with suppress(CopiesRestoredError):
                self.check()

    def take_restored(self) -> list[str]:
        """What was restored since the last call: experts, each with the ranks of its damaged copies."""
        restored, self._restored = self._restored, []
        return restored


def right_copies(digest_CN: np.ndarray, changed_CN: np.ndarray) -> np.ndarray:
    """Which copy of each expert is right: int64 [experts], the number of the copy, `ALIKE` or `UNKNOWN`.

    Args:
        digest_CN: int64 [copies, experts]; 0: there is no such copy.
        changed_CN: bool [copies, experts], whether the copy has changed since its rank noted its digest.
    """
    right_N = np.full(digest_CN.shape[1], ALIKE)
    for expert in np.flatnonzero((digest_CN.max(0) != digest_CN.min(0)) & (digest_CN != 0).any(0)).tolist():
        copies = np.flatnonzero(digest_CN[:, expert])
        found = digest_CN[copies, expert]
        if (found == found[0]).all():
            continue
        untouched = found[~changed_CN[copies, expert]]
        value, times = Counter(found.tolist()).most_common(1)[0]
        if 0 < len(untouched) < len(found) and (untouched == untouched[0]).all():
            value = int(untouched[0])
        elif 2 * times <= len(found):
            right_N[expert] = UNKNOWN
            continue
        right_N[expert] = copies[np.flatnonzero(found == value)[0]]
    return right_N


def own_digests(optimizer: ExpertOptimizer) -> dict[str, int]:
    """The digest of each expert that this rank owns or has a backup of, by name: 63 bits of its parameters and moments, never 0."""
    return {name: _digest(optimizer.row(parameter)) for name, parameter in {**optimizer.owned, **optimizer.backups}.items()}


def compare_copies(engine: ExpertEngine, optimizer: ExpertOptimizer, backups: int, noted: Mapping[str, int] | None = None) -> Compared:
    """Compare the copies of all experts, and restore those that are damaged. Every rank must call it, between two changes by the optimizer.

    Sharding groups hold copies of each other's experts. Only digests travel, and the experts that are restored.

    Args:
        backups: the number of backups of each expert (`backups_kept`).
        noted: the `own_digests` after the last change; None: they were not noted.
    """
    units = {unit: chunked.num_experts for unit, chunked in engine.shards.chunked.items()}
    names = [expert_name(unit, expert) for unit, count in units.items() for expert in range(count)]
    if not names:
        return Compared()
    holder_CN = np.concatenate([holders(engine, unit, backups) for unit in units], axis=1)
    own, world = own_digests(optimizer), engine.shards.groups.world
    table = torch.zeros((2, *holder_CN.shape), dtype=torch.int64)  # of each copy its digest, and whether it has changed
    for copy, expert in np.argwhere(holder_CN == dist.get_rank(world)).tolist():
        digest = own.get(names[expert], 0)
        table[0, copy, expert] = digest
        table[1, copy, expert] = int(noted is not None and noted.get(names[expert], digest) != digest)
    both = table.to(engine.shards.device)
    dist.all_reduce(both, group=world)  # each number comes from one rank, and all others add zero
    digest_CN, changed_CN = read(both, world).numpy()
    right_N = right_copies(digest_CN, changed_CN != 0)
    lost = tuple(names[expert] for expert in np.flatnonzero(right_N == UNKNOWN))
    damaged_CN = (right_N >= 0) & (digest_CN != 0) & (digest_CN != digest_CN[np.maximum(right_N, 0), np.arange(len(names))])
    if lost or not damaged_CN.any():
        return Compared(lost=lost)
    _restore(engine, optimizer, holder_CN, right_N, damaged_CN)
    restored = tuple(
        f"{names[expert]} on rank {', '.join(str(holder_CN[copy, expert]) for copy in np.flatnonzero(damaged_CN[:, expert]))}"
        for expert in np.flatnonzero(damaged_CN.any(0))
    )
    return Compared(restored)


def _restore(engine: ExpertEngine, optimizer: ExpertOptimizer, holder_CN: np.ndarray, right_N: np.ndarray, damaged_CN: np.ndarray) -> None:
    """Copy parameters and moments of right copies over the damaged ones."""
    held, group = {**optimizer.owned, **optimizer.backups}, engine.shards.groups.world
    start = 0
    for unit, store in engine.shards.stores.items():
        end = start + engine.shards.chunked[unit].num_experts
        of_unit, start = slice(start, end), end
        specs = optimizer.chunk_specs(unit, store.owned)
        for damaged_N, holder_N in zip(damaged_CN, holder_CN, strict=True):
            damaged_E = damaged_N[of_unit]
            source_N = holder_CN[np.maximum(right_N, 0), np.arange(len(right_N))]
            source_E, target_E = np.where(damaged_E, source_N[of_unit], -1), np.where(damaged_E, holder_N[of_unit], -1)
            own = np.flatnonzero(source_E == dist.get_rank(group)).tolist()
            rows = {expert: optimizer.row(held[expert_name(unit, expert)]) for expert in own}
            done = reshard(rows, specs, source_E, target_E, group, store.device)
            for expert, row in done.rows.items():
                parameter = held[expert_name(unit, expert)]
                with torch.no_grad():
                    parameter.copy_(row.pop(MASTER))
                optimizer.set_state(parameter, row)


def _digest(row: dict[str, Tensor]) -> int:
    hashed = xxhash.xxh3_64()
    for key in sorted(row):
        hashed.update(row[key].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return (hashed.intdigest() >> 1) or 1
