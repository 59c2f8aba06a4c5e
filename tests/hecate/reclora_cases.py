"""A tiny model whose linears' experts are mixed by users, sharded, and the plain reference with the same values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from hecate.config import RouterConfig
from hecate.data.batches import Batch
from hecate.engine.step_plans import EngineConfig
from hecate.experts.seeding import unit_numbers
from hecate.kernels.common.dropout import Dropout, dropout_key
from hecate.model.causal_head import LanguageModelHead
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.linears import find_linears
from hecate.model.moe_model import MoeModel
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables, owned_parameters
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cost.cost_model import PlanMode
from hecate.parallel.values.expert_kinds import LINEARS, LoraShape
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import expert_groups
from hecate.report.events import StepResult
from hecate.train.extensions.users import UsersOfSamples
from hecate.train.steps.step import StepBatches, StepRules, train_step
from tests import plain_mixlora, plain_reclora
from tests.hecate.equivalence_cases import (
    LEARNING_RATE,
    MAX_NORM,
    MICRO_STEPS,
    ROWS,
    TARGETS,
    WEIGHT_DECAY,
    micro_batch,
    planner_of,
    rows_of,
    topology,
)
from tests.hecate.linear_cases import RANK, SCALE, flat_values, tiny_with_biases

SEED, TEMPERATURE, USERS, WIDTH = 5, 0.5, 3, 4
GATE = ("norm.weight", "norm.bias", "hidden.weight", "hidden.bias", "out.weight", "out.bias")


@dataclass(frozen=True)
class UserCase:
    policy: str
    mix: Literal["factors", "products"] = "factors"
    scenario: str = "balanced"
    experts: tuple[int, int] = (3, 2)
    checkpointing: bool = False
    plan: PlanMode = "history"
    rematerialize: bool = False
    prefetch: int = 1
    steps: int = 3
    shard_size: int | None = None


def features() -> torch.Tensor:
    return torch.randn(USERS, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def with_users(batch: Batch) -> Batch:
    """Neighbouring samples have different users, and each user has samples in rows of every rank."""
    rows = torch.arange(len(batch.segment_ids))[:, None]
    return replace(batch, user=torch.where(batch.segment_ids > 0, (2 * rows + batch.segment_ids) % USERS, -1))


def sharded_by_users(case: UserCase, world: int) -> tuple[MoeModel, LanguageModelHead]:
    model = tiny_with_biases(torch.float64)
    head = LanguageModelHead(model)
    config = EngineConfig(
        planner_of(case.policy),
        topology(world),
        memory_slots=1,
        top_k=max(case.experts),
        non_moe_flops=2e6,
        plan=case.plan,
        rematerialize=case.rematerialize,
        prefetch=case.prefetch,
    )
    plan = InsertionPlan(
        kind=LINEARS,
        experts_per_layer=case.experts,
        top_k=max(case.experts),
        router=RouterConfig(input="user", temperature=TEMPERATURE, mix=case.mix),
        user_width=WIDTH,
        lora=LoraShape(RANK, SCALE, 0.0),
        target_modules=TARGETS,
        seed=SEED,
    )
    moe = insert_experts(model, find_linears(model), plan, config, expert_groups(make_mesh(world, case.shard_size)))
    for (unit, expert), chunk in moe.engine.shards.named_parameters().items():
        chunk.data.copy_(flat_values(unit, expert, len(chunk)))
    if case.checkpointing:
        from hecate.model.layers.checkpointing import checkpoint_activations

        checkpoint_activations(moe)
    model.train()
    return moe, head


def optimizer_of(moe: MoeModel) -> ExpertOptimizer:
    return ExpertOptimizer(
        Trainables(owned_parameters(moe.engine), moe.replicated_parameters()),
        AdamW(weight_decay=WEIGHT_DECAY),
        LearningRate(LEARNING_RATE),
        torch.device("cpu"),
    )


def empty_rows(case: UserCase, world: int) -> range:
    """Rows that are all padding: with the scenario those of the last rank."""
    return range((world - 1) * ROWS // world, ROWS) if case.scenario == "empty rank" and world > 1 else range(0)


def step_by_users(
    moe: MoeModel, head: LanguageModelHead, optimizer: ExpertOptimizer, number: int, *, rank: int, world: int, empty: range
) -> StepResult:
    """A training step on this rank's rows."""
    batches = [with_users(micro_batch(number, micro, empty)) for micro in range(MICRO_STEPS)]
    return train_step(
        moe,
        head,
        optimizer,
        StepBatches(
            number=number,
            micro_batches=[rows_of(batch, rank, world) for batch in batches],
            num_labels=sum(int((b.targets != -100).sum()) for b in batches),
        ),
        StepRules(aux_coef=0.0, max_grad_norm=MAX_NORM),
        [UsersOfSamples(features())],
    )


