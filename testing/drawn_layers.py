"""Layers drawn at random, on which planners are judged beside the named workloads: sizes, skew, clusters and slots that nobody has chosen.

A third of the layers is kept for a last look: nothing was decided by them.

Shapes: E experts, S source ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hecate.parallel.cluster.topology import Link, Topology, uniform_topology
from hecate.parallel.planners import PlanInput
from hecate.parallel.values.placement import contiguous_owners
from testing.plan_cases import MEMORY_SHARE, TOKENS, kinds, topologies

LAYERS = 1500
_SEED = 48
_EXPERTS, _TOP_K, _SLOTS = (4, 8, 16, 32, 64, 128), (1, 2, 4, 8), (1, 2, 3, 4, 6, 8, 16, 32, None)
"""None: as many slots as memory gives"""
_TOKENS = (256, 1024, 4096, 16384)
_SKEWS = ("never collapsed", "skewed", "collapsed", "few alive")


@dataclass(frozen=True, eq=False)
class DrawnLayer:
    """One layer, and how it was drawn."""

    case: dict[str, object]
    given: PlanInput


def is_kept(index: int) -> bool:
    """Whether a layer is kept for a last look."""
    return index % 3 == 2


def drawn_layer(index: int) -> DrawnLayer:
    """The layer of this number, which is the same wherever it is drawn."""
    rng = np.random.default_rng([_SEED, index])
    clusters = topologies() | _clusters()
    cluster = str(rng.choice(list(clusters)))
    topology = clusters[cluster]
    experts = int(rng.choice(_EXPERTS))
    top_k = int(rng.choice([k for k in _TOP_K if k < experts]))
    tokens = int(rng.choice(_TOKENS))
    skew = str(rng.choice(_SKEWS))
    loads_ED = _loads(rng, skew, experts, topology.world_size, tokens, top_k)
    kind = kinds(top_k)[int(rng.integers(3))]
    cost = replace(kind.cost, non_moe_flops=kind.cost.non_moe_flops * tokens / TOKENS, chunk_numel=int(kind.cost.trainable_bytes) // 2)
    slots = _SLOTS[int(rng.integers(len(_SLOTS)))]
    room_D = (MEMORY_SHARE * np.asarray(topology.memory) / cost.replica_bytes).astype(np.int64)
    slots_D = np.minimum(room_D, experts if slots is None else slots)
    case = {"cluster": cluster, "experts": experts, "top_k": top_k, "tokens": tokens, "skew": skew, "kind": kind.name, "slots": slots}
    owner_LE = contiguous_owners(experts, topology.world_size)[None]
    return DrawnLayer(case, PlanInput(owner_LE, loads_ED[None], topology, cost, slots_D))


def _clusters() -> dict[str, Topology]:
    """Clusters beside the presets: few ranks, two nodes, and eight nodes with slow links between them."""
    fast, slow = Link(3e11, 1e-5), Link(2.5e10, 2e-5)
    return {
        "1x4 slow": uniform_topology(1, 4, flops=1e14, memory=4e10, intra_node=Link(1e10, 2e-5), inter_node=Link(1e10, 2e-5)),
        "2x8": uniform_topology(2, 8, flops=4e14, memory=8e10, intra_node=fast, inter_node=Link(1e11, 2e-5)),
        "8x8": uniform_topology(8, 8, flops=4e14, memory=8e10, intra_node=fast, inter_node=slow),
    }


def _loads(rng: np.random.Generator, skew: str, experts: int, ranks: int, tokens: int, top_k: int) -> np.ndarray:
    """float64 [experts, source ranks]: whole numbers in half of the layers, and what a mean of several steps may be in the others."""
    weight_E = np.exp(rng.uniform(0.2, 0.6) * rng.standard_normal(experts))
    if skew == "skewed":
        weight_E = np.exp(rng.standard_normal(experts))
    elif skew == "collapsed":
        weight_E = rng.permutation(np.arange(1.0, experts + 1) ** -rng.uniform(1.2, 2.5))
    elif skew == "few alive":
        weight_E = weight_E * np.where(rng.permutation(experts) < max(top_k, experts // 8), 1.0, 0.02)
    weight_SE = weight_E * np.exp(rng.choice([0.0, 0.3, 1.0]) * rng.standard_normal((ranks, experts)))
    tokens_S = np.full(ranks, tokens) if rng.random() < 0.7 else rng.integers(tokens // 8, tokens + 1, ranks)
    most_SE, loads_SE = np.repeat(tokens_S[:, None], experts, 1).astype(float), np.zeros((ranks, experts))
    for _ in range(experts):  # no expert has more assignments of a rank than the rank has tokens
        left_S = tokens_S * top_k - loads_SE.sum(1)
        open_SE = np.where(loads_SE < most_SE * (1 - 1e-9), weight_SE, 0.0)
        loads_SE = np.minimum(loads_SE + left_S[:, None] * open_SE / np.maximum(open_SE.sum(1, keepdims=True), 1e-300), most_SE)
    return np.rint(loads_SE.T) if rng.random() < 0.5 else np.ascontiguousarray(loads_SE.T)
