"""Reads from the files of the local launcher with which ranks a rank goes on (`hecate.ranks.launcher_files`)."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from hecate.config import Config
from hecate.config.files.topology import AUTO, whole_topology
from hecate.elastic.connecting import connect_while_wanted
from hecate.elastic.peer_watch import PeerWatch
from hecate.elastic.rebuild import Group
from hecate.errors import UserError
from hecate.parallel.cluster.mesh import shard_size_for
from hecate.parallel.cluster.topology import Topology
from hecate.ranks.backend import chosen_backend, forget_groups
from hecate.ranks.devices import gather_devices
from hecate.ranks.launcher_files import (
    JOIN_VARIABLE,
    MEMBER_VARIABLE,
    STORE_VARIABLE,
    Generation,
    arrival_file,
    read_generation,
    ready_file,
)
from hecate.ranks.meeting import CONNECT_LIMIT, meeting_store, watched
from hecate.ranks.ranks import Ranks, connect, first_generation, loss_in_words

_log = logging.getLogger(__name__)

_GRACE = 10.0
"""Seconds within which a launcher that has lost a rank writes the next generation. It waits for a silent node for some of them
(`hecate.launch.surviving_nodes`)."""
_POLL_SECONDS = 0.005


def local_membership(config: Config, ranks: Ranks) -> LocalMembership | None:
    """The membership of a rank that goes on after losses; None: it does not, or no launcher of ours has started it.

    Args:
        ranks: the ranks that this process has joined, which from now on notices when one of them is lost.
    """
    return LocalMembership(config, ranks) if MEMBER_VARIABLE in os.environ and config.fssdp.redundancy > 0 else None


class LocalMembership:
    """The `hecate.elastic.rebuild.Membership` of a rank that the local launcher has started."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._config = config
        self._store = Path(os.environ[STORE_VARIABLE])
        self._member = int(os.environ[MEMBER_VARIABLE])
        self._number = first_generation()
        self._watch = PeerWatch(self._store)
        if JOIN_VARIABLE not in os.environ:  # a rank that is to join is alone until then
            first = self._member - ranks.rank  # the members of the first generation have neighbouring numbers
            self._watch.begin(range(first, first + ranks.world_size), ranks)

    def loaded(self) -> None:
        ready_file(self._store, self._member).touch()

    def regroup_requested(self) -> bool:
        return read_generation(self._store).number > self._number

    def first_group(self) -> Group:
        ready_file(self._store, self._member).touch()
        while True:
            generation = read_generation(self._store)
            if generation.number > self._number and self._member in generation.members:
                group = self._join(generation)
                if group is not None:
                    return group
            time.sleep(_POLL_SECONDS)

    def next_group(self) -> Group | None:
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            generation = read_generation(self._store)
            if generation.number > self._number:
                group = self._join(generation)
                if group is not None:
                    return group
                deadline = time.monotonic() + _GRACE
            time.sleep(_POLL_SECONDS)
        return None

    def _join(self, generation: Generation) -> Group | None:
        """Join a generation and return its group; None: a rank was lost before all had joined."""
        self._number = generation.number
        if self._member not in generation.members:
            raise UserError("the launcher removed this rank, and the other ranks have gone on without it")
        # No member connects before all have arrived: gloo cannot be interrupted while it connects to a rank that never comes.
        arrival_file(self._store, generation.number, self._member).touch()
        missing = [arrival_file(self._store, generation.number, member) for member in generation.members]
        while missing := [path for path in missing if not path.exists()]:
            if read_generation(self._store).number > generation.number:
                return None
            time.sleep(_POLL_SECONDS)
        world_size = len(generation.members)
        try:
            store = meeting_store(generation.number, world_size)
            store = watched(store, lambda: read_generation(self._store).number == generation.number)
            ranks = self._connect(generation, store)
            # Before the next collective, which under NCCL waits for ever for a rank that is lost in it.
            self._watch.begin(generation.members, ranks)
            try:
                return Group(ranks, self._topology(generation, ranks))
            except RuntimeError:
                ranks.abort()  # only the direct peers of a lost rank notice the loss by themselves
                raise
        except torch.OutOfMemoryError:
            raise  # the next try would need as much memory
        except RuntimeError as error:
            reason = loss_in_words(error)
            _log.warning(f"hecate: member {self._member} could not join group {generation.number}: {reason}")
            forget_groups()
            return None

    def _connect(self, generation: Generation, store: dist.Store) -> Ranks:
        """Raises: DistError, or another RuntimeError: a rank was lost before all had connected."""
        fssdp, model = self._config.fssdp, self._config.model
        rank, world_size = generation.members.index(self._member), len(generation.members)
        size = shard_size_for(world_size, fssdp.shard_size, fssdp.redundancy)

        def make() -> Ranks:
            sharded, ctas, limit = model.shard_non_experts, fssdp.max_ctas, CONNECT_LIMIT
            return connect(store, rank, world_size, size, model.tensor_parallel, sharded_layers=sharded, max_ctas=ctas, limit=limit)

        if chosen_backend() != "nccl":
            return make()  # gloo's waits end by its store (`watched`)
        # A rank that joins is no reason to give up: the ranks that have connected already wait for this one until the end of a step.
        return connect_while_wanted(make, lambda: set(generation.members) <= set(read_generation(self._store).members))

    def _topology(self, generation: Generation, ranks: Ranks) -> Topology:
        """The devices of a generation: those that its ranks see, or their part of a topology that the configuration names."""
        if self._config.topology == AUTO:
            return whole_topology(self._config, gather_devices(ranks)).topology
        return whole_topology(self._config, ()).topology.take(generation.devices)
