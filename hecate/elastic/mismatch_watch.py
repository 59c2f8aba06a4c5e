"""Finds a rank that does another collective than the others, and names it, its collective and theirs.

Such ranks wait for each other until the timeout of their groups, half an hour. torch keeps a record of the newest collectives of a process
(its flight recorder, which torch 2.13 has on by default, for gloo, too), so nothing is added to a collective. A thread of each rank looks a
few times a second whether the rank has begun a new one. If it has not for more than half a second, and one is under way, the rank leaves
its record in the store where the ranks have met, and reads those of the others, a few times a second at first and then more and more
seldom. Ranks that are only slow have equal records. Whichever rank finds a difference tells the others of it.

It watches ranks on gloo. What it does not see: messages between two ranks, which the recorder leaves out; and all-reduces of different
lengths where gloo ends the process at once (docs/use/drills.md, R18).
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from hecate.errors import UserError
from hecate.parallel.comm.aborts import is_aborted
from hecate.ranks.backend import is_nccl
from hecate.ranks.ranks import Ranks

LOOK_SECONDS = 0.2
"""The time between two looks of the thread."""
STILL_SECONDS = 0.6
"""How long a rank begins no collective before it asks the others."""
CROSSED_SECONDS = 0.6
"""How long all ranks stand still in different groups, after they have asked, before this counts as a difference."""
MORE_STILL = 1 / 20
"""The share of STILL_SECONDS by which a rank waits longer after each record that it has left. A store in a file only grows, so a run whose
ranks often stand still in ordinary steps would otherwise fill the disk."""
LOOKS_APART = 0.2
"""The share of the time that all has stood still after which a rank looks again, so that many ranks that wait for long read little."""

_FOUND = "found"
"""The key under which a rank that has found a difference leaves it in the store for the others, who look for it at each turn."""

Calls = dict[str, dict[str, str]]
"""By the name of a group and the number of a collective in it, the collective in words."""


def calls_of(dump: bytes, since_ns: int) -> Calls:
    """What a dump of torch's flight recorder says (JSON, version 2.10 of its format, torch 2.13).

    Args:
        since_ns: collectives before this time are left out; they are of ranks that this process has left.
    """
    found: Calls = {}
    for entry in json.loads(dump).get("entries", ()):
        if not entry["is_p2p"] and entry["time_created_ns"] >= since_ns:
            found.setdefault(entry["process_group"][0], {})[str(entry["collective_seq_id"])] = _in_words(entry)
    return found


def _in_words(entry: Mapping[str, Any]) -> str:
    """The collective, with sizes where they must be the same on all ranks."""
    name = entry["profiling_name"].partition(":")[2] or entry["profiling_name"]
    kinds = "/".join(dict.fromkeys(entry["input_dtypes"]))
    sizes = "" if "to_all" in name else " ".join(map(str, entry["input_sizes"]))
    return " ".join(filter(None, (name, "of" if kinds else "", kinds, sizes)))


def difference_of(calls: Mapping[int, Calls]) -> str | None:
    """The first collective that some ranks do otherwise than others, in words; None: as far as they have all come, they do the same.

    Args:
        calls: by rank.
    """
    for group in sorted({group for own in calls.values() for group in own}):
        numbers = {number for own in calls.values() for number in own.get(group, ())}
        for number in sorted(numbers, key=int):
            does = {rank: own[group][number] for rank, own in sorted(calls.items()) if number in own.get(group, ())}
            if len(set(does.values())) > 1:
                return _named(does, f"collective {number} of group {group}")
    return None


def crossing_of(calls: Mapping[int, Calls], reached: Mapping[int, Mapping[str, int]]) -> str | None:
    """Two ranks of which each has begun a collective that the other has not, in words; None: there are no such ranks.

    Ranks that do the same collectives may look like this for a moment, where chance decides which of two groups comes first.

    Args:
        calls: by rank.
        reached: rank -> group -> number of its newest collective there.
    """
    does: dict[int, str] = {}
    for first, second in combinations(sorted(reached), 2):
        common = sorted(reached[first].keys() & reached[second].keys())
        ahead = [group for group in common if reached[first][group] > reached[second][group]]
        behind = [group for group in common if reached[first][group] < reached[second][group]]
        if ahead and behind:
            for rank, group in ((first, ahead[0]), (second, behind[0])):
                does.setdefault(rank, f"{calls[rank].get(group, {}).get(str(reached[rank][group]), 'a collective')} of group {group}")
    return _named(does, "in different groups") if does else None


def _named(does: Mapping[int, str], where: str) -> str:
    counted = Counter(does.values())
    ranks_of = {what: [rank for rank, own in does.items() if own == what] for what in sorted(counted, key=lambda what: counted[what])}
    return f"{where}: " + "; ".join(f"{_ranks(ranks)} in {what}" for what, ranks in ranks_of.items())


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"


def next_look(still_since: float, now: float) -> float:
    """The time before which a rank that stands still does not look at the others' records again; all times in seconds of one clock."""
    return now + LOOKS_APART * (now - still_since)


