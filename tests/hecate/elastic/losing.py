"""Trainings that lose a rank in the midst of a step, and the new groups of those that are left."""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist

from hecate import faults
from hecate.config import load_config
from hecate.elastic.rebuild import Group
from hecate.parallel.cluster.mesh import shard_size_for
from hecate.parallel.cluster.topology import local_topology
from hecate.ranks.ranks import connect
from hecate.ranks.sockets import tcp_sockets
from hecate.train.training import Training
from tests.hecate.train.in_process import OVERRIDES, ranks_of_default_group

VICTIM, DEATH_STEP = 1, 2


PHASES = {
    "forward": ("experts", 2),
    "backward": ("backward", 2),
    "gradients": ("reduce", 1),
    "norm": ("gradients", 1),
    "stepped": ("step", 1),
}
"""name -> a place (`hecate.faults`), and at which of its calls a rank dies"""


class Dead(BaseException):
    """What a rank that dies raises, in place of a SIGKILL: it aborts its groups at once, as the system would close its sockets."""


def make_run(workshop: str, name: str, rank: int, world: int, *overrides: str) -> Training:
    given = (*OVERRIDES, f"output_dir={workshop}/runs/{name}", *overrides)
    ranks = replace(ranks_of_default_group(rank, world), connections=frozenset(tcp_sockets()))
    return Training(load_config(f"{workshop}/config.yaml", given, claim_output=False), ranks)


def make_run_in_groups(workshop: str, name: str, rank: int, world: int, shard_size: int | None, *overrides: str) -> Training:
    """As `make_run`, in the process groups that the configuration asks for."""
    ranks_of_default_group(rank, world).leave()
    given = (*OVERRIDES, f"output_dir={workshop}/runs/{name}", f"fssdp.shard_size={shard_size or 'null'}", *overrides)
    config = load_config(f"{workshop}/config.yaml", given, claim_output=False)
    store, sharded = dist.FileStore(f"{workshop}/{name}-groups", world), config.model.shard_non_experts
    return Training(config, connect(store, rank, world, shard_size, sharded_layers=sharded))


def regroup(run: Training, store: str, rank: int, world: int) -> None:
    """Go on with other ranks, in sharding groups as the launcher would make them."""
    run.ranks.leave()
    config = run.parts.config
    size = shard_size_for(world, config.fssdp.shard_size, config.fssdp.redundancy)
    ranks = connect(dist.FileStore(store, world), rank, world, size, sharded_layers=config.model.shard_non_experts)
    run.join(Group(ranks, local_topology(world, cuda=False)))


def steps_until(run: Training, until: int, losses: dict[int, tuple[float, float, float]]) -> None:
    while run.run_state.step < until:
        result = run.train_one().result
        losses[run.run_state.step] = (result.loss, result.aux_loss, result.grad_norm)


def die_in(phase: str) -> None:
    """Let this rank raise `Dead` in a phase of its next step."""
    wanted, left = PHASES[phase]

    def die(place: str, _subject: object) -> None:
        nonlocal left
        left -= place == wanted
        if left == 0:
            faults.arm(None)
            raise Dead

    faults.arm(die)
