"""How other systems divide an expert's assignments among its replicas: rules by which each source has shares of its own.

Plans of this project leave that to their quotas: a rank serves its own assignments first, then its node's (`hecate.parallel.cost.flows`).

Shapes: ... any leading dimensions (layers), E experts, S = D ranks as sources and as destinations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hecate.parallel.cluster.topology import Topology

SplitRule = Literal["alike", "in_node", "in_order"]
"""alike: every source has the same shares, in proportion to the weights. in_node: the same over the replicas in the source's node, if
there are any, else over all. in_order: the assignments of all sources lie in a line, the lower rank's first, and each replica serves a
part of it"""

ALL_SOURCES = slice(None)


@dataclass(frozen=True, eq=False)
class SourceSplit:
    """The rule of a plan, and what it goes by."""

    rule: SplitRule
    weight_ED: np.ndarray
    """[..., experts, ranks]: alike, in_node: weights, 0 where no replica is; in_order: where on the line a replica's part begins, which is
    as long as its quota"""

    def of_layer(self, layer: int) -> SourceSplit:
        return SourceSplit(self.rule, self.weight_ED[layer])

    def shares(
        self, where_ED: np.ndarray, quota_ED: np.ndarray, planned_ED: np.ndarray, topology: Topology, sources: slice = ALL_SOURCES
    ) -> np.ndarray:
        """float64 [experts, these sources, ranks]: shares of a source's assignments of an expert that go to each rank; they sum to 1.

        Where the rule says nothing, which is of sources without assignments in a line and of experts without weights, they are those of
        topology-aware dispatch (`even_shares`).

        Args:
            where_ED: bool [experts, ranks].
            quota_ED: float64 [experts, ranks].
            planned_ED: float64 [experts, all sources]: the loads that the quotas were made for.
            sources: which are wanted. Those of all take a gigabyte where a thousand ranks have hundreds of experts.
        """
        if self.rule == "in_order":
            begin_E1D, end_E1D = self.weight_ED[:, None], (self.weight_ED + quota_ED)[:, None]
            last_ES1 = np.cumsum(planned_ED, axis=1)[:, sources, None]
            first_ES1 = last_ES1 - planned_ED[:, sources, None]
            part_ESD = np.minimum(last_ES1, end_E1D) - np.maximum(first_ES1, begin_E1D)
            # Sums of fractions are not exact, and what is only rounding must not travel.
            part_ESD = np.where(part_ESD > 1e-9 * planned_ED.sum(1)[:, None, None], part_ESD, 0.0)
            total_ES1 = part_ESD.sum(-1, keepdims=True)
        else:
            same_node_SD = topology.same_node()[sources]
            part_ESD = np.broadcast_to(self.weight_ED[:, None], (len(planned_ED), *same_node_SD.shape)).astype(np.float64)
            if self.rule == "in_node":
                near_ESD = part_ESD * same_node_SD
                part_ESD = np.where(near_ESD.sum(-1, keepdims=True) > 0, near_ESD, part_ESD)
                total_ES1 = part_ESD.sum(-1, keepdims=True)
            else:  # weights are added in the order of the ranks, so that the bits do not depend on which sources are wanted
                total_ES1 = np.cumsum(self.weight_ED, axis=-1, dtype=np.float64)[:, None, -1:]
        if (total_ES1 > 0).all():
            return np.asarray(part_ESD / total_ES1)
        return np.divide(part_ESD, total_ES1, out=even_shares(where_ED, topology, sources), where=total_ES1 > 0)


def even_shares(where_ED: np.ndarray, topology: Topology, sources: slice = ALL_SOURCES) -> np.ndarray:
    """float64 [experts, these sources, ranks]: those of topology-aware dispatch (see `hecate.parallel.cost.flows.token_split`).

    Args:
        where_ED: bool [experts, ranks], each expert somewhere.
    """
    here_ESD = where_ED[:, None] & np.eye(topology.world_size, dtype=bool)[sources]
    near_ESD = where_ED[:, None] & topology.same_node()[sources]
    anywhere_ESD = np.broadcast_to(where_ED[:, None], here_ESD.shape)
    found_ESD = np.where(near_ESD.any(-1, keepdims=True), near_ESD, anywhere_ESD)
    found_ESD = np.where(here_ESD.any(-1, keepdims=True), here_ESD, found_ESD)
    return np.asarray(found_ESD / found_ESD.sum(-1, keepdims=True))


def traffic_of_shares(share_ESD: np.ndarray, loads_ED: np.ndarray, topology: Topology) -> np.ndarray:
    """float64 [7, ranks]: what each rank sends and serves (see `price_layers`) if each source divides its assignments by these shares.

    Args:
        share_ESD: float64 [experts, sources, ranks], see `SourceSplit.shares`.
        loads_ED: float64 [experts, sources].
    """
    sent_SD = (share_ESD * loads_ED[..., None]).sum(0)
    within_SD = topology.same_node()
    near_SD, far_SD = sent_SD * (within_SD & ~np.eye(topology.world_size, dtype=bool)), sent_SD * ~within_SD
    rows = near_SD.sum(1), near_SD.sum(0), far_SD.sum(1), far_SD.sum(0), np.diagonal(sent_SD), sent_SD.sum(0), loads_ED.sum(0)
    return np.stack(rows).astype(np.float64)
