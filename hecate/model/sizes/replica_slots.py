"""How many replicas of other ranks' experts a device has room for, beside all else that a training holds there.

This is what `fssdp.memory_slots: null` means on GPUs. On CPUs, whose memory the ranks of a machine share with everything else, the number
of slots is that of the experts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hecate.config import Config
from hecate.errors import UserError
from hecate.model.sizes.memory import memory_parts, owned_experts
from hecate.model.sizes.run_shape import RunShape, has_gpus, shape_on
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cluster.topology_cards import SeenTopology

_PLANNED_SHARE = 0.95
"""The share of a device's memory that is planned with; the rest is for what is not counted (docs/use/simulator.md), and for ranks that
serve more tokens than others."""


def slots_of_config(config: Config, say: Callable[[str], None] | None = None) -> Callable[[Topology], np.ndarray | None]:
    """Return the function that says for any topology of the ranks' devices what `replica_slots` says for this configuration.

    It returns None where `fssdp.memory_slots` is a number, on CPUs, and for a model whose files do not tell its sizes: as many slots as
    experts, or as the number says. Every rank that has the same files gets the same answer.

    Args:
        say: called once if the files do not tell the model's sizes.
    """
    said = False

    def slots(topology: Topology) -> np.ndarray | None:
        if config.fssdp.memory_slots is not None or not has_gpus(topology):
            return None
        try:
            return replica_slots(shape_on(config, SeenTopology(topology), config.topology))
        except UserError as error:
            nonlocal said
            if say is not None and not said:
                said = True
                say(
                    "fssdp.memory_slots: how many replicas fit into the memory is not known, so that there are as many slots as experts; "
                    f"if memory runs out, give a number\n  {str(error).splitlines()[0][:200]}"
                )
            return None

    return slots


def replica_slots(run: RunShape) -> np.ndarray:
    """Return for how many replicas of other ranks' experts each device has room in each layer, int64 [ranks].

    It is the largest number of experts of a layer on every rank if everything fits everywhere: then no token leaves its rank. Otherwise
    each rank is taken to compute as many distinct tokens as under plain expert parallelism with even loads, more than with replicas; and as
    many more as it has more tokens than the ranks have on average, since it then has more of the speed by which work is shared.
    """
    world, most = run.topology.world_size, max((group.experts for group in run.groups), default=0)
    room_D = _PLANNED_SHARE * np.asarray(run.topology.memory)
    if not run.is_gpu_D.any() or (_bytes(run, np.full(world, most), run.tokens_D) <= room_D).all():
        return np.full(world, most)
    parts = run.mesh.shard_size
    served_D = parts * (1 - (1 - 1 / parts) ** run.config.moe.experts_per_token) * np.maximum(run.tokens_D, run.tokens_D.mean())
    least_D, above_D = np.zeros(world, dtype=np.int64), np.full(world, most + 1)
    while (above_D - least_D > 1).any():
        tried_D = (least_D + above_D) // 2
        fits_D = _bytes(run, tried_D, served_D) <= room_D
        least_D, above_D = np.where(fits_D, tried_D, least_D), np.where(fits_D, above_D, tried_D)
    return least_D


def _bytes(run: RunShape, slots_D: np.ndarray, served_D: np.ndarray) -> np.ndarray:
    """Return the bytes of each rank in its fullest phase if all slots are filled, float64 [ranks].

    Args:
        served_D: distinct tokens of a micro-step that each rank computes in a layer.
    """
    foreign_GD = [group.experts * group.number - owned_experts(group, run) for group in run.groups]  # other ranks' experts in all layers
    frozen_GD = [np.minimum(slots_D * group.number, foreign_D) for group, foreign_D in zip(run.groups, foreign_GD, strict=True)]
    at_once = [group.number if run.config.fssdp.rematerialize else 1 for group in run.groups]
    others_GD = [frozen_D / number for frozen_D, number in zip(frozen_GD, at_once, strict=True)]
    return np.asarray(np.sum([part.bytes_PD for part in memory_parts(run, others_GD, served_D, frozen_GD)], axis=0).max(0))
