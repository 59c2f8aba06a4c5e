"""Notices, beside the training, that the local launcher has lost a rank, and aborts this rank's groups.

Under NCCL nothing else does: the collectives of the other ranks never end, and their hosts wait in the next read of a GPU. Under gloo
collectives raise by themselves, on one machine at once; after another machine has fallen silent that takes 12 s, of which the watch
saves most.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection
from pathlib import Path

from hecate.ranks.backend import is_nccl
from hecate.ranks.launcher_files import MEETING_VARIABLE, read_generation
from hecate.ranks.ranks import Ranks

LOOK_SECONDS = 0.2
"""The time between two looks at the launcher's file."""


class PeerWatch:
    """Reads the launcher's file in a thread of its own, which runs from the first watched ranks until the process or the launcher ends."""

    def __init__(self, store: Path) -> None:
        """`store`: the path that the launcher's files are named after (`hecate.ranks.launcher_files`)."""
        self._store = store
        self._watched: tuple[frozenset[int], Ranks] | None = None
        self._thread: threading.Thread | None = None

    def begin(self, members: Collection[int], ranks: Ranks) -> None:
        """Watch these ranks in place of those before. Ranks of one machine on another backend than NCCL are not watched."""
        if not is_nccl(ranks.groups.world) and MEETING_VARIABLE not in os.environ:
            self._watched = None
            return
        self._watched = frozenset(members), ranks
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hecate-peer-watch", daemon=True)
            self._thread.start()

    def look(self) -> bool:
        """Abort the watched ranks if the launcher goes on without one of them. A rank that joins is no reason: it waits for a step's end.

        Returns:
            False: the launcher has removed its files, so nobody is watched any more.
        """
        # Read before the file: new ranks that begin in between would be missing in the generation that was read, and be aborted.
        watched = self._watched
        try:
            members = read_generation(self._store).members
        except OSError:
            return False
        if watched is not None and watched[0] - set(members):
            watched[1].abort()  # of ranks that were left meanwhile it does nothing
        return True

    def _run(self) -> None:
        pause = threading.Event()
        while self.look():
            pause.wait(LOOK_SECONDS)
