"""Plans, evaluation and idle paths of the engine; training is tested as a whole by tests/hecate/test_equivalence.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hecate.engine.engine import Engine
from hecate.experts.forward_pass import OrderError
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.mixlora.reference import mixlora_ffn_reference
from hecate.parallel.planners import POLICIES, Plan, PlanInput
from hecate.parallel.values.units import Unit
from testing.ranks import counted_all_to_alls, run_ranks
from tests.hecate.experts.making import HIDDEN, base, chunk, engine, experts

LAYERS = {0: 3, 2: 5}


def tokens(seed: int, layer: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, HIDDEN, generator=random, dtype=torch.float64)
    expert = torch.rand(count, LAYERS[layer], generator=random).argsort(1)[:, :2]
    return x, expert, torch.rand(count, 2, generator=random, dtype=torch.float64), torch.arange(count)


def wanted(layer: int, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    family = experts(LAYERS[layer], layer=layer)
    numel = family.layout().trainable_numel
    chunks = torch.stack([chunk(layer, e, numel) for e in range(LAYERS[layer])])
    pairs = family.pair_source.stacked(chunks, torch.arange(LAYERS[layer]))
    return mixlora_ffn_reference(RoutedTokens(x, expert, weight), base(), pairs)


def _evaluate(rank: int, world: int) -> int:
    made = engine(LAYERS)
    with pytest.raises(ZeroDivisionError), made.evaluation():
        raise ZeroDivisionError
    assert made.shards.replica_bytes == 0, "replicas outlived a failed evaluation"
    with made.evaluation() as evaluation:
        held = made.shards.replica_bytes
        sent = made.shards.bytes_sent
        # Each rank another number of times, in another order: any collective in here would hang or mix things up.
        for layer in [*[2, 0, 2, 2][: 1 + rank], 0]:
            x, expert, weight, token = tokens(rank, layer, 4 + rank)
            y = evaluation.experts(layer, x, expert, weight, token)
            torch.testing.assert_close(y, wanted(layer, x, expert, weight), rtol=1e-12, atol=1e-12)
        assert made.shards.bytes_sent == sent
    assert made.shards.replica_bytes == 0
    assert all(p.grad is None for p in made.shards.named_parameters().values())
    return held


@pytest.mark.parametrize("world", [1, 3])
def test_evaluating_holds_everything_and_drops_it_after(world: int) -> None:
    numel = experts(1).layout().trainable_numel
    assert run_ranks(world, _evaluate) == [sum(LAYERS.values()) * numel * 8] * world


def _started_at_once(rank: int, world: int) -> list[int]:
    """All-to-alls that begin when both layers' gathers start: ahead of a forward pass, of a backward pass, of an evaluation."""
    made = engine({Unit(layer): number for layer, number in LAYERS.items()}, "full")
    made.shards.config = replace(made.shards.config, rematerialize=True, prefetch=2)
    counts = []
    with counted_all_to_alls() as calls:
        step = made.begin_step(0)
        micro = step.begin_micro_step()
        micro.prefetch(*map(Unit, LAYERS))
        counts.append(len(calls))
        total = torch.zeros((), dtype=torch.float64)
        for layer in LAYERS:
            x, expert, weight, token = tokens(rank, layer, 4)
            y = micro.experts(Unit(layer), x.requires_grad_(), expert, weight, token)
            torch.testing.assert_close(y.detach(), wanted(layer, x.detach(), expert, weight), rtol=1e-12, atol=1e-12)
            total = total + y.sum()
        before = len(calls)
        total.register_hook(lambda _: counts.append(len(calls) - before))  # runs first in the backward pass
        micro.backward(total)
        step.finish()
        before_evaluation = len(calls)
        with made.evaluation():
            counts.append(len(calls) - before_evaluation)
    return counts


def test_small_gathers_that_start_at_once_travel_together() -> None:
    assert run_ranks(3, _started_at_once) == [[1, 1, 1]] * 3


