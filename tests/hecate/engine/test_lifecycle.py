"""When replicas exist and on which ranks: freed between the forward and the backward pass, replaced after the router."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import hecate.parallel.comm.expert_store as expert_store
from hecate.engine.engine import Engine
from hecate.engine.step import MicroStep
from hecate.experts.family import ExpertReplicas
from hecate.kernels.common.assignments import RoutedTokens
from hecate.parallel.cost.cost_model import ExecutionMode
from hecate.parallel.planners import Plan, PlanInput
from hecate.parallel.values.units import Unit
from testing.ranks import run_ranks
from tests.hecate.experts.making import HIDDEN, engine, experts

LAYERS = dict.fromkeys(map(Unit, range(4)), 3)
TOKENS = 4


def forward(passed: MicroStep, rank: int, micro: int, *, ahead: int) -> torch.Tensor:
    """One layer after the other, each gathered `ahead` - 1 layers before it runs."""
    random = torch.Generator().manual_seed(10 * micro + rank)
    x = torch.randn(TOKENS, HIDDEN, generator=random, dtype=torch.float64).requires_grad_()
    for index, layer in enumerate(LAYERS):
        for coming in list(LAYERS)[index : index + ahead]:
            passed.prefetch(coming)
        expert = torch.rand(TOKENS, 3, generator=random).argsort(1)[:, :2]
        weight = torch.rand(TOKENS, 2, generator=random, dtype=torch.float64).requires_grad_()
        x = x + passed.experts(layer, x, expert, weight, torch.arange(TOKENS) + TOKENS * rank)
    return x.sum()


def step(made: Engine, rank: int, *, ahead: int = 1, micro_steps: int = 2) -> tuple[dict[tuple[int, int], torch.Tensor | None], int]:
    """Gradients of one step, by layer and expert; the most bytes of replicas."""
    begun = made.begin_step(0, micro_steps)
    for micro in range(micro_steps):
        passed = begun.begin_micro_step()
        loss = forward(passed, rank, micro, ahead=ahead)
        if made.shards.config.rematerialize:
            assert made.shards.replica_bytes == 0, "replicas outlived the forward pass"
        passed.backward(loss)
        if made.shards.config.per_micro_step:
            assert made.shards.replica_bytes == 0, "replicas outlived the backward pass"
    begun.finish()
    return {key: parameter.grad for key, parameter in made.shards.named_parameters().items()}, begun.peak_replica_bytes


def _peaks(rank: int, world: int) -> list[int]:
    plain = engine(LAYERS, "full")
    wanted, peak = step(plain, rank)
    peaks = [peak]
    for ahead in (0, 1, 2, 3):
        made = engine(LAYERS, "full")
        made.shards.config = replace(made.shards.config, rematerialize=True, prefetch=ahead)
        got, peak = step(made, rank, ahead=ahead)
        for key, grad in got.items():
            torch.testing.assert_close(grad, wanted[key], rtol=1e-12, atol=1e-12)
        peaks.append(peak)
    return peaks


@pytest.mark.parametrize("world", [1, 2])
def test_rematerialized_replicas_are_of_one_layer_or_of_those_gathered_ahead(world: int) -> None:
    one = 3 * experts(3).layout().trainable_numel * 8
    assert run_ranks(world, _peaks) == [[4 * one, one, one, 2 * one, 3 * one]] * world


def _reducing(rank: int, world: int) -> list[int]:
    """Of how many layers the gradients of replicas are there, each time that a layer's are about to be reduced, and after the pass."""
    reduce, sent, alive = expert_store.sparse_reduce_scatter, [], []

    def noted(grad_SC: torch.Tensor, *others: Any) -> Any:
        sent.append(weakref.ref(grad_SC))
        alive.append(sum(grad() is not None for grad in sent))
        return reduce(grad_SC, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_store, "sparse_reduce_scatter", noted)
        made = engine(LAYERS, "full")
        begun = made.begin_step(0, 1)
        passed = begun.begin_micro_step()
        passed.backward(forward(passed, rank, 0, ahead=1))
        alive.append(sum(grad() is not None for grad in sent))
        begun.finish()
    return alive


def test_gradients_of_replicas_go_when_the_next_layer_has_its_own() -> None:
    assert run_ranks(2, _reducing) == [[1, 2, 2, 2, 1]] * 2


