"""What no plan can beat: a lower bound on the seconds of one MoE layer, by linear programming.

The bound is on the very model that plans are judged by (`hecate.parallel.cost_model`), for all plans with the given owners, any replicas
within the slots and any quotas. It relaxes three things, each downwards only:

- A replica may be a fraction. A rank serves at most that fraction of what it could serve with the whole.
- The distinct tokens behind c choices are a concave function of c, from 0. On [0, cap] it is nowhere below its chord, which is linear.
- Which choices of a rank leave its node, and which rank leads, is free: only the sums over experts must fit.

*Cutoff*: plans slower than some number of seconds need no relaxation, for they are above that number. Of the others much is known, e.g.
that no rank serves more choices than it can compute in that time. So min(cutoff, relaxation of the plans below it) is a bound at any
cutoff; the best cutoff is where both are equal, and is found by bisection. Without it an expert ten times as hot as a rank can bear would
be cured by a tenth of a replica on each of ten ranks.

Shapes: E experts, D ranks as destinations or sources, N nodes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hecate.parallel.cost_model import DISPATCH_COLLECTIVES, exposed_seconds, layer_seconds
from hecate.parallel.flows import node_index, node_membership
from hecate.parallel.linear_program import LinearProgram
from hecate.parallel.planners.plan import Plan, PlanInput

ROUNDS = 6
"""bisections of the cutoff: each halves the distance of the bound from the best that this relaxation can give"""
CLOSE = 2e-3
"""relative distance at which to stop before that"""
REACHES = ("stay", "near", "far")


def lower_bound(given: PlanInput, layer: int) -> float:
    """Seconds that no plan for `layer` goes below under the given loads, as `LayerSeconds.total` counts them.

    It holds for every plan with the given owners and on each rank no more replicas of other ranks' experts than it has slots, with or
    without rematerialization. The solver's tolerances do not matter, only rounding does.

    Raises:
        UserError: scipy is not installed.
    """
    problem = _Problem(given, layer)
    if not problem.load_E.size:
        return problem.static

    known = dict.fromkeys(REACHES, 0.0)  # bounds at some cutoff hold at lower ones

    def bound(cutoff: float) -> float:
        for reach in REACHES:
            if known[reach] < cutoff:
                known[reach] = max(known[reach], _Relaxation(problem, cutoff, reach).least())
        return min(problem.static, *known.values())

    high = min(problem.static, problem.without_travel()) if problem.may_stay else problem.static
    low, points = 0.0, []
    cutoff = high
    for _ in range(ROUNDS):
        value = bound(cutoff)
        points.append((cutoff, value))
        low = max(low, min(cutoff, value))
        if value < cutoff:
            high = cutoff
        if high - low <= CLOSE * high:
            break
        cutoff = _crossing(points[-2:], low, high)
    return low


def _crossing(points: list[tuple[float, float]], low: float, high: float) -> float:
    """Where bounds and cutoffs will probably be equal, between `low` and `high`, by points (cutoff, bound)."""
    (x, v), (y, w) = points[0], points[-1]
    if x != y and np.isfinite(v + w):
        # Caps are inverse to fractions of replicas, so bounds go about as p + q / cutoff.
        q = (v - w) / (1 / x - 1 / y)
        p = v - q / x
        guess = (p + np.sqrt(max(p * p + 4 * q, 0.0))) / 2
        if low < guess < high:
            return float(guess)
    return low + (high - low) / 4


class _Problem:
    """One layer: what plans choose from, and what they all pay. Experts without choices are left out, but for their optimizers.

    Choices are counted in units of an expert's mean load, and so are works and bytes per choice: solvers like numbers near 1.
    """

    def __init__(self, given: PlanInput, layer: int) -> None:
        at_owner_LED = np.where(given.owned_LED, given.tokens_LED.sum(-1, keepdims=True), 0.0)
        parts = Plan(given.owner_LE, given.owned_LED, at_owner_LED).seconds(given)
        self.static = float(parts.total[layer])  # of the one plan without replicas
        self.optimizer = float(parts.optimizer[layer])
        loaded = given.tokens_LED[layer].any(1)
        tokens_ED = given.tokens_LED[layer][loaded]
        unit = tokens_ED.sum() / max(len(tokens_ED), 1)
        self.tokens_ED = tokens_ED / unit
        self.load_E, self.load_D = self.tokens_ED.sum(1), self.tokens_ED.sum(0)
        self.owner_E, self.owned_ED = given.owner_LE[layer][loaded], given.owned_LED[layer][loaded]
        self.fresh_ED = ~self.owned_ED if given.resident_LED is None else ~self.owned_ED & ~given.resident_LED[layer][loaded]
        self.needed_ED = self.owned_ED | (self.tokens_ED > 0)  # without these replicas some token travels
        self.slots_D = given.slots_D
        self.may_stay = bool(((self.needed_ED & ~self.owned_ED).sum(0) <= self.slots_D).all())
        lent_ED = -np.sort(-np.where(self.owned_ED, 0.0, self.tokens_ED), axis=0)
        lent_ED[np.arange(len(lent_ED))[:, None] >= self.slots_D] = 0.0
        self.most_local_D = np.where(self.owned_ED, self.tokens_ED, 0.0).sum(0) + lent_ED.sum(0)
        self.cost, self.topology = given.cost, given.topology
        self.node_D, self.member_DN = node_index(given.topology), node_membership(given.topology)
        self.home_ED = self.node_D[self.owner_E][:, None] == self.node_D
        self.rate_D = np.asarray(given.topology.flops)
        self.row_work = given.cost.row_flops * (1 + given.cost.row_backward) * unit
        self.choice_work = given.cost.choice_flops * (1 + given.cost.choice_backward) * unit
        self.row_bytes = 4 * given.cost.row_bytes * unit  # rows cross the network four times
        self.attention = given.cost.non_moe_flops / self.rate_D.min()

    def without_travel(self) -> float:
        """Seconds, about, if every choice is served where it is. A first cutoff, so it need not be exact."""
        parts = layer_seconds(
            self.owner_E, self.needed_ED, self.tokens_ED, self.tokens_ED, self.topology, self.cost, resident_ED=~self.fresh_ED
        )
        rows_D = self.load_D / self.cost.top_k
        compute = ((self.row_work * rows_D + self.choice_work * self.load_D) / self.rate_D).max()
        return float(compute + parts.exposed) + self.optimizer


class _Relaxation:
    """The plans that replicate something, are no slower than `cutoff`, and whose tokens reach as far as `reach`.

    Reach: "stay", no token leaves its rank; "near", some do, none its node; "far", some leave their node. The latency of the all-to-alls
    depends on it alone.
    """

    def __init__(self, problem: _Problem, cutoff: float, reach: str) -> None:
        self.problem, self.cutoff, self.reach = problem, cutoff, reach
        self.devices_N = problem.member_DN.sum(0)
        intra, inter = problem.topology.intra_node.latency, problem.topology.inter_node.latency
        self.fixed = problem.optimizer + DISPATCH_COLLECTIVES * {"stay": 0.0, "near": intra, "far": inter}[reach]
        self.latency = self._gather_latency(intra, inter)
        # Where nothing is resident, frozen parts take the same way as trainable ones, in a collective of their own.
        self.all_fresh = bool((problem.fresh_ED == ~problem.owned_ED).all())
        self.program = LinearProgram()
        self.pair_ED = np.arange(problem.tokens_ED.size).reshape(problem.tokens_ED.shape)
        self.expert_E, self.rank_D = np.arange(len(problem.load_E)), np.arange(len(problem.node_D))

    def least(self) -> float:
        """Seconds that none of these plans goes below; infinity if there are none."""
        p = self.problem
        possible = {"stay": p.may_stay, "near": self.devices_N.max() > 1, "far": len(self.devices_N) > 1}
        balanced = p.load_E.sum() * (p.row_work / p.cost.top_k + p.choice_work) / p.rate_D.sum()
        transfers = self._transfers_at(0.0)
        exposed = sum(float(exposed_seconds(a, np.asarray(t), p.topology.overlap_slowdown)) for a, t in transfers)
        # The margin keeps plans of exactly `cutoff` seconds in, whatever the rounding.
        budget = self.cutoff * (1 + 1e-9) - self.fixed - exposed
        if not possible[self.reach] or budget < balanced:
            return np.inf
        caps = _Caps(p, budget, budget - balanced, self.reach)
        z_ED, local_ED, served_ED = self._serving(caps)
        self._compute(local_ED, served_ED, caps)
        if self.reach != "stay":
            self._dispatch(local_ED, served_ED, caps)
        self._exposed(z_ED)
        return self.fixed + self.cutoff * self.program.least(1.0)

    def _serving(self, caps: _Caps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Replicas, and the choices that they serve: their own ranks' and others'."""
        p, lp = self.problem, self.program
        others_ED = p.load_E[:, None] - p.tokens_ED
        if self.reach == "near":
            others_ED = (p.tokens_ED @ p.member_DN)[:, p.node_D] - p.tokens_ED
        others_ED = np.maximum(others_ED, 0.0)
        if self.reach == "stay":
            most_local_ED, most_served_ED = p.tokens_ED, np.zeros_like(p.tokens_ED)
        else:
            most_local_ED = np.where(p.owned_ED, p.tokens_ED, np.minimum(p.tokens_ED, caps.local_D))
            most_served_ED = np.where(p.owned_ED, others_ED, np.minimum(others_ED, caps.remote_D))
        least_z_ED = p.needed_ED if self.reach == "stay" else p.owned_ED
        z_ED = lp.variables(least_z_ED, p.owned_ED | (p.slots_D > 0))
        local_ED = lp.variables(p.tokens_ED if self.reach == "stay" else 0.0, most_local_ED)
        served_ED = lp.variables(0.0, most_served_ED)
        lp.at_most(p.slots_D, (z_ED, ~p.owned_ED, self.rank_D))
        load_EN = p.tokens_ED @ p.member_DN
        home_EN = p.node_D[p.owner_E][:, None] == np.arange(len(self.devices_N))
        self.node_EN = lp.variables(home_EN | ((load_EN > 0) & (self.reach == "near")), 1.0)
        self._pairs(~p.home_ED, (z_ED, 1.0), (self.node_EN[:, p.node_D], -1.0))
        en = np.arange(home_EN.size).reshape(home_EN.shape)
        lp.at_most(1.0 * home_EN, (self.node_EN, 1.0, en), (z_ED, -1.0 * ~p.home_ED, en[:, p.node_D]))
        if self.reach == "stay":
            return z_ED, local_ED, served_ED
        # A rank serves no choice of an expert that is not there, and of one that is no more than there are and it has time for.
        replicas = ~p.owned_ED
        self._pairs(replicas & (most_local_ED > 0), (local_ED, 1.0), (z_ED, -most_local_ED))
        self._pairs(replicas & (most_served_ED > 0), (served_ED, 1.0), (z_ED, -most_served_ED))
        self._covers(z_ED, np.minimum(most_local_ED + most_served_ED, caps.both_D), caps)
        both = replicas & (most_local_ED + most_served_ED > caps.both_D)
        self._pairs(both, (local_ED, 1.0), (served_ED, 1.0), (z_ED, -caps.both_D + 0 * most_local_ED))
        return z_ED, local_ED, served_ED

    def _covers(self, z_ED: np.ndarray, most_ED: np.ndarray, caps: _Caps) -> None:
        p = self.problem
        share_ED = -np.sort(-np.where(p.owned_ED, 0.0, most_ED), axis=1)  # of the best replicas, the first first
        share_ED = np.diff(np.minimum(np.cumsum(share_ED, axis=1), p.load_E[:, None]), axis=1, prepend=0.0)
        surplus_E = p.load_E - caps.both_D[p.owner_E]
        number_E = np.array([_fewest(share_D, surplus) for share_D, surplus in zip(share_ED, surplus_E, strict=True)])
        self.program.at_most(-number_E, (z_ED, -1.0 * ~p.owned_ED, self.expert_E[:, None]))
        surplus_D = p.owned_ED.T @ p.load_E - caps.both_D
        number_D = np.array([_fewest(share_ED[p.owned_ED[:, d]], surplus) for d, surplus in enumerate(surplus_D)])
        self.program.at_most(-number_D, (z_ED, -1.0 * ~p.owned_ED, p.owner_E[:, None]))

    def _pairs(self, where_ED: np.ndarray, *terms: tuple[np.ndarray, float | np.ndarray]) -> None:
        """For each pair of an expert and a rank in `where_ED`: the terms' sum is at most 0."""
        rows = np.arange(where_ED.sum())
        self.program.at_most(
            np.zeros(len(rows)), *((v[where_ED], np.broadcast_to(c, where_ED.shape)[where_ED], rows) for v, c in terms)
        )

    def _compute(self, local_ED: np.ndarray, served_ED: np.ndarray, caps: _Caps) -> None:
        p = self.problem
        slowest = self._seconds()
        local_D = (p.row_work * caps.local_rows_D + p.choice_work) / (p.rate_D * self.cutoff)
        remote_D = (p.row_work * caps.remote_rows_D + p.choice_work) / (p.rate_D * self.cutoff)
        self.program.at_most(
            np.zeros(len(p.rate_D)), (local_ED, local_D, self.rank_D), (served_ED, remote_D, self.rank_D), (slowest, -1.0, self.rank_D)
        )

    def _dispatch(self, local_ED: np.ndarray, served_ED: np.ndarray, caps: _Caps) -> None:
        p, lp = self.problem, self.program
        busiest = self._seconds()
        topology = p.topology
        experts, ranks = p.tokens_ED.shape
        load_EN = p.tokens_ED @ p.member_DN
        nodes = load_EN.shape[1]
        far = self.reach == "far"
        en_EN = np.arange(experts * nodes).reshape(experts, nodes)
        en_ED = en_EN[:, p.node_D]
        sent_EN = lp.variables(0.0, load_EN if far else np.zeros_like(load_EN))
        got_EN = lp.variables(0.0, np.maximum(p.load_E[:, None] - load_EN, 0.0) if far else np.zeros_like(load_EN))
        sent_D = lp.variables(0.0, p.load_D if far else 0 * p.load_D)
        got_D = lp.variables(0.0, p.load_E.sum() if far else 0 * p.load_D)
        # What a node's ranks serve is what they have, less what leaves the node, more what comes in.
        lp.equal(load_EN, (local_ED, 1.0, en_ED), (served_ED, 1.0, en_ED), (sent_EN, 1.0, en_EN), (got_EN, -1.0, en_EN))
        if far:
            lp.equal(np.zeros(experts), (sent_EN, 1.0, self.expert_E[:, None]), (got_EN, -1.0, self.expert_E[:, None]))
            # Only what is not served at its source leaves the node.
            lp.at_most(load_EN, (local_ED, 1.0, en_ED), (sent_EN, 1.0, en_EN))
            lp.equal(np.zeros(nodes), (sent_D, 1.0, p.node_D), (sent_EN, -1.0, np.arange(nodes)))
            lp.equal(np.zeros(nodes), (got_D, 1.0, p.node_D), (got_EN, -1.0, np.arange(nodes)))
            lp.at_most(p.load_D, (local_ED, 1.0, self.rank_D), (sent_D, 1.0, self.rank_D))
            lp.at_most(np.zeros(ranks), (got_D, 1.0, self.rank_D), (served_ED, -1.0, self.rank_D))
        if far:
            away_EN = p.node_D[p.owner_E][:, None] != np.arange(nodes)
            both_N = caps.both_D @ p.member_DN
            most_in_EN = np.minimum(load_EN, both_N)
            most_got_EN = np.minimum(p.load_E[:, None] - load_EN, caps.remote_D @ p.member_DN)
            rows = np.arange(away_EN.sum())
            y = self.node_EN[away_EN]
            lp.at_most(-load_EN[away_EN], (sent_EN[away_EN], -1.0, rows), (y, -most_in_EN[away_EN], rows))
            lp.at_most(0.0 * rows, (got_EN[away_EN], 1.0, rows), (y, -most_got_EN[away_EN], rows))
            tight = away_EN & (most_in_EN + most_got_EN > both_N)
            rows = np.arange(tight.sum())
            lp.at_most(-load_EN[tight], (sent_EN[tight], -1.0, rows), (got_EN[tight], 1.0, rows), (self.node_EN[tight], -(both_N+0*load_EN)[tight], rows))
        out = caps.remote_rows_D.min() * p.row_bytes / self.cutoff
        in_D = caps.remote_rows_D * p.row_bytes / self.cutoff
        port_D, nic_D = np.asarray(topology.port_bandwidth), np.asarray(topology.nic_bandwidth)
        uplink_N = np.asarray(topology.uplink_bandwidth)
        r = self.rank_D
        lp.at_most(-out * p.load_D / port_D, (local_ED, -out / port_D, r), (sent_D, -out / port_D, r), (busiest, -1.0, r))
        lp.at_most(0 * port_D, (served_ED, in_D / port_D, r), (got_D, -in_D / port_D, r), (busiest, -1.0, r))
        if far:
            n = np.arange(nodes)
            lp.at_most(0 * nic_D, (sent_D, out / nic_D, r), (busiest, -1.0, r))
            lp.at_most(0 * nic_D, (got_D, in_D / nic_D, r), (busiest, -1.0, r))
            lp.at_most(0 * uplink_N, (sent_D, out / uplink_N[p.node_D], p.node_D), (busiest, -1.0, n))
            lp.at_most(0 * uplink_N, (got_D, in_D / uplink_N[p.node_D], p.node_D), (busiest, -1.0, n))

    def _exposed(self, z_ED: np.ndarray) -> None:
        p, cost, lp = self.problem, self.problem.cost, self.program
        trainable = self._gather(z_ED, ~p.owned_ED)
        frozen = trainable
        if cost.frozen_bytes and not self.all_fresh:
            frozen = self._gather(z_ED, p.fresh_ED)
        s = p.topology.overlap_slowdown
        gather = [(trainable, cost.trainable_bytes), (frozen, cost.frozen_bytes / cost.frozen_lifetime)]
        reduce = [(trainable, cost.reduced_bytes)]
        for (compute, latency), ports in zip(self._transfers_at(0.0), (gather, reduce), strict=True):
            added = self._seconds()
            # Convex: hidden, a transfer adds slowdown - 1 of itself; beyond that all of itself, less what was hidden.
            for slope, offset in ((s - 1, 0.0), (1.0, (2 - s) * compute)):
                terms = [(g, slope * b * self.per_byte / self.cutoff, 0) for g, b in ports]
                lp.at_most([(offset - slope * latency) / self.cutoff], *terms, (added, -1.0, 0))

    @property
    def per_byte(self) -> float:
        return 1 / max(self.problem.topology.port_bandwidth)

    def _gather(self, z_ED: np.ndarray, counted_ED: np.ndarray) -> np.ndarray:
        """Experts through the busiest port, over the port's bandwidth relative to the fastest rank's, for replicas in `counted_ED`."""
        p, lp, r = self.problem, self.program, self.rank_D
        topology = p.topology
        experts, ranks = counted_ED.shape
        nodes = len(self.devices_N)
        fastest = max(topology.port_bandwidth)
        port_D, nic_D = np.asarray(topology.port_bandwidth) / fastest, np.asarray(topology.nic_bandwidth) / fastest
        uplink_N = np.asarray(topology.uplink_bandwidth) / fastest
        most = counted_ED.sum() / min(port_D.min(), *((nic_D.min(), uplink_N.min()) if nodes > 1 else (port_D.min(),)))
        busiest = lp.variables(0.0, most)
        near_ED, far_ED = counted_ED & p.home_ED, counted_ED & ~p.home_ED
        owner_ED = np.broadcast_to(p.owner_E[:, None], counted_ED.shape)
        out = [(z_ED, near_ED / port_D[p.owner_E][:, None], owner_ED)]
        into = [(z_ED, counted_ED / port_D, r)]
        if nodes > 1:
            count_D = far_ED.sum(0)
            wants_EN = far_ED @ p.member_DN > 0
            if (counted_ED == ~p.owned_ED).all():
                any_EN = self.node_EN
            else:
                any_EN = lp.variables(0.0, wants_EN)
                self._pairs(far_ED, (z_ED, 1.0), (any_EN[:, p.node_D], -1.0))
            away_EN = p.node_D[p.owner_E][:, None] != np.arange(nodes)
            # Of them, how many does each rank receive for its node, and how often does it hand one on?
            lead_D = lp.variables(0.0, count_D)
            pass_D = lp.variables(0.0, count_D.sum())
            n = np.arange(nodes)
            lp.equal(np.zeros(nodes), (lead_D, 1.0, p.node_D), (any_EN, -1.0 * away_EN, n))
            lp.at_most(np.zeros(ranks), (lead_D, 1.0, r), (z_ED, -1.0 * far_ED, r))
            lp.equal(np.zeros(nodes), (pass_D, 1.0, p.node_D), (any_EN, 1.0 * away_EN, n), (z_ED, -1.0 * far_ED, p.node_D))
            lp.at_most(np.zeros(ranks), (pass_D, 1.0, r), (lead_D, 1.0 - self.devices_N[p.node_D], r))
            out.append((pass_D, 1 / port_D, r))
            into.append((lead_D, -1 / port_D, r))
            owner_EN = np.broadcast_to(p.owner_E[:, None], wants_EN.shape)
            home_EN = p.node_D[owner_EN]
            lp.at_most(0 * nic_D, (any_EN, away_EN / nic_D[owner_EN], owner_EN), (busiest, -1.0, r))
            lp.at_most(0 * nic_D, (lead_D, 1 / nic_D, r), (busiest, -1.0, r))
            lp.at_most(0 * uplink_N, (any_EN, away_EN / uplink_N[home_EN], home_EN), (busiest, -1.0, n))
            lp.at_most(0 * uplink_N, (any_EN, away_EN / uplink_N, n), (busiest, -1.0, n))
        lp.at_most(0 * port_D, *out, (busiest, -1.0, r))
        lp.at_most(0 * port_D, *into, (busiest, -1.0, r))
        return busiest

    def _seconds(self) -> np.ndarray:
        """A new part of the total, in cutoffs."""
        part = self.program.variables(0.0, 2.0)
        self.program.minimize(part, 1.0)
        return part

    def _transfers_at(self, seconds: float) -> list[tuple[float, float]]:
        p = self.problem
        twice = 2 if p.cost.frozen_bytes and self.all_fresh else 1
        return [(p.attention, seconds + twice * self.latency), (2 * p.attention, seconds + self.latency)]

    def _gather_latency(self, intra: float, inter: float) -> float:
        """Seconds that every such plan waits for a SparseAllGather at least."""
        p = self.problem
        if self.reach == "stay":
            wanted_ED = p.needed_ED & ~p.owned_ED
            copies_EN = (wanted_ED & ~p.home_ED) @ p.member_DN
            far, near = copies_EN.any(), (wanted_ED & p.home_ED).any() or (copies_EN > 1).any()
        else:
            # Tokens that stay in their nodes want each expert in each node that has choices of it.
            far, near = self.reach == "near" and (p.tokens_ED[~p.home_ED] > 0).any(), False
        if far or near:
            return (inter if far else 0.0) + (intra if near else 0.0)
        kinds = ((intra, self.devices_N.max() > 1), (inter, len(self.devices_N) > 1))
        return min((latency for latency, exists in kinds if exists), default=0.0)