def _idle(rank: int, world: int) -> dict[int, list[list[int]]]:
    """Rank 1 has no token, and expert 0 of each layer is chosen by nobody."""
    made = engine(LAYERS)
    step = made.begin_step(0)
    micro = step.begin_micro_step()
    total = torch.zeros((), dtype=torch.float64)
    for layer in LAYERS:
        x, expert, weight, token = tokens(0, layer, 0 if rank == 1 else 4)
        expert = torch.tensor([[1, 2]]).expand(len(x), 2)
        total = total + micro.experts(layer, x.requires_grad_(), expert, weight.requires_grad_(), token).sum()
    micro.backward(total)
    loads = step.finish()
    for (_, expert_number), parameter in made.shards.named_parameters().items():
        assert (parameter.grad is not None) == (expert_number in (1, 2)), f"expert {expert_number}"
    predicted = made.shards.history.predict([2])
    assert predicted is not None
    assert predicted[0].tolist() == loads[2].tolist()
    assert made.shards.replica_bytes == 0
    return {layer: loads_ED.T.tolist() for layer, loads_ED in loads.items()}


def test_idle_ranks_and_experts_take_part() -> None:
    """Four tokens with two assignments each, on rank 0 and on rank 2."""
    busy, idle = [0, 4, 4], [0, 0, 0]
    loads = run_ranks(3, _idle)
    assert loads[0] == loads[1] == loads[2]
    assert loads[0][0] == [busy, idle, busy]
    assert loads[0][2] == [[*busy, 0, 0], [*idle, 0, 0], [*busy, 0, 0]]


def test_a_layer_left_out_of_the_backward_pass_is_noticed(one_rank: dist.ProcessGroup) -> None:
    step = engine(LAYERS).begin_step(0)
    micro = step.begin_micro_step()
    x, expert, weight, token = tokens(0, 0, 4)
    micro.backward(micro.experts(0, x.requires_grad_(), expert, weight, token).sum())
    with pytest.raises(OrderError, match="layer 2 took no part"):
        step.finish()


def test_gradients_add_up_over_micro_steps_and_loads_are_counted_when_asked(one_rank: dist.ProcessGroup) -> None:
    """The same tokens twice, counted once (as a checkpointed layer's rerun is): twice the gradient, once the loads."""
    gradients = []
    for times in (1, 2):
        made = engine({0: 3})
        step = made.begin_step(0, times)
        for number in range(times):
            micro = step.begin_micro_step()
            x, expert, weight, token = tokens(0, 0, 6)
            counted = micro if number == 0 else micro.again()
            micro.backward(counted.experts(0, x.requires_grad_(), expert, weight, token).sum())
        assert step.finish()[0].sum() == 12
        gradients.append({key: p.grad for key, p in made.shards.named_parameters().items()})
    for key, once in gradients[0].items():
        twice = gradients[1][key]
        assert once is not None
        assert twice is not None
        torch.testing.assert_close(twice, 2 * once, rtol=1e-12, atol=1e-12)


def test_an_engine_without_expert_layers_finishes_its_steps(one_rank: dist.ProcessGroup) -> None:
    """As when only attention gets adapters (lora.target_modules: [q_proj]), which surgery allows."""
    made = engine({})
    step = made.begin_step(0)
    micro = step.begin_micro_step()
    micro.backward(torch.zeros((), requires_grad=True))
    assert step.finish() == {}
    assert made.shards.plans.imbalance({}) == 1.0


THREE = {0: 3, 2: 5, 5: 3}
"""layers of two shapes, one between the others"""
CHOSEN = {0: (1, 2), 2: (1, 2), 5: (0, 2)}
"""both assignments of every token"""


def quotas_by_layer(given: PlanInput) -> Plan:
    """Everything everywhere. Of layers with three experts the first is served by the rank after the owner, the other by rank 0."""
    where_LED = np.ones(given.owned_LED.shape, dtype=bool)
    if given.num_experts == 5:
        return Plan(given.owner_LE, where_LED)
    load_LE1 = given.expected_LED.sum(-1, keepdims=True)
    serving_L1 = np.stack([(given.owner_LE[0] + 1) % given.world_size, np.zeros(given.num_experts, dtype=np.int64)])
    return Plan(given.owner_LE, where_LED, load_LE1 * (serving_L1[..., None] == np.arange(given.world_size)))


