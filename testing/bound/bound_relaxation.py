"""The plans of one MoE layer that are no slower than a cutoff, relaxed to a linear program. See `testing.bound.lower_bound`.

Shapes: E experts, D ranks as destinations or sources, N nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from hecate.parallel.cost.cost_loops import DISPATCH_COLLECTIVES, distinct, exposed_seconds
from hecate.parallel.cost.cost_model import cost_numbers
from hecate.parallel.cost.flows import node_index, node_membership
from hecate.parallel.cost.route_loops import FASTEST, SLICED
from hecate.parallel.planners.plan import Plan, PlanInput
from testing.bound.linear_program import LinearProgram

Reach = Literal["everywhere", "stay", "near", "far"]
"""how far tokens travel: none leaves its rank, as each expert is on all; none does anyway; some do, none its node; some leave their node"""
Copies = Literal["any", "home", "away", "both"]
"""where replicas are: anywhere; only in their owners' nodes; only in other nodes; some in each. Each waits for other links"""
MARGIN = 1e-9
"""relative; keeps plans of exactly the cutoff in, whatever the rounding"""


class LayerProblem:
    """The only layer of a plan's input: what plans choose from and all pay. Experts without assignments count for optimizers only.

    Assignments are counted in units of an expert's mean load, and so are works and bytes per assignment: solvers like numbers near 1.
    """

    def __init__(self, given: PlanInput) -> None:
        at_owner_LED = np.where(given.owned_LED, given.expected_LED.sum(-1, keepdims=True), 0.0)
        parts = Plan(given.owner_LE, given.owned_LED, at_owner_LED).seconds(given)
        self.static = float(parts.total[0])  # of the one plan without replicas
        self.optimizer = float(parts.optimizer[0])
        loaded = given.expected_LED[0].any(1)
        loads_ED = given.expected_LED[0][loaded]
        unit = loads_ED.sum() / max(len(loads_ED), 1)
        self.topology, self.cost, self.slots_D = given.topology, given.cost, given.slots_D
        self.node_D, self.member_DN = node_index(given.topology), node_membership(given.topology)
        self.loads_ED = loads_ED / unit
        self.load_E, self.load_D = self.loads_ED.sum(1), self.loads_ED.sum(0)
        self.tokens_EN = self.loads_ED @ self.member_DN
        self.owner_E, self.owned_ED = given.owner_LE[0][loaded], given.owned_LED[0][loaded]
        self.home_ED = self.node_D[self.owner_E][:, None] == self.node_D
        self.home_EN = self.node_D[self.owner_E][:, None] == np.arange(given.topology.num_nodes)
        self.fresh_ED = ~self.owned_ED if given.resident_LED is None else ~self.owned_ED & ~given.resident_LED[0][loaded]
        self.lent_ED = ~self.owned_ED & (self.slots_D > 0)  # the replicas that there may be
        self.needed_ED = self.owned_ED | (self.loads_ED > 0)  # without these replicas some token travels
        self.may_stay = bool(((self.needed_ED & ~self.owned_ED).sum(0) <= self.slots_D).all())
        self.may_have_all = bool(((~given.owned_LED[0]).sum(0) <= self.slots_D).all())
        self.rate_D = np.asarray(given.topology.flops)
        self.row_work = given.cost.row_flops * (1 + given.cost.row_backward) * unit
        self.assignment_work = given.cost.assignment_flops * (1 + given.cost.assignment_backward) * unit
        self.row_bytes = 4 * given.cost.row_bytes * unit  # rows cross the network four times
        self.numbers = cost_numbers(given.cost, given.topology, given.execution)
        self.balanced = self.load_E.sum() * (self.row_work / given.cost.top_k + self.assignment_work) / self.rate_D.sum()

    def kinds(self, reach: Reach) -> dict[Copies, float]:
        """Where the replicas of plans of this reach may be, and the seconds that a SparseAllGather then waits for links, at least.

        Only for plans whose tokens travel and which replicate something.
        """
        intra, inter = self.topology.intra_node.latency, self.topology.inter_node.latency
        foreign = bool((self.tokens_EN[~self.home_EN] > 0).any())
        at_home, away = bool((self.lent_ED & self.home_ED).any()), bool((self.lent_ED & ~self.home_ED).any())
        # Tokens that stay in their node want a replica there of each expert that they chose. Where all tokens are in the nodes of their
        # experts' owners, some leave them only for a replica elsewhere.
        without = at_home and foreign == (reach == "far")
        possible: dict[Copies, bool] = {"home": without, "away": away, "both": at_home and away}
        seconds: dict[Copies, float] = {"home": intra, "away": inter, "both": intra + inter}
        return {kind: seconds[kind] for kind, may_be in possible.items() if may_be}


