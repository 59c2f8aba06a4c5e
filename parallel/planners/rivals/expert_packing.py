"""What the rivals' policies share: how many copies each expert gets, which devices they go to, how their tokens are split.

The systems these policies come from own their memory and rearrange it at will. Here an expert never leaves its owner, and another rank
holds it in a slot. So an expert that is packed away from its owner takes a slot just as a spare copy does, and packing looks ahead: a
device's load counts the experts at home there that are still to be packed, so that slots go to moves that pay.

Shapes: L layers, E experts, B bins (devices or nodes), D ranks.
"""

from __future__ import annotations

import numpy as np

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.flows import node_index, node_membership


def spare_copies(load_LE: np.ndarray, spare: int, most: int) -> np.ndarray:
    """One copy of every expert, and `spare` more, one by one to the highest load per copy; ties to the lower index.

    An expert gets no more than `most` copies, and one without load no spare.

    Returns:
        int64 [layers, experts].
    """
    copies_LE = np.ones(load_LE.shape, dtype=np.int64)
    if most <= 1:
        return copies_LE
    # Handing out one by one is taking the largest of all loads per copy that occur on the way: they only fall.
    per_copy = load_LE[..., None] / np.arange(1, most)
    flat = per_copy.reshape(len(load_LE), -1)
    granted = np.zeros(flat.shape, dtype=bool)
    np.put_along_axis(granted, np.argsort(-flat, axis=1, kind="stable")[:, :spare], True, axis=1)
    return copies_LE + (granted & (flat > 0)).reshape(per_copy.shape).sum(-1)


def pack_copies(
    load_LE: np.ndarray,
    copies_LE: np.ndarray,
    home_LE: np.ndarray,
    slots_B: np.ndarray,
    *,
    room: int | None = None,
    allowed_LEB: np.ndarray | None = None,
) -> np.ndarray:
    """Copies by load descending, each to the least-loaded bin that lacks the expert and has room; home on ties, then by index.

    Copies without room are left out, and an expert for which there is none at all stays at home; so does one without load.

    Args:
        load_LE: float64 [layers, experts], split evenly over the copies.
        copies_LE: int64 [layers, experts], at least 1.
        home_LE: int64 [layers, experts]: the bin where the expert takes no slot.
        slots_B: int64 [bins]: how many experts that are not at home there fit.
        room: how many experts fit in a bin, at home or not; None: any number.
        allowed_LEB: bool [layers, experts, bins]: where an expert may go; None: everywhere.

    Returns:
        bool [layers, experts, bins], every expert somewhere.
    """
    layers, bins = np.arange(len(load_LE)), np.arange(len(slots_B))
    at_home_LEB = home_LE[..., None] == bins
    allowed_LEB = np.ones(at_home_LEB.shape, dtype=bool) if allowed_LEB is None else allowed_LEB
    share_LE = load_LE / copies_LE
    busy_LB = (share_LE[..., None] * (at_home_LEB & allowed_LEB)).sum(1)
    free_LB = np.tile(slots_B, (len(load_LE), 1))
    count_LB = np.zeros(busy_LB.shape, dtype=np.int64)
    where_LEB = np.zeros(at_home_LEB.shape, dtype=bool)
    for expert_L in np.argsort(-share_LE, axis=1, kind="stable").T:
        home_LB, allowed_LB = at_home_LEB[layers, expert_L], allowed_LEB[layers, expert_L]
        load_L, share_L = load_LE[layers, expert_L], share_LE[layers, expert_L]
        busy_LB -= share_L[:, None] * (home_LB & allowed_LB)
        open_LB = allowed_LB & (home_LB | ((free_LB > 0) & (load_L[:, None] > 0)))
        if room is not None:
            open_LB &= count_LB < room
        open_LB |= home_LB & ~open_LB.any(-1, keepdims=True)
        order_LB = np.lexsort((~home_LB, np.where(open_LB, busy_LB, np.inf)))
        chosen_LB = np.zeros(open_LB.shape, dtype=bool)
        np.put_along_axis(chosen_LB, order_LB, bins < copies_LE[layers, expert_L][:, None], axis=1)
        chosen_LB &= open_LB
        busy_LB += chosen_LB * (load_L / chosen_LB.sum(-1))[:, None]
        free_LB -= chosen_LB & ~home_LB
        count_LB += chosen_LB
        where_LEB[layers, expert_L] = chosen_LB
    return where_LEB


def even_split(load_LE: np.ndarray, where_LED: np.ndarray) -> np.ndarray:
    """float64 [layers, experts, ranks]: quotas that split each expert's load evenly over its replicas."""
    return where_LED * (load_LE / where_LED.sum(-1))[..., None]


def even_split_in_node(copies_ED: np.ndarray, loads_ED: np.ndarray, topology: Topology) -> np.ndarray:
    """Quotas when assignments go evenly over the copies in their own node, else over all (LAER-MoE's and its FlexMoE's routing).

    Unlike `even_quota`, a rank does not keep its own assignments, so the copies of one node serve the same.

    Args:
        copies_ED: bool, or int64 if a rank may count several times [..., experts, ranks]; each expert somewhere.
        loads_ED: float64 [..., experts, source ranks].

    Returns:
        float64 [..., experts, ranks].
    """
    member_DN = node_membership(topology)
    tokens_EN, copies_EN = loads_ED @ member_DN, copies_ED @ member_DN
    near_EN = np.divide(tokens_EN, copies_EN, out=np.zeros_like(tokens_EN), where=copies_EN > 0)
    far_E = np.where(copies_EN > 0, 0.0, tokens_EN).sum(-1) / copies_EN.sum(-1)
    return np.asarray(copies_ED * (near_EN[..., node_index(topology)] + far_E[..., None]))