class _Caps:
    """The most choices that each rank can serve within a time, and the distinct tokens per choice that follow at least."""

    def __init__(self, problem: _Problem, compute: float, dispatch: float, reach: str) -> None:
        p, k = problem, problem.cost.top_k
        tokens_D = p.load_D / k
        others_D = np.maximum(tokens_D.sum() - tokens_D, 0.0)
        port_D = np.asarray(p.topology.port_bandwidth) + (np.asarray(p.topology.nic_bandwidth) if reach == "far" else 0.0)

        def seconds(rows_D: np.ndarray, choices_D: np.ndarray) -> np.ndarray:
            return (p.row_work * rows_D + p.choice_work * choices_D) / p.rate_D

        def local_fits(choices_D: np.ndarray) -> np.ndarray:
            return seconds(_distinct(choices_D, tokens_D, k), choices_D) <= compute

        def remote_fits(choices_D: np.ndarray) -> np.ndarray:
            rows_D = _distinct(choices_D, others_D, k)
            travel_D = p.row_bytes * rows_D / port_D
            return (seconds(rows_D, choices_D) + travel_D <= compute) & (travel_D <= dispatch)

        def both_fit(choices_D: np.ndarray) -> np.ndarray:
            # A sum of concave functions is least at an end: as many local ones as there can be, or as many remote ones.
            ends = []
            for first_D, second_D in ((tokens_D, others_D), (others_D, tokens_D)):
                rest_D = np.maximum(choices_D - k * first_D, 0.0)
                ends.append(_distinct(choices_D - rest_D, first_D, k) + _distinct(rest_D, second_D, k))
            return seconds(np.minimum(*ends), choices_D) <= compute

        self.local_D = _largest(local_fits, p.most_local_D)
        self.remote_D = _largest(remote_fits, k * others_D)
        self.both_D = _largest(both_fit, k * (tokens_D + others_D))
        self.local_rows_D = _chord(self.local_D, tokens_D, k)
        self.remote_rows_D = _chord(self.remote_D, others_D, k)


