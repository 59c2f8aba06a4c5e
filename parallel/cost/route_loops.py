"""How experts travel on each route of the collectives, how long that takes, and which route is the fastest: compiled loops.

The routes are those of `hecate.parallel.transfer.routes`; tests/parallel/plain_cost_model.py prices its moves one by one.

Shapes: E experts, D ranks.
"""

from __future__ import annotations

import numpy as np

from hecate.parallel.cost.cost_numbers import (
    FAR_IN,
    FAR_OUT,
    NEAR_IN,
    NEAR_OUT,
    CostNumbers,
    TopologyNumbers,
    port_seconds,
    transfer_latency,
)
from hecate.parallel.loops.jit import entry, loop
from hecate.parallel.loops.replica_lists import Replicas, fill_lists

FLAT, TWO_LEVEL, SLICED = range(3)
"""the routes of the collectives over experts, simplest first (see `hecate.parallel.transfer.routes`)"""
FASTEST = -1
"""instead of a route: for each placement the fastest of them"""
CLEARLY_LESS = 1 - 1e-9
"""a route's seconds over those of a simpler one from which on the difference is rounding, and the simpler route is taken"""
COPY_ROWS = 17
"""rows of an array [17, ranks] that counts the copies of a placement's replicas. The rows named below count what each rank sends or leads,
and the row after each counts what each rank receives of it."""
HOME, AWAY = 0, 2
"""copies that owners send inside their node, and to other nodes"""
LED_HOME, LED_AWAY = 4, 6
"""of those copies, the ones that a leader could send on"""
LEAD, ON = 8, 10
"""copies that owners send to leaders in other nodes, and those that leaders send to their node"""
SLICES_LEAD, SLICES_ON = 12, 14
"""slices that owners send to leaders in their own node, and those that leaders send to their node"""
SLICES_LEAD_AWAY = 16
"""slices that leaders in other nodes receive; of these there is no row of what is sent, which is `LEAD` times the slices"""


@loop
def choose_route(
    owner: np.ndarray,
    replicas: Replicas,
    most: int,
    topology: TopologyNumbers,
    cost: CostNumbers,
    copies: np.ndarray,
    ports: np.ndarray,
) -> tuple[int, int]:
    """The route of the gather and of the reduction, and into how many slices chunks are cut.

    The fastest for the gather, the simpler one of equals; where no leader would have anyone to send on to, the flat one.

    Args:
        most: see `count_copies`.
        copies: as `count_copies` has filled them; the slices' rows are filled where chunks may be sliced.
        ports: room to work in, [4, ranks].
    """
    slices = 1
    if cost.route in (FASTEST, SLICED):
        for number in range(2, most + 1):
            if cost.chunk_numel % number == 0:
                slices = number
        if slices > 1 or cost.route == SLICED:
            count_slices(owner, replicas, slices, topology, copies)
    if cost.route != FASTEST:
        return cost.route, slices
    if most < 2:
        return FLAT, 1
    best, least = FLAT, route_seconds(FLAT, 1, False, cost.trainable_bytes, topology, copies, ports)
    if len(topology.uplink_N) > 1:
        seconds = route_seconds(TWO_LEVEL, 1, False, cost.trainable_bytes, topology, copies, ports)
        if seconds < CLEARLY_LESS * least:
            best, least = TWO_LEVEL, seconds
    if slices > 1:
        seconds = route_seconds(SLICED, slices, False, cost.trainable_bytes, topology, copies, ports)
        if seconds < CLEARLY_LESS * least:
            best = SLICED
    return best, slices if best == SLICED else 1


@loop
def route_seconds(
    route: int, slices: int, back: bool, chunk_bytes: float, topology: TopologyNumbers, copies: np.ndarray, ports: np.ndarray
) -> float:
    """Seconds of a gather by a route, or with `back` of a reduction: its one exchange, or two that follow each other.

    A port's two directions are equally fast, so a reduction takes as long as copies along its moves would.
    """
    unit_bytes = chunk_bytes / slices if route == SLICED else chunk_bytes
    _exchange(route, slices, back, 0, copies, ports)
    seconds = port_seconds(ports, topology) * unit_bytes + transfer_latency(ports, topology)
    if route != FLAT:
        _exchange(route, slices, back, 1, copies, ports)
        seconds += port_seconds(ports, topology) * unit_bytes + transfer_latency(ports, topology)
    return seconds