def _step(rank: int, made: Engine, step: int) -> dict[int, np.ndarray]:
    """Four tokens on each rank."""
    begun = made.begin_step(step)
    micro = begun.begin_micro_step()
    total = torch.zeros((), dtype=torch.float64)
    for layer, count in THREE.items():
        random = torch.Generator().manual_seed(10 * rank + layer)
        x, weight = (torch.randn(4, n, generator=random, dtype=torch.float64).requires_grad_() for n in (HIDDEN, 2))
        expert = torch.tensor([CHOSEN[layer]]).expand(4, 2)
        y = micro.experts(layer, x, expert, weight, torch.arange(4) + 4 * rank)
        family = experts(count, layer=layer)
        chunks = torch.stack([chunk(layer, e, family.layout().trainable_numel) for e in range(count)])
        pairs = family.pair_source.stacked(chunks, torch.arange(count))
        torch.testing.assert_close(y, mixlora_ffn_reference(RoutedTokens(x, expert, weight), base(), pairs), rtol=1e-12, atol=1e-12)
        total = total + y.sum()
    micro.backward(total)
    return begun.finish()


def token_bytes(made: Engine) -> int:
    return made.shards.bytes_sent - sum(store.bytes_sent for store in made.shards.stores.values())


def _plans(rank: int, world: int) -> None:
    made, asked = engine(THREE), []

    def planner(given: PlanInput) -> Plan:
        asked.append(given)
        return quotas_by_layer(given) if given.loads_LED is not None else POLICIES["static_ep"](given)

    made.shards.config = replace(made.shards.config, planner=planner, top_k=2, non_moe_flops=7.0, max_imbalance=1.25)
    loads = _step(rank, made, 0)
    # Owners 0, 1, 2 of three experts and 0, 0, 1, 1, 2 of five: the chosen ones, of twelve assignments each, are on two ranks of three.
    assert made.shards.plans.imbalance(loads) == pytest.approx(1.5)
    sent = token_bytes(made)
    loads = _step(rank, made, 1)
    assert token_bytes(made) > sent, "no token left its rank"

    asked = asked[:4]  # the next step may have been planned already
    assert [given.owner_LE.tolist() for given in asked] == [[[0, 1, 2]] * 2, [[0, 0, 1, 1, 2]]] * 2
    assert [given.loads_LED is None for given in asked] == [True, True, False, False]
    for given, layers in zip(asked[2:], ([0, 5], [2]), strict=True):
        assert given.loads_LED is not None
        wanted = [[[4 * (expert in CHOSEN[layer])] * 3 for expert in range(THREE[layer])] for layer in layers]
        assert given.loads_LED.tolist() == wanted
    for given in asked:
        assert given.slots_D.tolist() == [given.num_experts] * 3
        assert given.max_imbalance == 1.25
        assert given.cost == made.shards.families[0].cost(2, 7.0)
    # Layer 0: ranks 2 and 0 serve twelve each, 12 / 8. Layer 5: rank 0 all of 24, 24 / 8. Layer 2 has no quotas: nothing moves.
    assert made.shards.plans.imbalance(loads) == pytest.approx((1.5 + 1.0 + 3.0) / 3)
    # What comes in is split as planned: rank 0's assignment of expert 1 goes to rank 2; its 3 of expert 0, which nobody foresaw, stay.
    assert made.shards.plans.imbalance({0: np.array([[3, 0, 0], [1, 0, 0], [0, 0, 0]])}) == pytest.approx(3 / (4 / 3))


def test_plans_are_made_by_shape_and_their_quotas_carried_out_by_layer() -> None:
    run_ranks(3, _plans)


