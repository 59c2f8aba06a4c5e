"""The cost model of a layer in plain numpy, over arrays of all experts and ranks: what `hecate.parallel.cost.cost_loops` is held to.

Shapes: ... any leading dimensions (layers), E experts, D ranks, N nodes.
"""

from __future__ import annotations

import numpy as np

from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cost.cost_loops import DISPATCH_COLLECTIVES, LEAST_TRAFFIC
from hecate.parallel.cost.cost_model import HISTORY, ExecutionMode, LayerCost, LayerSeconds, Route, Rows
from hecate.parallel.cost.flows import Flows, flows, node_membership
from hecate.parallel.cost.gather_bytes import PortBytes
from hecate.parallel.cost.route_loops import CLEARLY_LESS
from hecate.parallel.transfer.routes import flat_moves, most_wanting, sliced_moves, slices_of, two_level_moves
from hecate.parallel.values.placement import Placement


def plain_layer_seconds(
    owner_E: np.ndarray,
    where_ED: np.ndarray,
    quota_ED: np.ndarray,
    loads_ED: np.ndarray,
    topology: Topology,
    cost: LayerCost,
    *,
    execution: ExecutionMode = HISTORY,
    flow: Flows | None = None,
    resident_ED: np.ndarray | None = None,
) -> LayerSeconds:
    """As `hecate.parallel.cost.cost_model.layer_seconds`."""
    if flow is None:
        flow = flows(loads_ED, quota_ED, topology)
    rows = plain_rows_served(flow, loads_ED, cost)
    assignments_D = quota_ED.sum(-2)
    rate_D = np.asarray(topology.flops)
    row_work = cost.row_flops * (1 + cost.row_backward)
    assignment_work = cost.assignment_flops * (1 + cost.assignment_backward)
    compute = ((rows.computed_D * row_work + assignments_D * assignment_work) / rate_D).max(-1)

    shape = where_ED.shape[:-2]
    again, reduce, fetch = np.empty(shape), np.empty(shape), np.zeros(shape)
    for layer in np.ndindex(shape):
        placement = Placement(owner_E[layer].copy(), where_ED[layer].copy())
        route = plain_route(placement, topology, cost) if execution.route == "fastest" else execution.route
        again[layer] = route_seconds(route, placement, topology, cost.trainable_bytes, cost.chunk_numel)
        if route == "flat":
            again[layer] -= (1 - cost.message_share) * route_seconds(route, placement, topology, 0.0, cost.chunk_numel)
        reduce[layer] = route_seconds(route, placement, topology, cost.reduced_bytes, cost.chunk_numel, back=True)
        if cost.frozen_bytes:
            fresh_ED = placement.where_ED if resident_ED is None else placement.where_ED & ~resident_ED[layer]
            at_owner_ED = placement.owner_E[:, None] == np.arange(topology.world_size)
            fresh = Placement(placement.owner_E, fresh_ED | at_owner_ED)
            fetch[layer] = route_seconds("flat", fresh, topology, cost.frozen_bytes, 1)
    attention = cost.non_moe_flops / rate_D.min()
    behind, slowdown = cost.non_moe_backward * attention, topology.overlap_slowdown
    hides = attention if execution.hides_gather and execution.prefetch >= cost.hidden_from else 0.0
    # Frozen parts stay, and so one step in a lifetime fetches them, and a second gather is without them.
    lifetime = cost.frozen_lifetime
    gather = ((lifetime - 1) * again + (again + fetch)) / lifetime
    exposed = ((lifetime - 1) * exposed_seconds(hides, again, slowdown) + exposed_seconds(hides, again + fetch, slowdown)) / lifetime
    if execution.rematerialize and execution.prefetch:
        exposed = exposed + exposed_seconds(behind, reduce + again, slowdown)
    else:
        exposed = exposed + exposed_seconds(behind, reduce, slowdown) + (again if execution.rematerialize else 0.0)
    owned_D = (owner_E[..., None] == np.arange(where_ED.shape[-1])).sum(-2)
    optimizer = (owned_D * (cost.reduced_bytes + 2 * cost.state_bytes) / np.asarray(topology.memory_bandwidth)).max(-1)
    asked = np.asarray(~where_ED.all((-2, -1)) & loads_ED.any((-2, -1)))
    return LayerSeconds(
        compute,
        dispatch_seconds(rows, topology, cost, asked, 1 if execution.per_micro_step else execution.micro_steps),
        gather,
        reduce,
        exposed,
        optimizer,
    )


def plain_route(placement: Placement, topology: Topology, cost: LayerCost) -> Route:
    """As `hecate.parallel.transfer.transfer_plan.fastest_route`."""
    most = most_wanting(placement, topology)
    if most < 2:
        return "flat"
    routes: list[Route] = ["flat"]
    if topology.num_nodes > 1:
        routes.append("two_level")
    if slices_of(cost.chunk_numel, most) > 1:
        routes.append("sliced")
    best: Route = "flat"
    seconds = {route: route_seconds(route, placement, topology, cost.trainable_bytes, cost.chunk_numel) for route in routes}
    for route in routes:
        if seconds[route] < CLEARLY_LESS * seconds[best]:
            best = route
    return best