@loop
def _exchange(route: int, slices: int, back: bool, number: int, copies: np.ndarray, ports: np.ndarray) -> None:
    """Fill `ports` [4, ranks] with the copies through each port in one exchange of a route; of slices where chunks are sliced.

    A reduction's first exchange is inside the nodes, and for those that have no leader; in its second, leaders send to the owners.
    """
    for side in range(2):  # sent, received
        near, far = ports[side], ports[2 + side]
        direct, away = copies[HOME + side], copies[AWAY + side]
        if route == FLAT:
            for d in range(len(near)):
                near[d], far[d] = direct[d], away[d]
        elif route == TWO_LEVEL:
            led, lead, on = copies[LED_AWAY + side], copies[LEAD + side], copies[ON + side]
            for d in range(len(near)):
                if number == 0:
                    near[d] = direct[d] + on[d] if back else direct[d]
                    far[d] = away[d] - led[d] if back else away[d] - led[d] + lead[d]
                else:
                    near[d], far[d] = (0.0, lead[d]) if back else (on[d], 0.0)
        else:
            led_home, led, lead_home = copies[LED_HOME + side], copies[LED_AWAY + side], copies[SLICES_LEAD + side]
            on = copies[SLICES_ON + side]
            lead, each = (copies[LEAD], float(slices)) if side == 0 else (copies[SLICES_LEAD_AWAY], 1.0)
            for d in range(len(near)):
                if number == 0:
                    near[d] = (direct[d] - led_home[d]) * slices + (on[d] if back else lead_home[d])
                    far[d] = (away[d] - led[d]) * slices + (0.0 if back else lead[d] * each)
                else:
                    near[d], far[d] = (lead_home[d], lead[d] * each) if back else (on[d], 0.0)


@loop
def all_exchanges(route: int, slices: int, copies: np.ndarray, ports: np.ndarray) -> None:
    """Fill `ports` [4, ranks] with the experts through each port in all exchanges of a gather."""
    second = np.empty(ports.shape)
    _exchange(route, slices, False, 0, copies, ports)
    if route != FLAT:
        _exchange(route, slices, False, 1, copies, second)
        each = 1.0 / slices if route == SLICED else 1.0
        for port in range(4):
            for d in range(ports.shape[1]):
                ports[port, d] = (ports[port, d] + second[port, d]) * each


@loop
def clear(ports: np.ndarray) -> None:
    for port in range(len(ports)):
        for d in range(ports.shape[1]):
            ports[port, d] = 0.0


@loop
def count_copies(owner: np.ndarray, replicas: Replicas, topology: TopologyNumbers, copies: np.ndarray) -> int:
    """Count the copies of replicas on the flat and on the two-level route; returns the most ranks of one node that lack one expert.

    Args:
        copies: zeros [17, ranks], whose rows up to SLICES_LEAD are filled.
    """
    nodes = len(topology.uplink_N)
    wanted, turn = np.zeros(nodes, np.int64), np.zeros(nodes, np.int64)
    most = 0
    for e in range(len(owner)):
        count, home = replicas.count_E[e], owner[e]
        if count == 1:
            continue
        home_node = topology.node_D[home]
        for c in range(count):
            wanted[topology.node_D[replicas.rank_EC[e, c]]] += 1
        wanted[home_node] -= 1
        for c in range(count):
            d = replicas.rank_EC[e, c]
            if d == home:
                continue
            n = topology.node_D[d]
            several = wanted[n]
            most = max(most, several)
            if n == home_node:
                copies[HOME, home] += 1
                copies[HOME + 1, d] += 1
                if several > 1:
                    copies[LED_HOME, home] += 1
                    copies[LED_HOME + 1, d] += 1
                continue
            copies[AWAY, home] += 1
            copies[AWAY + 1, d] += 1
            if several > 1:
                copies[LED_AWAY, home] += 1
                copies[LED_AWAY + 1, d] += 1
                if turn[n] == e % several:
                    copies[LEAD, home] += 1
                    copies[LEAD + 1, d] += 1
                    copies[ON, d] += several - 1
                else:
                    copies[ON + 1, d] += 1
                turn[n] += 1
        for c in range(count):
            n = topology.node_D[replicas.rank_EC[e, c]]
            wanted[n] = 0
            turn[n] = 0
    return most