class PlainUsers:
    """The plain model with the same values, and its own optimizer."""

    def __init__(self, case: UserCase, moe: MoeModel) -> None:
        self.model = tiny_with_biases(torch.float64).requires_grad_(False)
        self.linears: dict[Unit, plain_reclora.PlainRecLoraLinear] = {}
        self.trained: dict[str, list[torch.nn.Parameter]] = {}
        values = moe.replicated_parameters()
        for found in find_linears(self.model):
            base, unit = self.model.get_submodule(found.path), found.unit
            assert isinstance(base, torch.nn.Linear)
            pairs = []
            for expert in range(case.experts[unit.layer]):
                a, b = flat_values(unit, expert, RANK * (base.in_features + base.out_features)).split(
                    (RANK * base.in_features, RANK * base.out_features)
                )
                pairs.append((a.view(RANK, -1), b.view(-1, RANK)))
            gate = {name: values[f"layers.{unit}.router.{name}"].detach() for name in GATE}
            linear = plain_reclora.PlainRecLoraLinear(base, gate, pairs, scale=SCALE, temperature=TEMPERATURE, mix=case.mix)
            self.trained |= {f"layers.{unit}.router.{name}": [linear.gate[name.replace(".", "_")]] for name in GATE}
            self.trained |= {f"{unit}.{expert}": [linear.a[expert], linear.b[expert]] for expert in range(len(pairs))}
            self.linears[unit] = linear
            self.model.set_submodule(found.path, linear)
        self.parameters = [parameter for parts in self.trained.values() for parameter in parts]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def step(self, step: int, empty: range) -> tuple[float, float]:
        """(cross-entropy, gradient norm). Parameters have yet to be stepped."""
        batches = [with_users(micro_batch(step, micro, empty)) for micro in range(MICRO_STEPS)]
        num_labels, total = sum(int((b.targets != -100).sum()) for b in batches), 0.0
        for batch in batches:
            assert batch.user is not None
            firsts = [
                (row, int((batch.segment_ids[row] == segment).nonzero()[0]))
                for row in range(ROWS)
                for segment in range(1, int(batch.segment_ids[row].max()) + 1)
            ]
            user_M, token_M = (torch.stack([of[row, at] for row, at in firsts]) for of in (batch.user, batch.token_ids))
            for unit, linear in self.linears.items():
                dropout = Dropout(0.1, dropout_key(SEED, step, *unit_numbers(unit)))
                linear.user_MF, linear.mask_MH = features()[user_M], dropout.mask(token_M, -1, 60, torch.float64)
            linears = list(self.linears.values())
            loss, cross = plain_mixlora.plain_loss(self.model, linears, batch, num_labels, MICRO_STEPS, 0.0, lambda _: torch.zeros(()))
            loss.backward()
            total += cross
        return total, plain_mixlora.clip(list(self.parameters), MAX_NORM)

    def flat(self, name: str, *, grad: bool) -> torch.Tensor | None:
        parts = [p.grad if grad else p.detach() for p in self.trained[name]]
        return None if any(p is None for p in parts) else torch.cat([p.flatten() for p in parts if p is not None])