class Relaxation:
    """The plans that replicate something, are no slower than `cutoff`, whose tokens reach as far as `reach`, with replicas in `copies`, and
    whose slowest rank computes for at least `least` and at most `most` seconds.

    Where no token leaves its rank, `copies` is "any" and the slowest rank's seconds are what they are.
    """

    def __init__(
        self, problem: LayerProblem, cutoff: float, reach: Reach, copies: Copies = "any", least: float = 0.0, most: float = np.inf
    ) -> None:
        self.problem, self.cutoff, self.reach = problem, cutoff, reach
        self.slowest = least, most
        self.program = LinearProgram()
        self.devices_N = problem.member_DN.sum(0)
        self.e_E, self.r_D, self.n_N = np.arange(len(problem.load_E)), np.arange(len(problem.rate_D)), np.arange(len(self.devices_N))
        asks, to_all = problem.topology.exchange_latency, problem.topology.latency_to_all
        inside = ((DISPATCH_COLLECTIVES - 1) * asks + to_all) / DISPATCH_COLLECTIVES
        waits = {"everywhere": 0.0, "stay": inside, "near": inside, "far": to_all}
        self.stays = reach in ("everywhere", "stay")
        self.fixed = problem.optimizer + problem.numbers.dispatch_messages * waits[reach]
        self.lent_ED = problem.lent_ED & {"home": problem.home_ED, "away": ~problem.home_ED}.get(copies, True)
        # Where nothing is resident, frozen parts go where trainable ones do, in a collective of their own; the busiest port is bounded for
        # any route, and so for both.
        self.all_fresh = bool((problem.fresh_ED == ~problem.owned_ED).all())
        kinds = {} if self.stays else problem.kinds(reach)
        self.kinds = kinds if copies == "any" else {kind: seconds for kind, seconds in kinds.items() if kind == copies}
        self.fastest = max(problem.topology.port_bandwidth)
        numbers = problem.numbers
        self.cuts = problem.cost.chunk_numel > 1 and len(self.r_D) > 2 and numbers.route in (FASTEST, SLICED)
        self.whole = 0.0 if self.stays else self._whole_replica()
        latency = self._latency_of_staying() if self.stays else min(self.kinds.values(), default=0.0)
        hidden_again = numbers.second_gathers and numbers.hides_second_gather
        shared = numbers.message_share * latency
        trainable, reduced = problem.cost.trainable_bytes, problem.cost.reduced_bytes
        self.hidden_by = [
            (1.0, numbers.hides_reduce, latency + shared if hidden_again else latency, reduced + trainable if hidden_again else reduced),
            (1.0, numbers.hides_gather, shared, trainable),
        ]
        """of each exchange of experts: in which share of the steps, what it hides behind, its latency, and the bytes of each replica; the
        exchanges are the way back, the gather, the gather with frozen parts, and a second gather that nothing hides"""
        if problem.cost.frozen_bytes:
            fetched, frozen = numbers.fetched_share, problem.cost.frozen_bytes
            self.hidden_by[1] = (1.0 - fetched, *self.hidden_by[1][1:])
            fresh = (latency, frozen) if self.all_fresh else (0.0, 0.0)
            self.hidden_by.append((fetched, numbers.hides_gather, shared + fresh[0], trainable + fresh[1]))
        if numbers.second_gathers and not hidden_again:
            self.hidden_by.append((1.0, 0.0, shared, trainable))

    def least(self) -> float:
        """Seconds that none of these plans goes below; infinity if there are none."""
        p = self.problem
        travel = bool(self.kinds)
        possible = {
            "everywhere": p.may_have_all,
            "stay": p.may_stay,
            "near": travel and self.devices_N.max() > 1,
            "far": travel and len(self.devices_N) > 1,
        }
        per_byte, slowdown = self.whole / self.fastest, p.topology.overlap_slowdown
        exposed = sum(share * exposed_seconds(work, wait + nbytes * per_byte, slowdown) for share, work, wait, nbytes in self.hidden_by)
        budget = self.cutoff * (1 + MARGIN) - self.fixed - exposed
        if not possible[self.reach] or budget < p.balanced:
            return np.inf
        self._replicas()
        if self.stays:
            self.fixed += float((p.load_D * (p.row_work / p.cost.top_k + p.assignment_work) / p.rate_D).max())
        else:
            if min(budget, self.slowest[1]) < max(p.balanced, self.slowest[0]) * (1 - MARGIN):
                return np.inf
            caps = _Caps(p, budget, budget - max(p.balanced, self.slowest[0]), self.slowest[1] * (1 + MARGIN), self.reach)
            self._assignments(caps)
            self._work(caps)
            self._ports(caps)
        self._exposed()
        return self.fixed + self.cutoff * self.program.least(1.0)

    def _replicas(self) -> None:
        """z_ED: the replicas on each rank; y_EN: whether a node has any replica of an expert."""
        p, lp = self.problem, self.program
        least_ED = {"everywhere": p.owned_ED | True, "stay": p.needed_ED}.get(self.reach, p.owned_ED)
        self.z_ED = lp.variables(least_ED, p.owned_ED | self.lent_ED)
        # Tokens that stay in their node want a replica there of each expert that they chose.
        least_EN = p.home_EN | ((p.tokens_EN > 0) & (self.reach == "near"))
        self.y_EN = lp.variables(least_EN, least_EN | ((self.lent_ED @ p.member_DN) > 0))
        lp.at_most(p.slots_D, (self.z_ED, ~p.owned_ED, self.r_D))

    def _assignments(self, caps: _Caps) -> None:
        """Assignments served on each rank, by where they come from: there, its node, elsewhere; and those that leave each node."""
        p, lp, far = self.problem, self.program, self.reach == "far"
        inside_ED = p.tokens_EN[:, p.node_D]
        in_node_ED, elsewhere_ED = inside_ED - p.loads_ED, far * (p.load_E[:, None] - inside_ED)

        def most(there_are_ED: np.ndarray, cap_D: np.ndarray) -> np.ndarray:
            # Owners have no cap, or there might be nobody to serve what is left; all caps hold through the seconds anyway.
            return np.maximum(np.where(p.owned_ED, there_are_ED, np.minimum(there_are_ED, cap_D)), 0.0)

        local, near, far_ = (most(p.loads_ED, caps.local_D), most(in_node_ED, caps.remote_D), most(elsewhere_ED, caps.remote_D))
        self.local_ED, self.near_ED, self.far_ED = (lp.variables(0.0, m) for m in (local, near, far_))
        self.sent_EN = lp.variables(0.0, far * p.tokens_EN)
        # A rank serves an expert's assignments if it has a replica, and at most those that there are and that it has time for.
        z_ED, replica_ED = self.z_ED, ~p.owned_ED
        self._each(replica_ED & (local > 0), (self.local_ED, 1.0), (z_ED, -local))
        self._each(replica_ED & (near > 0), (self.near_ED, 1.0), (z_ED, -near))
        self._each(replica_ED & (far_ > 0), (self.far_ED, 1.0), (z_ED, -far_))
        # Every assignment is served somewhere.
        row_EN = np.arange(self.y_EN.size).reshape(self.y_EN.shape)
        row_ED = row_EN[:, p.node_D]
        lp.equal(p.tokens_EN, (self.local_ED, 1.0, row_ED), (self.near_ED, 1.0, row_ED), (self.sent_EN, 1.0, row_EN))
        lp.equal(0 * p.load_E, (self.sent_EN, 1.0, self.e_E[:, None]), (self.far_ED, -1.0, self.e_E[:, None]))
        if far:
            # Without a replica in a node all assignments leave it.
            keep_EN = p.tokens_EN * ~p.home_EN
            lp.at_most(-keep_EN, (self.sent_EN, -1.0 * ~p.home_EN, row_EN), (self.y_EN, -keep_EN, row_EN))
            # And it serves nobody else's.
            come_EN = np.minimum(p.load_E[:, None] - p.tokens_EN, far_ @ p.member_DN) * ~p.home_EN
            lp.at_most(0 * keep_EN, (self.far_ED, 1.0 * ~p.home_ED, row_ED), (self.y_EN, -come_EN, row_EN))

    def _work(self, caps: _Caps) -> None:
        """Seconds of computing on the slowest rank."""
        p = self.problem
        local_D = (p.row_work * caps.local_rows_D + p.assignment_work) / (p.rate_D * self.cutoff)
        remote_D = (p.row_work * caps.remote_rows_D + p.assignment_work) / (p.rate_D * self.cutoff)
        served = (self.local_ED, local_D, self.r_D), (self.near_ED, remote_D, self.r_D), (self.far_ED, remote_D, self.r_D)
        slowest = self._seconds(*self.slowest)
        self.program.at_most(0 * p.rate_D, *served, (slowest, -1.0, self.r_D))
        # With R copies beside its owner's, an expert's assignments take at least load / (rates of the R + 1 ranks). That is convex in R, so
        # the line through two neighbouring whole numbers is nowhere above it at any whole number. The same holds of several experts of one
        # owner, and of those of one node with copies in others.
        work = p.assignment_work + p.row_work * min(caps.local_rows_D.min(), caps.remote_rows_D.min())
        for owner in self.r_D:
            others_D = p.rate_D[(self.r_D != owner) & (p.slots_D > 0)]
            self._lines(p.owned_ED[:, owner], p.rate_D[owner], others_D, work, self.z_ED, slowest)
        if len(self.n_N) > 1:
            rate_N = p.rate_D @ p.member_DN
            for home in self.n_N:
                self._lines(p.home_EN[:, home], rate_N[home], np.delete(rate_N, home), work, self.y_EN, slowest)

    def _lines(self, mine_E: np.ndarray, rate: float, others: np.ndarray, work: float, copies: np.ndarray, slowest: np.ndarray) -> None:
        """For the hottest of a place's experts `mine_E`, the two hottest, ...; `copies` [experts, places], the place's own among them."""
        p = self.problem
        hottest = np.flatnonzero(mine_E)
        hottest = hottest[np.argsort(-p.load_E[hottest], kind="stable")]
        rates = rate + np.cumsum([0.0, *-np.sort(-others)])
        for number in range(1, len(hottest) + 1):
            some = hottest[:number]
            seconds = np.maximum(p.load_E[some].sum() * work / rates, p.balanced) / self.cutoff  # a floor keeps it convex
            steps = np.flatnonzero(seconds[:-1] > p.balanced / self.cutoff)
            slope = np.diff(seconds)[steps]
            row = np.arange(len(steps))[:, None]
            # R is the sum of the copies, less each expert's own one.
            self.program.at_most(
                slope * (steps + number) - seconds[steps], (copies[some].ravel(), slope[:, None], row), (slowest, -1.0, row)
            )

    def _ports(self, caps: _Caps) -> None:
        """Seconds of rows through the busiest port."""
        p, lp, r_D, n_N = self.problem, self.program, self.r_D, self.n_N
        topology, per_byte = p.topology, p.row_bytes / self.cutoff
        port_D, nic_D, uplink_N = (
            per_byte / np.asarray(b) for b in (topology.port_bandwidth, topology.nic_bandwidth, topology.uplink_bandwidth)
        )
        in_D = caps.remote_rows_D
        out = in_D.min()  # rows leave at the mean of what they arrive at
        busiest = self._seconds()
        # Assignments that leave each rank's node: those that leave the node, all told.
        sent_D = lp.variables(0.0, (self.reach == "far") * p.load_D)
        lp.equal(0.0 * n_N, (sent_D, 1.0, p.node_D), (self.sent_EN, -1.0, n_N))
        lp.at_most(-out * p.load_D * port_D, (self.local_ED, -out * port_D, r_D), (sent_D, -out * port_D, r_D), (busiest, -1.0, r_D))
        lp.at_most(0 * in_D, (self.near_ED, in_D * port_D, r_D), (busiest, -1.0, r_D))
        if self.reach == "far":
            lp.at_most(0 * in_D, (sent_D, out * nic_D, r_D), (busiest, -1.0, r_D))
            lp.at_most(0 * in_D, (self.far_ED, in_D * nic_D, r_D), (busiest, -1.0, r_D))
            lp.at_most(0 * uplink_N, (self.sent_EN, out * uplink_N, n_N), (busiest, -1.0, n_N))
            lp.at_most(0 * uplink_N, (self.far_ED, in_D * uplink_N[p.node_D], p.node_D), (busiest, -1.0, n_N))

    def _exposed(self) -> None:
        """Seconds that SparseAllGather and SparseReduceScatter add, beyond what hides."""
        p, cost, slowdown = self.problem, self.problem.cost, self.problem.topology.overlap_slowdown
        trainable = self._gather(~p.owned_ED)
        gather, back = [(trainable, cost.trainable_bytes)], [(trainable, cost.reduced_bytes)]
        hidden_again = p.numbers.second_gathers and p.numbers.hides_second_gather
        travels = [back + gather if hidden_again else back, gather]
        if cost.frozen_bytes:
            frozen = trainable if self.all_fresh else self._gather(p.fresh_ED)
            travels.append([*gather, (frozen, cost.frozen_bytes)])
        if p.numbers.second_gathers and not hidden_again:
            travels.append(gather)
        for (share, work, latency, _), traffic in zip(self.hidden_by, travels, strict=True):
            added = self._seconds()
            # Convex: while hidden, a transfer adds slowdown - 1 of itself; the rest of it, all.
            for slope, hidden in ((slowdown - 1, 0.0), (1.0, (2 - slowdown) * work)):
                terms = [(count, share * slope * nbytes / (self.fastest * self.cutoff), 0) for count, nbytes in traffic]
                self.program.at_most([share * (hidden - slope * latency) / self.cutoff], *terms, (added, -1.0, 0))

    def _gather(self, counted_ED: np.ndarray) -> np.ndarray:
        """Experts through the busiest port, for the replicas in `counted_ED`, by any route; a slow port counts as more on the fastest one.

        Two exchanges that follow each other take no less than all that goes through one port in both of them.
        """
        p, lp, r_D, n_N = self.problem, self.program, self.r_D, self.n_N
        port_D, nic_D, uplink_N = self._rates()
        whole = self.whole if (counted_ED == ~p.owned_ED).all() else 0.0  # any replica may have its frozen part already
        busiest = lp.variables(whole, counted_ED.sum() / min(*port_D, *nic_D, *uplink_N))
        home_ED, away_ED, owner_E1 = counted_ED & p.home_ED, counted_ED & ~p.home_ED, p.owner_E[:, None]
        # Whole experts leave their owner once for each replica inside its node, but slices are sent on inside it, too.
        out = [] if self.cuts else [(self.z_ED, home_ED / port_D[owner_E1], owner_E1)]
        into = [(self.z_ED, counted_ED / port_D, r_D)]
        if len(n_N) > 1:
            away_EN = ~p.home_EN & ((away_ED @ p.member_DN) > 0)
            any_EN = self.y_EN
            if (counted_ED != ~p.owned_ED).any():
                any_EN = lp.variables(0.0, away_EN)
                self._each(away_ED, (self.z_ED, 1.0), (any_EN[:, p.node_D], -1.0))
            # Experts come into a node to leaders, each at least once if the node has any replica; flat, each replica comes by itself. What
            # does not come so is handed on inside the node.
            lead_D = lp.variables(0.0, away_ED.sum(0))
            lp.at_most(0.0 * n_N, (self.z_ED, 1.0 * away_ED, p.node_D), (any_EN, -1.0 * away_EN * self.devices_N, n_N))
            lp.at_most(0.0 * n_N, (any_EN, 1.0 * away_EN, n_N), (lead_D, -1.0, p.node_D))
            lp.at_most(0.0 * r_D, (lead_D, 1.0, r_D), (self.z_ED, -1.0 * away_ED, r_D))
            into.append((lead_D, -1 / port_D, r_D))
            if not self.cuts:
                pass_D = lp.variables(0.0, np.broadcast_to(away_ED.sum(), r_D.shape))
                lp.equal(0.0 * n_N, (pass_D, 1.0, p.node_D), (lead_D, 1.0, p.node_D), (self.z_ED, -1.0 * away_ED, p.node_D))
                lp.at_most(0.0 * r_D, (pass_D, 1.0, r_D), (lead_D, 1.0 - self.devices_N[p.node_D], r_D))
                out.append((pass_D, 1 / port_D, r_D))
            lp.at_most(0.0 * r_D, (any_EN, away_EN / nic_D[owner_E1], owner_E1), (busiest, -1.0, r_D))
            lp.at_most(0.0 * r_D, (lead_D, 1 / nic_D, r_D), (busiest, -1.0, r_D))
            home_E1 = p.node_D[owner_E1]
            lp.at_most(0.0 * n_N, (any_EN, away_EN / uplink_N[home_E1], home_E1), (busiest, -1.0, n_N))
            lp.at_most(0.0 * n_N, (any_EN, away_EN / uplink_N, n_N), (busiest, -1.0, n_N))
        if out:
            lp.at_most(0.0 * r_D, *out, (busiest, -1.0, r_D))
        lp.at_most(0.0 * r_D, *into, (busiest, -1.0, r_D))
        return busiest

    def _seconds(self, least: float = 0.0, most: float = np.inf) -> np.ndarray:
        """A new part of the total, in cutoffs, between two numbers of seconds."""
        part = self.program.variables(least * (1 - MARGIN) / self.cutoff, min(most * (1 + MARGIN) / self.cutoff, 2.0))
        self.program.minimize(part, 1.0)
        return part

    def _each(self, where_ED: np.ndarray, *terms: tuple[np.ndarray, float | np.ndarray]) -> None:
        """For each pair of an expert and a rank in `where_ED`: the terms' sum is at most 0."""
        row = np.arange(where_ED.sum())
        chosen = [(v[where_ED], np.broadcast_to(c, where_ED.shape)[where_ED], row) for v, c in terms]
        self.program.at_most(0.0 * row, *chosen)

    def _rates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How fast each port, NIC and uplink is, beside the fastest port."""
        topology = self.problem.topology
        bandwidths = topology.port_bandwidth, topology.nic_bandwidth, topology.uplink_bandwidth
        port_D, nic_D, uplink_N = (np.asarray(b) / self.fastest for b in bandwidths)
        return port_D, nic_D, uplink_N

    def _whole_replica(self) -> float:
        """Experts through the busiest port, counted as in `_gather`, that the best replica comes to: there is one, and it is whole."""
        p = self.problem
        port_D, nic_D, uplink_N = self._rates()
        owner_E1, home_E1 = p.owner_E[:, None], p.node_D[p.owner_E][:, None]
        # Slices come into a node through several NICs at once.
        into_D = (p.member_DN @ (p.member_DN.T @ np.where(p.slots_D > 0, nic_D, 0.0))) if self.cuts else nic_D
        near_ED = np.minimum(port_D[owner_E1], port_D)
        far_ED = np.minimum(np.minimum(nic_D[owner_E1], into_D), np.minimum(uplink_N[home_E1], uplink_N[p.node_D]))
        home, away = (
            1 / rate_ED.max(where=self.lent_ED & there_ED, initial=0.0) if (self.lent_ED & there_ED).any() else 0.0
            for rate_ED, there_ED in ((near_ED, p.home_ED), (far_ED, ~p.home_ED))
        )
        seconds: dict[Copies, float] = {"home": home, "away": away, "both": max(home, away)}
        return min((seconds[kind] for kind in self.kinds), default=0.0)

    def _latency_of_staying(self) -> float:
        """Seconds that each such plan waits for links in a SparseAllGather, at least, where no token leaves its rank."""
        p, intra, inter = self.problem, self.problem.topology.intra_node.latency, self.problem.topology.inter_node.latency
        wanted_ED = ~p.owned_ED & (p.needed_ED | (self.reach == "everywhere"))
        far, near = (wanted_ED & ~p.home_ED).any(), (wanted_ED & p.home_ED).any()
        if far or near:
            return (inter if far else 0.0) + (intra if near else 0.0)
        kinds = (intra, self.devices_N.max() > 1), (inter, len(self.devices_N) > 1)
        return min((latency for latency, exists in kinds if exists), default=0.0)


class _Caps:
    """The most assignments that each rank can serve within a time, and the distinct tokens per assignment that follow at least."""

    def __init__(self, problem: LayerProblem, both: float, dispatch: float, compute: float, reach: Reach) -> None:
        """`both`: seconds of work, or of work and rows received; `dispatch`: of rows alone; `compute`: of work alone."""
        p, k = problem, problem.cost.top_k
        tokens_D = p.load_D / k
        others_D = np.maximum(tokens_D.sum() - tokens_D, 0.0)
        port_D = np.asarray(p.topology.port_bandwidth) + (reach == "far") * np.asarray(p.topology.nic_bandwidth)

        def seconds(rows_D: np.ndarray, assignments_D: np.ndarray) -> np.ndarray:
            return (p.row_work * rows_D + p.assignment_work * assignments_D) / p.rate_D

        def local_fits(assignments_D: np.ndarray) -> np.ndarray:
            return seconds(_distinct(assignments_D, tokens_D, k), assignments_D) <= min(both, compute)

        def remote_fits(assignments_D: np.ndarray) -> np.ndarray:
            rows_D = _distinct(assignments_D, others_D, k)
            travel_D = p.row_bytes * rows_D / port_D
            work_D = seconds(rows_D, assignments_D)
            return (work_D <= compute) & (work_D + travel_D <= both) & (travel_D <= dispatch)

        # What a rank serves is of its own experts, and of the slots' worth of others of which there are most assignments.
        self.local_D = _largest(local_fits, _held(p, p.loads_ED))
        self.remote_D = _largest(remote_fits, np.minimum(k * others_D, _held(p, p.load_E[:, None] - p.loads_ED)))
        self.local_rows_D = _chord(self.local_D, tokens_D, k)
        self.remote_rows_D = _chord(self.remote_D, others_D, k)


def _held(problem: LayerProblem, assignments_ED: np.ndarray) -> np.ndarray:
    """float64 [ranks]: the most of the assignments that belong to experts which a rank can have."""
    p = problem
    lent_ED = -np.sort(-np.where(p.owned_ED, 0.0, assignments_ED), axis=0)
    lent_ED[np.arange(len(lent_ED))[:, None] >= p.slots_D] = 0.0
    return np.maximum((p.owned_ED * assignments_ED).sum(0) + lent_ED.sum(0), 0.0)


def _largest(fits: Callable[[np.ndarray], np.ndarray], most_D: np.ndarray) -> np.ndarray:
    """For each rank the largest number, up to `most_D`, that fits; rounded up."""
    low_D, high_D = np.where(fits(most_D), most_D, 0.0), most_D
    for _ in range(50):
        middle_D = (low_D + high_D) / 2
        good_D = fits(middle_D)
        low_D, high_D = np.where(good_D, middle_D, low_D), np.where(good_D, high_D, middle_D)
    return high_D


def _distinct(assignments_D: np.ndarray, tokens_D: np.ndarray, k: int) -> np.ndarray:
    pairs = zip(assignments_D.tolist(), tokens_D.tolist(), strict=True)
    return np.array([distinct(assignments, tokens, k) for assignments, tokens in pairs])


def _chord(assignments_D: np.ndarray, tokens_D: np.ndarray, k: int) -> np.ndarray:
    """Distinct tokens per assignment at `assignments_D`; with fewer assignments there are no fewer of them per assignment."""
    return np.divide(_distinct(assignments_D, tokens_D, k), assignments_D, out=np.ones_like(assignments_D), where=assignments_D > 0)
