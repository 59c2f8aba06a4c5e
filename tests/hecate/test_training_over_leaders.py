"""Training where the stores take a route over leaders, as it is predicted to be faster: they learn what flat ones learn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import hecate.parallel.comm.expert_store as store_module
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables
from hecate.parallel.cluster.topology import Link, uniform_topology
from hecate.parallel.transfer import transfer_plan
from hecate.parallel.transfer.transfer_plan import ChunkPlan, plan_chunks
from hecate.train.steps.step import StepBatches, StepRules, train_step
from testing.ranks import run_ranks
from tests.hecate import equivalence_cases as equivalence
from tests.hecate.equivalence_cases import AUX_COEF, LEARNING_RATE, MAX_NORM, MICRO_STEPS, WEIGHT_DECAY, Case, micro_batch, rows_of, sharded

STEPS = 4
CASES = [
    (2, Case("full", 8, 2, "balanced")),
    (2, Case("hecate_paper", 8, 2, "hot expert")),
    (2, Case("random 3", 8, 2, "empty rank", checkpointing=True)),
    (2, Case("static_ep", 8, 2, "idle experts")),
    (1, Case("hecate_paper", 8, 2, "hot expert")),
]
"""with the number of nodes"""


def counting(real: Callable[..., object], way: str, calls: dict[str, int]) -> Callable[..., object]:
    def counted(rows: torch.Tensor, plan: ChunkPlan, *others: object) -> object:
        if plan.route != "flat":
            calls[f"{plan.route}_{way}"] += 1
        return real(rows, plan, *others)

    return counted


def _train(
    rank: int, world: int, nodes: int, case: Case, *, flat: bool
) -> tuple[list[float], dict[tuple[int, int], torch.Tensor], dict[str, int]]:
    """Losses, owned chunks after the last step, and how often each collective took each route over leaders."""
    calls = {f"{route}_{way}": 0 for route in ("two_level", "sliced") for way in ("all_gather", "reduce_scatter")}
    plan_chunks.cache_clear()  # plans of the other route would be equal in value
    with pytest.MonkeyPatch.context() as patch:
        if nodes == 1:
            near = Link(3e7, 0.0)
            patch.setattr(equivalence, "topology", lambda world: uniform_topology(1, world, flops=1e9, memory=1e9, intra_node=near))
        for way in ("all_gather", "reduce_scatter"):
            patch.setattr(store_module, f"sparse_{way}", counting(getattr(store_module, f"sparse_{way}"), way, calls))
        if flat:
            patch.setattr(transfer_plan, "fastest_route", lambda *_: "flat")
        moe, head = sharded(case, world)
        owned = {f"{unit}.{expert}": p for (unit, expert), p in moe.engine.shards.named_parameters().items()}
        optimizer = ExpertOptimizer(
            Trainables(owned, moe.replicated_parameters()),
            AdamW(weight_decay=WEIGHT_DECAY),
            LearningRate(LEARNING_RATE),
            torch.device("cpu"),
        )
        losses = []
        for step in range(STEPS):
            batches = [micro_batch(step, micro, range(0)) for micro in range(MICRO_STEPS)]
            result = train_step(
                moe,
                head,
                optimizer,
                StepBatches(
                    number=step,
                    micro_batches=[rows_of(batch, rank, world) for batch in batches],
                    num_labels=sum(int((b.targets != -100).sum()) for b in batches),
                ),
                StepRules(aux_coef=AUX_COEF, max_grad_norm=MAX_NORM),
            )
            losses.append(result.loss)
        return losses, {key: p.detach().clone() for key, p in moe.engine.shards.named_parameters().items()}, calls


def _both_ways(rank: int, world: int) -> list[dict[str, int]]:
    calls = []
    for nodes, case in CASES:
        losses, chunks, called = _train(rank, world, nodes, case, flat=False)
        flat_losses, flat_chunks, never = _train(rank, world, nodes, case, flat=True)
        assert not any(never.values())
        assert max(abs(a - b) for a, b in zip(losses, flat_losses, strict=True)) <= 1e-12, case
        assert all(torch.allclose(chunks[key], flat_chunks[key], rtol=0, atol=1e-9) for key in flat_chunks), case
        again, chunks_again, _ = _train(rank, world, nodes, case, flat=False)
        assert again == losses
        assert all(torch.equal(chunks[key], chunks_again[key]) for key in chunks), f"{case}: not the same twice"
        calls.append(called)
    return calls


@pytest.mark.slow
def test_training_takes_the_way_over_leaders_and_learns_the_same() -> None:
    by_rank = run_ranks(4, _both_ways, timeout=240)
    assert all(calls == by_rank[0] for calls in by_rank)
    for (_, case), calls in zip(CASES, by_rank[0], strict=True):
        for way in ("two_level", "sliced"):
            assert calls[f"{way}_all_gather"] == calls[f"{way}_reduce_scatter"], case
    full, hecate, random, static_ep, in_one_node = ((calls["two_level_all_gather"], calls["sliced_all_gather"]) for calls in by_rank[0])
    assert full == (2 * STEPS, 0), "both layers, every step: each expert goes to both ranks of the other node"
    assert sum(hecate) > 0
    assert min(random) > 0, "both ways"
    assert static_ep == (0, 0), "nothing moves"
    assert in_one_node[0] == 0
    assert in_one_node[1] > 0, "the hot expert goes to all"
