"""Dispatch and combine against a plain formula over all tokens in one process."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from hecate.parallel.comm.dispatch import combine, destinations, dispatch, positions, row_sources, sum_rows
from hecate.parallel.cost.flows import token_split
from hecate.parallel.transfer.transfer_plan import TokenPlan, plan_tokens
from hecate.parallel.values.placement import Placement
from testing.ranks import run_ranks
from testing.unit_cases import unit_topology

PAIRS = tuple(itertools.product(range(12), (False, True)))
"""seed of a case; split by quotas?"""


@st.composite
def routed_tokens(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Assignments [T, K] and a split [E, W] in which some ranks have no share."""
    experts, world = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    tokens, k = draw(st.integers(0, 40)), draw(st.integers(1, 3))
    assignments = draw(st.lists(st.integers(0, experts - 1), min_size=tokens * k, max_size=tokens * k))
    parts = st.lists(st.integers(0, 4), min_size=world, max_size=world).filter(any)
    shares = torch.tensor([draw(parts) for _ in range(experts)], dtype=torch.float64)
    return torch.tensor(assignments, dtype=torch.int64).view(tokens, k), shares / shares.sum(1, keepdim=True)


@given(routed_tokens())
def test_destinations_follow_the_split(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    expert_TK, split_EW = case
    rank_TK = destinations(expert_TK, torch.cumsum(split_EW, 1)[:, :-1])
    assert rank_TK.shape == expert_TK.shape
    assert rank_TK.dtype == torch.int64
    for expert, shares in enumerate(split_EW.tolist()):
        ranks = rank_TK[expert_TK == expert]
        assert (ranks.diff() >= 0).all(), "not in runs by rank ascending"
        for rank, share in enumerate(shares):
            count = int((ranks == rank).sum())
            assert abs(count - share * len(ranks)) <= 1 + 1e-9
            assert share > 0 or count == 0, f"rank {rank} has no share of expert {expert}"
        assert len(ranks) == sum(int((ranks == rank).sum()) for rank in range(len(shares)))


def test_destinations_by_hand() -> None:
    """Expert 0, four tokens in order: halves. Expert 1, three tokens, 1/4 and 3/4: 0.75 and 2.25 tokens, rounded to 1 and 2."""
    expert_TK = torch.tensor([[0, 1], [1, 0], [0, 1], [0, 2]])
    split_EW = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.0, 0.75], [0.0, 1.0, 0.0]], dtype=torch.float64)
    assert destinations(expert_TK, torch.cumsum(split_EW, 1)[:, :-1]).tolist() == [[0, 0], [2, 0], [1, 2], [1, 1]]


@pytest.mark.parametrize("count", [1, 7, 2**24 + 1, 2**31])
def test_the_last_of_many_assignments_lies_before_the_end(count: int) -> None:
    """Else it would be sent to a rank behind the last one with a share, whose bound is 1 but for rounding."""
    first, last = positions(torch.tensor([0, count - 1]), torch.tensor([count, count])).tolist()
    assert first == 0.5 / count
    assert last == (count - 0.5) / count < 1


def expert_output(expert: int, x: torch.Tensor) -> torch.Tensor:
    """Any function of the expert and the token that is not linear, so that each kind of gradient can be wrong."""
    return torch.tanh(x * (1 + expert)) + expert


