"""Trainings of ranks that a test starts itself, without the launcher."""

from __future__ import annotations

import torch

from hecate.config import load_config
from hecate.parallel.cluster.mesh import make_mesh
from hecate.ranks.groups import expert_groups
from hecate.ranks.ranks import Ranks
from hecate.train.training import Training

# Five experts in two layers never share out evenly over these ranks; dropout is on.
OVERRIDES = (
    "model.dtype=float64",
    "data.eval=[]",
    "eval.generate=false",
    "moe.num_experts=5",
    "micro_batch_size=1",
    "fssdp.policy=hecate_paper",
)


def ranks_of_default_group(rank: int, world: int, shard_size: int | None = None) -> Ranks:
    return Ranks(rank, world, torch.device("cpu"), expert_groups(make_mesh(world, shard_size)))


Losses = list[tuple[float, float, float]]


def settings_of(workshop: str, name: str, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """The settings of a run, of which `overrides` outweigh `OVERRIDES`."""
    named = dict(override.split("=", 1) for override in (*OVERRIDES, *overrides))
    return *(f"{key}={value}".format(workshop=workshop) for key, value in named.items()), f"output_dir={workshop}/runs/{name}"


def train_until(rank: int, world: int, workshop: str, name: str, until: int, overrides: tuple[str, ...]) -> Losses:
    """Begin or continue a run and save at `until`; (loss, aux loss, gradient norm) of the steps done."""
    config = load_config(f"{workshop}/config.yaml", settings_of(workshop, name, overrides), claim_output=False)
    run = Training(config, ranks_of_default_group(rank, world, config.fssdp.shard_size))
    steps = []
    while run.run_state.step < until:
        result = run.train_one().result
        steps.append((result.loss, result.aux_loss, result.grad_norm))
    run.save()
    if run.parts.config.resume:
        shards = run.parts.moe.engine.shards
        owned, experts = shards.named_parameters(), [chunked.num_experts for chunked in shards.chunked.values()]
        sharing = config.fssdp.shard_size or world
        text = f"{len(owned)} of {sum(experts)} experts on one of {sharing} ranks"
        assert abs(len(owned) - sum(experts) / sharing) <= max(1, len(experts) / 2), text
    return steps
