"""Full experts and LoRA over frozen experts, sharded over any ranks under any policy, are the same computation as one process.

Each rank trains its share of the tokens of a stack of bare layers, router and experts, and trains all tokens with plain autograd, from the
same values. In the midst there are an evaluation and a move to other owners.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.elastic.move_experts import move_experts
from hecate.engine.engine import Engine
from hecate.engine.shards import ExpertShards
from hecate.engine.step_plans import EngineConfig
from hecate.experts.family import ExpertFamily, Site
from hecate.experts.full import FullExperts
from hecate.experts.moe_lora import MoeLoraExperts
from hecate.experts.pairs.sources.plain import PlainPairs
from hecate.kernels.common.assignments import RoutedTokens
from hecate.kernels.common.dropout import Dropout, dropout_key
from hecate.kernels.common.ffn import FfnShape
from hecate.kernels.experts.reference import full_ffn_reference, moe_lora_ffn_reference
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables, owned_parameters
from hecate.parallel.planners import POLICIES
from hecate.parallel.values.expert_kinds import FfnSizes, LoraShape
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import ExpertGroups
from testing.ranks import run_ranks
from tests.hecate.engine.planning_ahead import plans_ahead, plans_of, steps_planned
from tests.hecate.equivalence_cases import random_planner, topology

SHAPE = FfnShape(hidden=6, ffn=10, activation="silu")
LAYERS, EXPERTS, TOP_K, TOKENS = (0, 3), 5, 2, 18
STEPS, MICRO_STEPS, EVALUATED, MOVED = 5, 2, 1, 2
"""an evaluation after step 1, a move after step 2"""
SEED, DROPOUT = 4, 0.25
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Case:
    kind: str
    policy: str
    slots: int | None = None


def frozen(layer: int, expert: int) -> Tensor:
    random = torch.Generator().manual_seed(100 * layer + expert)
    return torch.randn(SHAPE.numel, generator=random, dtype=torch.float64) / 3


def family(kind: str, layer: int) -> ExpertFamily:
    site = Site(Unit(layer), EXPERTS, SHAPE, SEED, torch.float64, torch.float64, torch.device("cpu"))
    if kind == "full":
        return FullExperts(site)
    lora = LoraShape(rank=2, scale=0.7, dropout=DROPOUT)
    if kind == "row_norm":
        lora = LoraShape(rank=2, scale=1.0, dropout=0.0, gradient_rule="row_norm", eta=1.5)
    pairs = PlainPairs(lora, ("gate_proj", "down_proj"), FfnSizes(SHAPE.hidden, SHAPE.ffn))
    return MoeLoraExperts(site, lambda expert: frozen(layer, expert), pairs)


def initial(kind: str, layer: int, expert: int) -> Tensor:
    """The family's own, but for B, which would be zero and leave A without a gradient."""
    chunk = family(kind, layer).init_chunk(expert)
    noise = torch.randn(len(chunk), generator=torch.Generator().manual_seed(7 * layer + expert), dtype=torch.float64)
    return chunk + 0.1 * noise


def routers() -> dict[str, nn.Parameter]:
    random = torch.Generator().manual_seed(9)
    return {f"router {layer}": nn.Parameter(torch.randn(EXPERTS, SHAPE.hidden, generator=random, dtype=torch.float64)) for layer in LAYERS}


def bias(step: int) -> Tensor:
    """Another hot expert in each step; experts 4 idle in all, 2 in some."""
    bias_E = torch.zeros(EXPERTS, dtype=torch.float64)
    bias_E[step % 3] = 3.0
    bias_E[4] = -1e4
    bias_E[2] = -1e4 if step < 2 else bias_E[2]
    return bias_E


def route(x_TD: Tensor, router: Tensor, step: int) -> tuple[Tensor, Tensor]:
    top, expert_TK = torch.softmax(x_TD @ router.T + bias(step), dim=1).topk(TOP_K, dim=1)
    return expert_TK, top / top.sum(1, keepdim=True)


def tokens(step: int, micro: int) -> tuple[Tensor, Tensor, Tensor]:
    """All ranks' tokens, the gradient of the loss by the last layer's output, and token numbers."""
    random = torch.Generator().manual_seed(10 * step + micro)
    x, direction = (torch.randn(TOKENS, SHAPE.hidden, generator=random, dtype=torch.float64) for _ in range(2))
    return x, direction, torch.arange(TOKENS) + 1000 * (step * MICRO_STEPS + micro)