def still_seconds(records: int) -> float:
    """For how long a rank that has left so many records has begun no collective before it leaves the next one."""
    return STILL_SECONDS * (1 + MORE_STILL * records)


class MismatchWatch:
    """The thread of one rank. It runs from the first ranks until the end of the process."""

    def __init__(self) -> None:
        self._ranks: Ranks | None = None
        self._store: dist.Store | None = None
        self._since_ns = 0
        self._thread: threading.Thread | None = None
        self._found: str | None = None
        self._records: dict[int, bytes] = {}
        self._same_since = 0.0
        """The time since which the records in the store are the same."""

    def begin(self, ranks: Ranks) -> None:
        """Watch these ranks in place of those before, and no others until the next call. Every rank must call it."""
        # The thread watches nothing while the fields change: it must not compare the new ranks in the store of the old ones.
        self._ranks = None
        if ranks.world_size == 1 or is_nccl(ranks.groups.world):
            return
        self._store = dist.PrefixStore("mismatch", ranks.store or distributed_c10d._get_default_store())
        self._since_ns, self._found, self._ranks = time.time_ns(), None, ranks
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hecate-mismatch-watch", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Watch nobody."""
        self._ranks = None

    def raise_found(self, error: Exception) -> None:
        """To be called when a collective has failed: this thread may have broken it off.

        Raises:
            UserError: it has, because it has found a difference. The text says which ranks do what.
        """
        if self._found is not None:
            raise UserError(
                f"the ranks do different things: {self._found}\n"
                "  do all nodes run the same version of hecate and torch, with the same configuration? If so, please report this"
            ) from error

    def _run(self) -> None:
        pause = threading.Event()
        watched: Ranks | None = None
        numbers: list[int] = []
        still_since = look_at = 0.0
        published, records = False, 0
        while True:
            pause.wait(LOOK_SECONDS)
            ranks, store = self._ranks, self._store
            if ranks is None or store is None or is_aborted(ranks.groups.world):
                watched = None
                continue
            try:
                now = [int(group._get_sequence_number_for_group()) for group in ranks.all_groups()]  # type: ignore[attr-defined]
                seconds = time.monotonic()
                if ranks is not watched or now != numbers:
                    watched, numbers, still_since, published = ranks, now, seconds, False
                    look_at = still_since + still_seconds(records)
                elif published and store.check([_FOUND]):
                    self._end(ranks, store.get(_FOUND).decode())
                elif seconds > look_at:
                    look_at = next_look(still_since, seconds)
                    if not published and _waits():
                        own = calls_of(_dump(), self._since_ns)
                        names = [distributed_c10d._get_process_group_name(group) for group in ranks.all_groups()]
                        store.set(f"rank-{ranks.rank}", json.dumps([own, dict(zip(names, now, strict=True))]))
                        published, records = True, records + 1
                    if published:
                        self._compare(ranks, store)
            except RuntimeError:  # the groups or their store were left meanwhile
                watched = None

    def _compare(self, ranks: Ranks, store: dist.Store) -> None:
        names = {rank: f"rank-{rank}" for rank in range(ranks.world_size)}
        records = {rank: store.get(name) for rank, name in names.items() if store.check([name])}
        if records != self._records:
            self._records, self._same_since = records, time.monotonic()
        read = {rank: json.loads(record) for rank, record in records.items()}
        calls = {rank: own for rank, (own, _) in read.items()}
        seconds, complete = time.monotonic() - self._same_since, len(records) == ranks.world_size
        found = difference_of(calls) if complete or seconds > 2 * LOOK_SECONDS else None
        if found is None and complete and seconds > CROSSED_SECONDS:
            found = crossing_of(calls, {rank: reached for rank, (_, reached) in read.items()})
        if found is not None:
            store.set(_FOUND, found)
            self._end(ranks, found)

    def _end(self, ranks: Ranks, found: str) -> None:
        """Break off what the rank waits for, because of a difference."""
        # While this thread compared, training may have gone on with other ranks, of which it knows nothing.
        if ranks is self._ranks:
            self._found = found
            # The others look meanwhile, and name the difference, too. After the abort they would only see that this rank is gone.
            time.sleep(2 * LOOK_SECONDS)
            ranks.abort()


def _dump() -> bytes:
    """What torch's flight recorder has, as JSON."""
    recorder: Any = torch._C._distributed_c10d
    return bytes(recorder._dump_fr_trace_json())


def _waits() -> bool:
    """Whether a collective of this process is under way."""
    entries = json.loads(_dump()).get("entries", ())
    return any(not entry["retired"] for entry in entries)