def plain(x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    rows = []
    for x, experts, weights in zip(x_TD, expert_TK.tolist(), weight_TK, strict=True):
        rows.append(sum((w * expert_output(e, x) for e, w in zip(experts, weights, strict=True)), torch.zeros_like(x)))
    return torch.stack(rows) if rows else x_TD * 0


class Case:
    """Placement, quotas, tokens, assignments and weights of all ranks, the same on every rank."""

    def __init__(self, seed: int, world: int) -> None:
        rng = np.random.default_rng(seed)
        experts, self.k, hidden = int(rng.integers(1, 8)), int(rng.integers(1, 4)), int(rng.integers(1, 6))
        self.k = min(self.k, experts)
        owner = rng.integers(0, world, size=experts)
        where = rng.random((experts, world)) < rng.random()
        where[np.arange(experts), owner] = True
        self.placement = Placement(owner, where)
        nodes = tuple(rank * 2 // world if world > 1 else 0 for rank in range(world))
        self.topology = unit_topology(nodes)
        counts = rng.integers(0, 9, size=world)
        counts[rng.integers(world)] = 0
        if world == 1 and seed % 2:
            counts[0] = 6
        random = torch.Generator().manual_seed(seed)
        self.x = [torch.randn(n, hidden, generator=random, dtype=torch.float64) for n in counts]
        self.weight = [torch.rand(n, self.k, generator=random, dtype=torch.float64) for n in counts]
        self.expert = [
            torch.rand(n, experts, generator=random).argsort(1)[:, : self.k] if n else torch.zeros(0, self.k, dtype=torch.int64)
            for n in counts
        ]
        # Numbers beyond 32 bits, in no order.
        self.token = [(torch.arange(n) * 7 + 3 + 100 * rank + (1 << 40)).flip(0) for rank, n in enumerate(counts.tolist())]
        self.loads_ED = np.stack(
            [np.bincount(assignments.flatten().numpy(), minlength=experts).astype(float) for assignments in self.expert], axis=1
        )
        share = rng.random((experts, world)) * where * (rng.random((experts, world)) < 0.7)
        share[share.sum(1) == 0] = where[share.sum(1) == 0]
        self.quota_ED = self.loads_ED.sum(1, keepdims=True) * share / share.sum(1, keepdims=True)

    def plan(self, rank: int, quotas: bool) -> TokenPlan:
        """By topology, or by random quotas, in which an owner may have none."""
        given_ = (self.loads_ED, self.quota_ED) if quotas else (None, None)
        return plan_tokens(self.placement, token_split(self.placement.where_ED, *given_, self.topology, rank))


def run_experts(here: Any, experts_here: list[int]) -> torch.Tensor:
    # Rows and weights both stay in the graph, so that a rank without experts or rows takes part in both exchanges of the backward pass.
    y_RD = here.weight_RK.sum(1, keepdim=True) * here.x_RD * 0
    for slot, expert in enumerate(experts_here):
        weight_R = (here.weight_RK * (here.slot_RK == slot)).sum(1)
        y_RD = y_RD + weight_R[:, None] * expert_output(expert, here.x_RD)
    return y_RD


def _against_plain(rank: int, world: int) -> int:
    group = dist.group.WORLD
    assert group is not None
    for seed, quotas in PAIRS:
        case = Case(seed, world)
        x, weight = case.x[rank].clone().requires_grad_(), case.weight[rank].clone().requires_grad_()
        here = dispatch(x, case.expert[rank], weight, case.token[rank], case.plan(rank, quotas), group)
        _check_sent(here, case, rank, quotas)
        _check_received(here, case, rank, world)
        y = combine(run_experts(here, case.placement.experts_on(rank).tolist()), here, group)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        (y * direction).sum().backward()

        x_plain, weight_plain = case.x[rank].clone().requires_grad_(), case.weight[rank].clone().requires_grad_()
        y_plain = plain(x_plain, case.expert[rank], weight_plain)
        (y_plain * direction).sum().backward()
        for name, got, wanted in (("y", y, y_plain), ("dx", x.grad, x_plain.grad), ("dweight", weight.grad, weight_plain.grad)):
            if wanted is None or wanted.numel() == 0:
                assert got is None or got.numel() == 0
                continue
            assert got is not None
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12, msg=f"case {seed}, {quotas}: {name}: {got} against {wanted}")
    return len(PAIRS)


def _check_sent(here: Any, case: Case, rank: int, quotas: bool) -> None:
    """Rows leave by rank and then by token, and a token once for all of its assignments that a rank serves."""
    rank_TK = destinations(case.expert[rank], torch.from_numpy(case.plan(rank, quotas).bound_EB))
    by_peer = [[t for t, ranks in enumerate(rank_TK.tolist()) if peer in ranks] for peer in range(case.placement.world_size)]
    assert here.sources.source_M.tolist() == [token for tokens in by_peer for token in tokens]
    assert here.send_rows == [len(tokens) for tokens in by_peer]


def _check_received(here: Any, case: Case, rank: int, world: int) -> None:
    """Rows carry the right token; a token comes once; each assignment in the world is served once, where its expert is."""
    token = torch.cat(case.token).tolist()
    x, expert, weight = torch.cat(case.x), torch.cat(case.expert), torch.cat(case.weight)
    assert len(set(here.token_R.tolist())) == len(here.token_R)
    experts_here = case.placement.experts_on(rank)
    served = torch.zeros(expert.shape)
    for row, number in enumerate(here.token_R.tolist()):
        index = token.index(number)
        assert torch.equal(here.x_RD[row], x[index])
        assert torch.equal(here.weight_RK[row], weight[index])
        assert (here.slot_RK[row] >= 0).any(), "a token travelled for nothing"
        for assignment, slot in enumerate(here.slot_RK[row].tolist()):
            if slot >= 0:
                assert experts_here[slot] == expert[index, assignment]
                served[index, assignment] += 1
    assert int(served.sum()) == here.served
    dist.all_reduce(served)
    assert (served == 1).all(), "an assignment is served by no rank, or by two"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_dispatch_and_combine_equal_the_plain_formula(world: int) -> None:
    assert run_ranks(world, _against_plain) == [len(PAIRS)] * world


class Counting:
    """Counts what this rank hands to all_to_all_single for each other rank."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.bytes = rank, world, [0] * world
        self._plain = dist.all_to_all_single

    def __call__(
        self, output: torch.Tensor, sent: torch.Tensor, output_splits: Any = None, input_splits: Any = None, **keywords: Any
    ) -> Any:
        rows = [len(sent) // self.world] * self.world if input_splits is None else input_splits
        row_bytes = sent[0].numel() * sent.element_size() if len(sent) else 0
        self.bytes = [
            total + (peer != self.rank) * count * row_bytes for peer, (total, count) in enumerate(zip(self.bytes, rows, strict=True))
        ]
        return self._plain(output, sent, output_splits, input_splits, **keywords)


def _count_bytes(rank: int, world: int) -> list[int]:
    group = dist.group.WORLD
    assert group is not None
    totals = []
    for seed, quotas in PAIRS:
        case = Case(seed, world)
        for dtype in (torch.float64, torch.bfloat16):
            x = case.x[rank].to(dtype).requires_grad_()
            weight = case.weight[rank].float().requires_grad_()
            counting = Counting(rank, world)
            dist.all_to_all_single = counting  # type: ignore[assignment]
            try:
                here = dispatch(x, case.expert[rank], weight, case.token[rank], case.plan(rank, quotas), group)
                y_RO = torch.cat([here.x_RD, here.x_RD[:, :1]], dim=1) * here.weight_RK.sum(1, keepdim=True).to(dtype)
                y = combine(y_RO, here, group)  # results are wider than tokens
                assert here.bytes_to(rank, y_RO, backward=False) == counting.bytes, f"case {seed}, {quotas}, forward"
                y.sum().backward()
                assert here.bytes_to(rank, y_RO, backward=True) == counting.bytes, f"case {seed}, {quotas}, with backward"
            finally:
                dist.all_to_all_single = counting._plain
            totals.append(sum(counting.bytes))
    return totals


@pytest.mark.parametrize("world", [1, 2, 3])
def test_bytes_to_each_rank_are_those_sent_to_it(world: int) -> None:
    totals = run_ranks(world, _count_bytes)
    assert sum(map(sum, totals)) > 0 if world > 1 else totals == [[0] * 2 * len(PAIRS)]


@given(st.lists(st.integers(0, 6), max_size=30), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_rows_that_are_sorted_by_token_have_the_sums_of_rows_that_are_not(source: list[int], dtype: torch.dtype) -> None:
    """The way of a GPU, on the CPU. Token 7 has no row. In bfloat16 the sorted way rounds once, so its sum is at least as near."""
    source_M, row_MD = torch.tensor(source, dtype=torch.int64), torch.randn(len(source), 3, generator=torch.Generator().manual_seed(0))
    row_MD = row_MD.to(dtype)
    exact_TD = torch.zeros(8, 3, dtype=torch.float64).index_add_(0, source_M, row_MD.double())
    plain_TD, sorted_TD = (sum_rows(row_sources(source_M, 8, sort=sort), row_MD) for sort in (False, True))
    assert sorted_TD.shape == plain_TD.shape
    assert sorted_TD.dtype == plain_TD.dtype == dtype
    if dtype == torch.bfloat16:
        assert ((sorted_TD - exact_TD).abs() <= (plain_TD - exact_TD).abs() + 1e-12).all()
    else:
        assert torch.equal(sorted_TD, plain_TD)