def _at_home(rank: int, world: int) -> None:
    made = engine(THREE)
    made.shards.config = replace(
        made.shards.config, planner=lambda given: Plan(given.owner_LE, np.ones(given.owned_LED.shape, dtype=bool), given.expected_LED)
    )
    for step in range(2):
        _step(rank, made, step)
        assert token_bytes(made) == 0, f"step {step} asked for rows"


def test_quotas_that_leave_every_token_at_home_cost_no_message() -> None:
    """A planner that always says quotas must not make ranks exchange the numbers of rows, all zero."""
    run_ranks(2, _at_home)


def _slots(rank: int, world: int) -> None:
    made, asked = engine({0: 3}), []

    def planner(given: PlanInput) -> Plan:
        asked.append(given.slots_D.tolist())
        return POLICIES["static_ep"](given)

    made.shards.config = replace(made.shards.config, planner=planner, memory_slots=1)
    made.begin_step(0)
    assert asked == [[1] * world]


def test_slots_are_those_of_the_configuration_on_every_device() -> None:
    run_ranks(2, _slots)


def _grouped(rank: int, world: int) -> float:
    """Two groups of two: tokens of the first choose expert 0 of its place 0, those of the second expert 1 of place 1, or nothing."""
    made, asked = engine({0: 2}, shard_size=2), []
    slow = replace(
        made.shards.config.topology,
        flops=(4.0, 3.0, 2.0, 5.0),
        memory=(8.0, 6.0, 9.0, 5.0),
        node_of_rank=(0, 0, 0, 1),
        uplink_bandwidth=(1e9, 1e9),
    )

    def planner(given: PlanInput) -> Plan:
        asked.append(given)
        return POLICIES["static_ep"](given)

    made.shards.config = replace(made.shards.config, planner=planner, topology=slow, top_k=1, non_moe_flops=6.0)
    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).requires_grad_()
    for step in range(2):
        begun = made.begin_step(step)
        micro = begun.begin_micro_step()
        expert = torch.full((4 if rank < 3 else 0, 1), rank // 2)
        weight, token = torch.ones(expert.shape, dtype=torch.float64), torch.arange(len(expert))
        micro.backward(micro.experts(0, x[: len(expert)], expert, weight, token).sum())
        sent = made.shards.stores[0].bytes_sent
        loads = begun.finish()
    assert loads[0].T.tolist() == [[4, 0], [4, 0], [0, 4], [0, 0]]
    assert asked[1].expected_LED[0].T.tolist() == ([[4, 0], [4, 0]] if rank < 2 else [[0, 4], [0, 0]]), "of its own group"
    assert asked[1].topology.flops == ((4.0, 3.0) if rank < 2 else (2.0, 5.0))
    assert asked[1].cost.non_moe_flops == (9.0 if rank < 2 else 6.0), "as long on the group's slowest device as on the job's: 3 s"
    ((_, for_owners),) = made.shards.plans.inputs(for_owners=True)
    assert for_owners.expected_LED[0].T.tolist() == [[2, 2], [2, 0]]
    assert for_owners.topology.flops == (2.0, 3.0)
    (parameter,) = made.shards.named_parameters().values()
    assert parameter.grad is not None, "some group's tokens reached it"
    assert made.shards.stores[0].bytes_sent - sent == parameter.numel() * 8, "a ring of two sends each number once"
    # The last rank is on a node of its own: rank 2 of its group sends tokens and chunks across, and rank 1 sums with it.
    summed = 2 * parameter.numel() * 8
    between = {0: 0, 1: summed, 2: made.shards.bytes_sent - summed, 3: made.shards.bytes_sent}
    assert made.shards.bytes_between_nodes == between[rank]
    assert rank < 2 or made.shards.bytes_sent > summed
    return made.shards.plans.imbalance(loads)


def test_sharding_groups_plan_for_themselves_and_are_counted_together() -> None:
    # Rank 0 computes 8 of 12 assignments, a mean of 3.
    assert run_ranks(4, _grouped) == [pytest.approx(8 / 3)] * 4