def test_autograd_keeps_no_copy_of_the_replicas() -> None:
    """Or freeing the leaf's memory would free nothing."""
    family = experts(3)
    replicas = torch.randn(3, family.layout().trainable_numel, dtype=torch.float64).requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x, weight = (torch.randn(TOKENS, n, dtype=torch.float64).requires_grad_() for n in (HIDDEN, 2))
    slot = torch.tensor([[0, 1]]).expand(TOKENS, 2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        family.compute(RoutedTokens(x, slot, weight, torch.arange(TOKENS), torch.arange(3)), ExpertReplicas(replicas), step=0)
    others = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() != replicas.untyped_storage().data_ptr()]
    assert len(others) < len(kept)
    assert {len(tensor) for tensor in others} <= {TOKENS, 2 * TOKENS}, "of tokens and their assignments; there are 3 replicas"


def moving_target(asked: list[PlanInput]) -> object:
    """Experts at home and, for a layer alone, also on the rank after their owner, which serves all of their assignments."""

    def plan(given: PlanInput) -> Plan:
        asked.append(given)
        where_LED = given.owned_LED
        if given.num_layers > 1:
            return Plan(given.owner_LE, where_LED)
        next_LED = np.roll(where_LED, 1, axis=-1)
        return Plan(given.owner_LE, where_LED | next_LED, given.expected_LED.sum(-1, keepdims=True) * next_LED)

    return plan


def _replanned(rank: int, world: int, plan: str, prefetch: int, adopt: bool) -> int:
    mode = "calibrated" if prefetch else "exact"
    plain = engine(LAYERS)
    wanted, _ = step(plain, rank)
    made, asked = engine(LAYERS), []
    made.shards.config = replace(made.shards.config, plan=plan, prefetch=prefetch, planner=moving_target(asked))  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hecate.parallel.plan.after_router.calibration_gain", lambda *_: 1.0 if adopt else 0.0)
        got, _ = step(made, rank)
    for key, grad in got.items():
        torch.testing.assert_close(grad, wanted[key], rtol=1e-12, atol=1e-12)
    at_home = all((placement.where_ED.sum(1) == 1).all() for placement in made.shards.placements.values())
    assert at_home == (mode == "calibrated"), "the next micro-step starts from history's plan again"
    alone = [given for given in asked if given.num_layers == 1]
    assert len(alone) == 2 * len(LAYERS), "one plan a layer and micro-step"
    assert all(given.expected_LED.sum() == 2 * TOKENS * world for given in alone), "the micro-step's own assignments"
    loads = {layer: sum(given.loads_LED[0] for given in alone[layer.layer :: 4]) for layer in LAYERS}  # type: ignore[misc, index]
    home = [loads[layer].sum(1)[[0, 1, 2]] @ np.eye(world)[made.shards.owners[layer]] for layer in LAYERS]
    skews = [one.max() / one.mean() for one in home]
    assert made.shards.plans.imbalance(loads) == pytest.approx(np.mean(skews)), "all serve as one rank on"
    calibrations = made.shards.plans.calibrations
    made.begin_step(1, 2)
    if mode == "calibrated":
        predicted = asked[-1]
        assert predicted.expected_LED.sum() == len(LAYERS) * 2 * TOKENS * world, "half of the step's, for one of two micro-steps"
        assert predicted.execution == ExecutionMode(plan="calibrated", micro_steps=2)
        assert predicted.present_LED is not None
        assert np.array_equal(predicted.present_LED, predicted.owned_LED), "what history's plan was in the step before"
    return calibrations


@pytest.mark.parametrize(
    ("plan", "prefetch", "adopt", "calibrations"),
    [
        ("exact", 0, False, 0),
        ("exact", 1, True, 8),  # no step has shown yet that history's plan is gathered in vain
        pytest.param("calibrated", 1, True, 8, marks=pytest.mark.slow),
        pytest.param("calibrated", 1, False, 0, marks=pytest.mark.slow),
    ],
)
def test_plans_follow_the_gate(plan: str, prefetch: int, adopt: bool, calibrations: int) -> None:
    assert run_ranks(3, _replanned, plan, prefetch, adopt) == [calibrations] * 3