@loop
def count_slices(owner: np.ndarray, replicas: Replicas, slices: int, topology: TopologyNumbers, copies: np.ndarray) -> None:
    """Count what leaders carry on the sliced route, in slices: those of an expert take turns among the ranks of a node that lack it.

    Args:
        copies: [17, ranks], whose rows from SLICES_LEAD on are zeros and are filled.
    """
    nodes = len(topology.uplink_N)
    wanted, turn = np.zeros(nodes, np.int64), np.zeros(nodes, np.int64)
    for e in range(len(owner)):
        count, home = replicas.count_E[e], owner[e]
        if count < 3:
            continue
        for c in range(count):
            wanted[topology.node_D[replicas.rank_EC[e, c]]] += 1
        wanted[topology.node_D[home]] -= 1
        for c in range(count):
            d = replicas.rank_EC[e, c]
            n = topology.node_D[d]
            several = wanted[n]
            if d == home or several < 2:
                continue
            # The first slice of the expert has the leader e * slices modulo their number.
            place = (turn[n] - e * slices) % several
            led = slices // several + (1 if place < slices % several else 0)
            if n == topology.node_D[home]:
                copies[SLICES_LEAD, home] += led
                copies[SLICES_LEAD + 1, d] += led
            else:
                copies[SLICES_LEAD_AWAY, d] += led
            copies[SLICES_ON, d] += led * (several - 1)
            copies[SLICES_ON + 1, d] += slices - led
            turn[n] += 1
        for c in range(count):
            n = topology.node_D[replicas.rank_EC[e, c]]
            wanted[n] = 0
            turn[n] = 0


@loop
def count_frozen(owner: np.ndarray, replicas: Replicas, resident: np.ndarray, topology: TopologyNumbers, ports: np.ndarray) -> None:
    """Fill `ports` [4, ranks] with the frozen parts that ranks lack, through each port: their owners send each to each.

    `resident` is bool [experts, ranks], or [0, 0] where nothing is.
    """
    clear(ports)
    for e in range(len(owner)):
        count, home = replicas.count_E[e], owner[e]
        if count == 1:
            continue
        for c in range(count):
            d = replicas.rank_EC[e, c]
            if d != home and not (len(resident) > 0 and resident[e, d]):
                near = topology.node_D[d] == topology.node_D[home]
                ports[NEAR_OUT if near else FAR_OUT, home] += 1
                ports[NEAR_IN if near else FAR_IN, d] += 1


@entry
def exchange_seconds(ports_XPD: np.ndarray, topology: TopologyNumbers, seconds_XP: np.ndarray) -> None:
    """Fill `seconds_XP` [exchanges, 2]: `port_seconds` and `transfer_latency` of each of several exchanges [exchanges, 4, ranks]."""
    for x in range(len(ports_XPD)):
        seconds_XP[x, 0] = port_seconds(ports_XPD[x], topology)
        seconds_XP[x, 1] = transfer_latency(ports_XPD[x], topology)


@entry
def fastest_routes(
    owner_LE: np.ndarray, where_LED: np.ndarray, topology: TopologyNumbers, cost: CostNumbers, replicas: Replicas, route_L: np.ndarray
) -> None:
    """Fill `route_L`, int64 [layers]: the route of each placement (see `choose_route`); `replicas` is room to work in."""
    ports = np.empty((4, len(topology.node_D)))
    for layer in range(len(owner_LE)):
        fill_lists(where_LED[layer], replicas)
        copies = np.zeros((COPY_ROWS, len(topology.node_D)))
        most = count_copies(owner_LE[layer], replicas, topology, copies)
        route_L[layer] = choose_route(owner_LE[layer], replicas, most, topology, cost, copies, ports)[0]