def _largest(fits: Callable[[np.ndarray], np.ndarray], most_D: np.ndarray) -> np.ndarray:
    """For each rank the largest number, up to `most_D`, that fits; rounded up."""
    low_D, high_D = np.zeros_like(most_D), most_D.copy()
    low_D = np.where(fits(high_D), high_D, low_D)
    for _ in range(50):
        middle_D = (low_D + high_D) / 2
        good_D = fits(middle_D)
        low_D, high_D = np.where(good_D, middle_D, low_D), np.where(good_D, high_D, middle_D)
    return high_D


def _fewest(shares: np.ndarray, needed: float) -> int:
    """How many of the shares it takes to reach what is needed."""
    total = np.cumsum(-np.sort(-shares.ravel()))
    return int((total < needed * (1 - 1e-9)).sum()) + 1 if needed > 0 else 0


def _distinct(choices: np.ndarray, tokens: np.ndarray, k: int) -> np.ndarray:
    share = np.divide(choices, k * tokens, out=np.zeros_like(choices), where=tokens > 0)
    return tokens * (1 - (1 - np.minimum(share, 1.0)) ** k)


def _chord(choices: np.ndarray, tokens: np.ndarray, k: int) -> np.ndarray:
    """Distinct tokens per choice at `choices` of them: at fewer choices there are no fewer."""
    return np.divide(_distinct(choices, tokens, k), choices, out=np.full_like(choices, 1 / k), where=choices > 0)
