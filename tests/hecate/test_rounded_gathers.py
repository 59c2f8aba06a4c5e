"""Full experts of a bfloat16 model are gathered in bfloat16, and train to the bit as if their float32 masters were gathered."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hecate.engine.step_plans import EngineConfig
from hecate.experts.full import FullExperts
from hecate.model.causal_head import LanguageModelHead
from hecate.model.gated_ffn import find_gated_ffns
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.cost.cost_model import PlanMode
from hecate.parallel.values.expert_kinds import FULL
from hecate.ranks.groups import expert_groups
from hecate.train.steps.step import StepBatches, StepRules, train_step
from testing.ranks import run_ranks
from tests.hecate import equivalence_cases as suite


def _trained(policy: str, plan: PlanMode, rematerialize: bool, world: int) -> tuple[dict[str, Tensor], int, list[float]]:
    """What two steps make of the parameters and moments on this rank, the bytes that it sent, and the losses."""
    model = suite.tiny_llama(torch.bfloat16)
    config = EngineConfig(
        suite.planner_of(policy), local_topology(world, cuda=False), memory_slots=2, top_k=2, rematerialize=rematerialize, plan=plan
    )
    insertion = InsertionPlan(kind=FULL, experts_per_layer=(5, 5), top_k=2, upcycle_noise=0.1, seed=5)
    head = LanguageModelHead(model)
    moe = insert_experts(model, find_gated_ffns(model), insertion, config, expert_groups(make_mesh(world, None)))
    optimizer = ExpertOptimizer(Trainables.of(moe), AdamW(weight_decay=0.1), LearningRate(1e-2), torch.device("cpu"))
    losses = []
    for step in range(2):
        batches = [suite.rows_of(suite.micro_batch(step, micro, range(0)), torch.distributed.get_rank(), world) for micro in range(2)]
        labels = sum(int((suite.micro_batch(step, micro, range(0)).targets != -100).sum()) for micro in range(2))
        metrics = train_step(
            moe,
            head,
            optimizer,
            StepBatches(number=step, micro_batches=batches, num_labels=labels),
            StepRules(aux_coef=0.05, max_grad_norm=0.5),
        )
        losses.append(metrics.loss)
    return {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}, moe.engine.shards.bytes_sent, losses


def _both(rank: int, world: int, policy: str, plan: PlanMode, rematerialize: bool) -> tuple[int, int]:
    rounded, rounded_bytes, losses = _trained(policy, plan, rematerialize, world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FullExperts, "replica_dtype", torch.float32)
        whole, whole_bytes, whole_losses = _trained(policy, plan, rematerialize, world)
    assert losses == whole_losses
    assert rounded.keys() == whole.keys()
    assert all(tensor.dtype == torch.float32 for name, tensor in rounded.items() if name.startswith("owned/") and tensor.dim())
    for name, tensor in rounded.items():
        assert torch.equal(tensor, whole[name]), name
    return rounded_bytes, whole_bytes


@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_training_is_the_same_to_the_bit(world: int) -> None:
    """With everything everywhere, gathers move half the bytes, and reductions as many: a quarter is saved."""
    rounded, whole = (sum(sent) for sent in zip(*run_ranks(world, _both, "full", "history", False), strict=True))
    assert rounded == 0.75 * whole
    assert (whole > 0) == (world > 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "plan", "rematerialize"),
    [
        ("hecate_paper", "history", True),
        ("hecate_paper", "exact", False),
        ("hecate_paper", "calibrated", False),
        ("static_ep", "history", False),
    ],
)
def test_under_every_plan_mode(policy: str, plan: PlanMode, rematerialize: bool) -> None:
    run_ranks(2, _both, policy, plan, rematerialize)