def share(rank: int, world: int) -> slice:
    """The last rank of three has no tokens."""
    busy = min(world, 2)
    return slice(rank * TOKENS // busy, (rank + 1) * TOKENS // busy)


class Plain:
    """The same model in one process."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.chunks = {(layer, e): nn.Parameter(initial(kind, layer, e)) for layer in LAYERS for e in range(EXPERTS)}
        self.routers = routers()
        self.optimizer = torch.optim.AdamW([*self.chunks.values(), *self.routers.values()], lr=1e-2, weight_decay=0.1)
        self.reached: set[tuple[int, int]] = set()

    def experts(self, layer: int, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, token_T: Tensor, step: int | None) -> Tensor:
        """`step` None: not training."""
        chunks = torch.stack([self.chunks[layer, e] for e in range(EXPERTS)])
        routed = RoutedTokens(x_TD, expert_TK, weight_TK, token_T, torch.arange(EXPERTS))
        if self.kind == "full":
            return full_ffn_reference(routed, chunks, SHAPE)
        made = family(self.kind, layer)
        assert isinstance(made, MoeLoraExperts)
        rate = made.pair_source.lora.dropout
        dropout = None if step is None or rate == 0 else Dropout(rate, dropout_key(SEED, step, layer))
        frozen_E = [frozen(layer, e) for e in range(EXPERTS)]
        return moe_lora_ffn_reference(routed, frozen_E, made.pair_source.stacked(chunks, torch.arange(EXPERTS)), SHAPE, dropout=dropout)

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        self.reached = set()
        for micro in range(MICRO_STEPS):
            x, direction, token = tokens(step, micro)
            for layer in LAYERS:
                expert, weight = route(x, self.routers[f"router {layer}"], step)
                self.reached |= {(layer, int(e)) for e in expert.unique()}
                x = x + self.experts(layer, x, expert, weight, token, step)
            (x * direction).sum().backward()
        for key in set(self.chunks) - self.reached:
            self.chunks[key].grad = None
        self.optimizer.step()


class Sharded:
    """The model on this rank."""

    def __init__(self, case: Case, rank: int, world: int) -> None:
        group = dist.group.WORLD
        assert group is not None
        number = zlib.crc32(case.policy.encode())
        planner = random_planner(number) if case.policy.startswith("random") else POLICIES[case.policy]
        config = EngineConfig(planner, topology(world), memory_slots=case.slots, top_k=TOP_K, non_moe_flops=2e4)
        self.engine = Engine({layer: family(case.kind, layer) for layer in LAYERS}, config, ExpertGroups(group, group))
        for (layer, expert), parameter in self.engine.shards.named_parameters().items():
            parameter.data.copy_(initial(case.kind, layer, expert))
        self.routers = routers()
        self.optimizer = ExpertOptimizer(
            Trainables(owned_parameters(self.engine), self.routers),
            AdamW(weight_decay=0.1),
            LearningRate(1e-2),
            torch.device("cpu"),
        )
        self.group, self.mine = group, share(rank, world)

    def step(self, step: int) -> None:
        begun = self.engine.begin_step(step, MICRO_STEPS)
        for micro in range(MICRO_STEPS):
            passed = begun.begin_micro_step()
            x, direction, token = (part[self.mine] for part in tokens(step, micro))
            for layer in LAYERS:
                passed.prefetch(layer)
                expert, weight = route(x, self.routers[f"router {layer}"], step)
                x = x + passed.experts(layer, x, expert, weight, token)
            passed.backward((x * direction).sum())
        begun.finish()
        self.optimizer.reduce_replicated(self.group)
        self.optimizer.step(0.0, None)


def close(got: Tensor, wanted: Tensor, what: str) -> None:
    error = float((got - wanted).detach().abs().max() / wanted.detach().abs().max().clamp(min=1.0))
    assert error <= TOLERANCE, f"{what} is off by {error:.1e}"


def check_frozen(sharded: Sharded, case: Case, world: int) -> None:
    """Every rank knows what every other holds, and nobody holds more than it may."""
    engine = sharded.engine
    for layer in LAYERS if case.kind != "full" else ():
        resident_ED = engine.shards.plans.residency[layer].held_ED
        everyones: list[list[list[bool]]] = [[]] * world
        dist.all_gather_object(everyones, resident_ED.tolist())
        assert all(one == everyones[0] for one in everyones)
        foreign_ED = resident_ED & (engine.shards.owners[layer][:, None] != np.arange(world))
        if layer in engine.shards.placements:
            where_ED = engine.shards.placements[layer].where_ED
            assert resident_ED[where_ED].all()
            room = np.maximum(EXPERTS if case.slots is None else case.slots, (foreign_ED & where_ED).sum(0))
            assert (foreign_ED.sum(0) <= room).all()
    for layers, given in engine.shards.plans.inputs():
        if case.kind == "full":
            assert given.resident_LED is None
        else:
            assert given.resident_LED is not None
            assert all((given.resident_LED[i] == engine.shards.plans.residency[layer].held_ED).all() for i, layer in enumerate(layers))


def frozen_replica_bytes(shards: ExpertShards) -> int:
    """Bytes of others' frozen parts that are held now or are on their way; they stay between steps."""
    return sum(held.replicas_on(shards.rank) * shards.frozen[unit].chunk_bytes for unit, held in shards.plans.residency.items())


def check_evaluation(sharded: Sharded, plain: Plain, rank: int, world: int) -> None:
    """Each rank runs what it likes, without a message."""
    engine = sharded.engine
    held = frozen_replica_bytes(engine.shards)
    with engine.evaluation() as evaluation:
        sent = engine.shards.bytes_sent
        for layer in LAYERS[: 1 + rank % 2]:
            x, _, token = (part[: 3 + rank] for part in tokens(99, layer))
            expert, weight = route(x, sharded.routers[f"router {layer}"].detach(), 2)
            y = evaluation.experts(layer, x, expert, weight, token)
            close(y, plain.experts(layer, x, expert, weight, token, None), "evaluation")
        assert engine.shards.bytes_sent == sent
    assert engine.shards.replica_bytes == 0
    assert frozen_replica_bytes(engine.shards) >= held, "what plans had brought was given up"


def check_move(sharded: Sharded, world: int) -> None:
    """Random owners. What the move is said to have sent, by hand."""
    engine = sharded.engine
    rng = np.random.default_rng(world)
    owners = {layer: rng.integers(0, world, size=EXPERTS) for layer in LAYERS}
    residency = engine.shards.plans.residency
    lacking = sum(int((~held.held_ED[np.arange(EXPERTS), owners[layer]]).sum()) for layer, held in residency.items())
    moving = sum(int((owners[layer] != engine.shards.owners[layer]).sum()) for layer in LAYERS)
    never_stepped = sum(int(owners[layer][4] != engine.shards.owners[layer][4]) for layer in LAYERS)
    chunk_bytes = engine.shards.stores[LAYERS[0]].chunk_bytes
    sent_before = sum(store.bytes_sent for store in engine.shards.frozen.values())
    moved = move_experts(engine, sharded.optimizer, owners)
    # A master each, and two moments and a count of steps, which expert 4 has none of. Frozen parts only where they are not.
    rows = moving * (3 * chunk_bytes + 4) - never_stepped * (2 * chunk_bytes + 4)
    assert moved.num_bytes == rows + lacking * SHAPE.numel * 8
    sent = torch.tensor(sum(store.bytes_sent for store in engine.shards.frozen.values()) - sent_before)
    dist.all_reduce(sent)
    assert int(sent) == lacking * SHAPE.numel * 8


def check_case(rank: int, world: int, case: Case) -> None:
    plain, sharded = Plain(case.kind), Sharded(case, rank, world)
    engine = sharded.engine
    for step in range(STEPS):
        before = {key: parameter.detach().clone() for key, parameter in engine.shards.named_parameters().items()}
        plain.step(step)
        sharded.step(step)
        for key, parameter in engine.shards.named_parameters().items():
            close(parameter.detach(), plain.chunks[key].detach(), f"step {step}, expert {key}")
            assert key in plain.reached or torch.equal(parameter.detach(), before[key]), f"idle expert {key} moved"
        for name, router in sharded.routers.items():
            close(router.detach(), plain.routers[name].detach(), f"step {step}, {name}")
        check_frozen(sharded, case, world)
        if step == EVALUATED:
            check_evaluation(sharded, plain, rank, world)
        if step == MOVED:
            check_move(sharded, world)
            check_frozen(sharded, case, world)


def _check_cases(rank: int, world: int, cases: list[Case]) -> None:
    for case in cases:
        try:
            check_case(rank, world, case)
        except BaseException as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_placement_and_quotas_equal_one_process(world: int) -> None:
    """With every slot and with one, so that frozen parts have to make room."""
    cases = [Case("full", "random 0"), Case("lora", "random 0"), Case("lora", "random 1", slots=1)]
    run_ranks(world, _check_cases, cases, timeout=240)


def test_full_experts_under_every_policy_equal_one_process() -> None:
    run_ranks(2, _check_cases, [Case("full", policy, slots=2) for policy in POLICIES], timeout=480)


def test_frozen_experts_under_policies_equal_one_process() -> None:
    """None, all and some replicas; one that goes by what is resident; ours."""
    policies = ("static_ep", "full", "hecate_paper", "flexmoe", "auto")
    run_ranks(2, _check_cases, [Case("lora", policy, slots=2) for policy in policies], timeout=480)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_frozen_experts_with_a_gradient_rule_equal_one_process(world: int) -> None:
    run_ranks(world, _check_cases, [Case("row_norm", policy, slots=2) for policy in ("static_ep", "full", "random 0")], timeout=480)


def _planned_ahead(rank: int, world: int) -> None:
    """Steps go by the same plans, and bring the same frozen parts, whether they are planned ahead or not."""
    for policy, slots in (("flexmoe", 2), ("auto", 1)):
        found = []
        for wanted in (False, True):
            made, planned = Sharded(Case("lora", policy, slots=slots), rank, world), []
            plans = made.engine.shards.plans
            with plans_ahead(wanted):
                for step in range(MOVED + 3):
                    made.step(step)
                    held = [(state.held_ED.tolist(), state.uses, state.fetches) for state in plans.residency.values()]
                    planned.append([plans_of(plans), held])
                    if step == MOVED:
                        check_move(made, world)
            found.append((planned, {name: tensor.tolist() for name, tensor in made.optimizer.state_tensors().items()}))
        assert found[0] == found[1], policy
        assert steps_planned(plans) == [MOVED + 1, 2], f"{policy}: all but the first step and the one after the move"


def test_what_ranks_hold_of_frozen_parts_is_known_ahead() -> None:
    run_ranks(2, _planned_ahead, timeout=240)