def route_seconds(
    route: Route, placement: Placement, topology: Topology, chunk_bytes: float, chunk_numel: int, *, back: bool = False
) -> float:
    """A gather, or with `back` a reduction, over the moves of each of its exchanges, one after the other."""
    if route == "flat":
        exchanges, slices = [flat_moves(placement)], 1
    elif route == "two_level":
        moves, slices = two_level_moves(placement, topology), 1
        exchanges = [*(moves.reduce if back else moves.gather)]
    else:
        slices = slices_of(chunk_numel, most_wanting(placement, topology))
        _, moves = sliced_moves(placement, topology, slices)
        exchanges = [*(moves.reduce if back else moves.gather)]
    ports = [moves.ports(topology) for moves in exchanges]
    return sum(float(transfer_seconds(one.reversed() if back else one, chunk_bytes / slices, topology)) for one in ports)


def plain_rows_served(flow: Flows, loads_ED: np.ndarray, cost: LayerCost) -> Rows:
    """Distinct tokens behind the assignments. A token travels once to a rank however many of its experts are there.

    Loads do not say which assignments belong to one token. They are taken as drawn independently: c of k·T assignments of T tokens touch
    T·(1 - (1 - c/(kT))^k) tokens.
    """
    k = cost.top_k
    tokens_D = loads_ED.sum(-2) / k
    others_D = tokens_D.sum(-1, keepdims=True) - tokens_D
    near_served, far_served = flow.near_served_ED.sum(-2), flow.far_served_ED.sum(-2)
    near_sent, far_sent = flow.near_sent_ED.sum(-2), flow.far_sent_ED.sum(-2)
    remote = near_served + far_served
    received = _distinct(remote, others_D, k)
    share = _ratio(received, remote)
    mean_share = _ratio(received.sum(-1), remote.sum(-1))[..., None]
    computed = _distinct(flow.local_ED.sum(-2), tokens_D, k) + received
    return Rows(computed, (near_sent * mean_share, near_served * share), (far_sent * mean_share, far_served * share))


def dispatch_seconds(rows: Rows, topology: Topology, cost: LayerCost, asked: np.ndarray, times: int) -> np.ndarray:
    """All all-to-alls of a layer's rows in a step. Four of them carry rows, with ports in turn sending and receiving.

    Args:
        times: micro-steps whose all-to-alls pay their latencies.
        asked: bool [...]: not every expert is everywhere, so ranks ask each other what they send, also where it turns out to be nothing.
    """
    ports = PortBytes(rows.near[0], rows.near[1], rows.far[0], rows.far[1])
    once = port_seconds(ports, cost.row_bytes, topology)
    far, near = rows.far[0].sum(-1) > LEAST_TRAFFIC, rows.near[0].sum(-1) > LEAST_TRAFFIC
    to_all = max(topology.inter_node.latency, topology.exchange_latency) if topology.num_nodes > 1 else topology.exchange_latency
    latency = np.where(far, to_all, np.where(near, topology.intra_node.latency, asked * topology.exchange_latency))
    counts = np.where(far | near | asked, to_all, 0.0)
    return 4 * once + times * ((DISPATCH_COLLECTIVES - 1) * latency + counts)


def port_seconds(ports: PortBytes, unit_bytes: float, topology: Topology) -> np.ndarray:
    """Seconds until the busiest port is done, without latency; traffic counted in units of `unit_bytes`."""
    near = np.maximum(ports.near_out_D, ports.near_in_D) / np.asarray(topology.port_bandwidth)
    seconds = near.max(-1)
    if topology.num_nodes > 1:
        member_DN = node_membership(topology)
        nic = np.maximum(ports.far_out_D, ports.far_in_D) / np.asarray(topology.nic_bandwidth)
        uplink = np.maximum(ports.far_out_D @ member_DN, ports.far_in_D @ member_DN) / np.asarray(topology.uplink_bandwidth)
        seconds = np.maximum(seconds, np.maximum(nic.max(-1), uplink.max(-1)))
    return seconds * unit_bytes


def exposed_seconds(compute: float | np.ndarray, transfer: np.ndarray, slowdown: float) -> np.ndarray:
    """What a transfer beside `compute` seconds of work adds: both are slowed down while both run."""
    both = np.minimum(compute, transfer)
    return np.asarray(transfer - both + (slowdown - 1) * both)


def transfer_seconds(ports: PortBytes, unit_bytes: float, topology: Topology) -> np.ndarray:
    """Seconds of one exchange of chunks, latency included; traffic counted in units of `unit_bytes`."""
    far, near = ports.far_out_D.sum(-1) > 0, ports.near_out_D.sum(-1) > 0
    latency = np.where(far, topology.inter_node.latency, 0.0) + np.where(near, topology.intra_node.latency, 0.0)
    return port_seconds(ports, unit_bytes, topology) + latency


def _distinct(assignments: np.ndarray, tokens: np.ndarray, k: int) -> np.ndarray:
    return tokens * (1 - (1 - np.minimum(_ratio(assignments, k * tokens), 1.0)) ** k)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)
