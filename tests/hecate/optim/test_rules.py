"""What the optimizer promises to any gradient rule: its state is saved, moved and copied, and it sees the matrices in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hecate.config.sections import OPTIMIZERS
from hecate.elastic.backups import copy_to_backup_ranks
from hecate.elastic.move_experts import move_experts
from hecate.optim.adamw import AdamW
from hecate.optim.from_config import gradient_rule, learning_rate
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables, owned_parameters
from hecate.optim.rule import Stepped
from hecate.optim.rules.muon import MuonConfig
from hecate.parallel.cost.expert_cost import STATE_NUMBERS
from hecate.parallel.values.layout import TensorSpec
from hecate.parallel.values.optimizer_state import ParameterSpec, StateSpec, owner_bytes
from testing.ranks import run_ranks
from tests.hecate.apps.megatron.making import config_of, write_parts
from tests.hecate.experts.making import engine

RATE, RATIO, KEPT = 0.1, 4.0, 0.5
CHUNK = (TensorSpec("up_proj.A", (1, 2)), TensorSpec("up_proj.B", (3, 1)))


@dataclass(frozen=True)
class FastB:
    """A rule with one moment, by which B learns `RATIO` times as fast as all else, as in LoRA+ (arXiv 2402.12354)."""

    def state_specs(self, parameter: ParameterSpec) -> dict[str, StateSpec]:
        return {"velocity": StateSpec(parameter.shape)}

    def step(self, stepped: Sequence[Stepped], learning_rate: float) -> None:
        for one in stepped:
            velocity = one.state["velocity"].mul_(KEPT).add_(one.gradient)
            one.value.sub_(learning_rate * velocity)
            for name, change in one.cut(velocity).items() if one.chunk else ():
                if name.endswith(".B"):
                    one.cut(one.value)[name].sub_((RATIO - 1) * learning_rate * change)


def make(owned: dict[str, nn.Parameter], replicated: dict[str, nn.Parameter]) -> ExpertOptimizer:
    return ExpertOptimizer(Trainables(owned, replicated, chunks={0: CHUNK}), FastB(), LearningRate(RATE), torch.device("cpu"))  # type: ignore[dict-item]


def parameters() -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    return {"0.7": nn.Parameter(torch.ones(5, dtype=torch.float64))}, {"r": nn.Parameter(torch.ones(2, 2, dtype=torch.float64))}


def train(optimizer: ExpertOptimizer, steps: range) -> None:
    for step in steps:
        for parameter in (*optimizer.owned.values(), *optimizer.replicated.values()):
            parameter.grad = torch.full_like(parameter, 1.0 + step)
        optimizer.step(1.0, max_grad_norm=None)


def test_a_rule_sees_the_matrices_in_a_chunk_and_changes_them() -> None:
    owned, replicated = parameters()
    train(make(owned, replicated), range(2))
    # The velocities are 1 and then 2.5.
    assert owned["0.7"].tolist() == pytest.approx([1 - RATE * 3.5] * 2 + [1 - RATIO * RATE * 3.5] * 3)
    assert replicated["r"].flatten().tolist() == pytest.approx([1 - RATE * 3.5] * 4)


def test_what_a_rule_keeps_is_saved_by_its_names_and_goes_on_bit_for_bit() -> None:
    whole, first, second = (make(*parameters()) for _ in range(3))
    train(whole, range(4))
    train(first, range(2))
    saved = {name: tensor.clone() for name, tensor in first.state_tensors().items()}
    assert list(saved) == ["owned/0.7", "owned/0.7/velocity", "replicated/r", "replicated/r/velocity"]
    second.load_state_tensors(saved, steps_done=2)
    train(second, range(2, 4))
    assert all(torch.equal(tensor, second.state_tensors()[name]) for name, tensor in whole.state_tensors().items())


def _moved(rank: int, world: int) -> None:
    """Three experts of a layer go from their owners to the other rank, and their backups back, with what the rule keeps of them."""
    made = engine({0: 3})
    chunks = {0: made.shards.families[0].layout().trainable}  # type: ignore[index]
    optimizer = ExpertOptimizer(Trainables(owned_parameters(made), {}, chunks=chunks), FastB(), LearningRate(RATE), torch.device("cpu"))
    train(optimizer, range(1 + rank))
    before: list[dict[str, Tensor]] = [{} for _ in range(world)]
    torch.distributed.all_gather_object(before, optimizer.state_tensors())
    move_experts(made, optimizer, {0: np.array([1, 1, 0])})  # type: ignore[dict-item]
    everywhere = before[0] | before[1]
    after = optimizer.state_tensors()
    assert list(after) == [f"owned/0.{expert}{end}" for expert in ((2,), (0, 1))[rank] for end in ("", "/velocity")]
    assert all(torch.equal(tensor, everywhere[name]) for name, tensor in after.items())
    copy_to_backup_ranks(made, optimizer, 1)
    assert sorted(optimizer.backups) == [["0.0", "0.1"], ["0.2"]][rank]
    for name, backup in optimizer.backups.items():
        row = optimizer.row(backup)
        assert torch.equal(row["master"], everywhere[f"owned/{name}"])
        assert torch.equal(row["velocity"], everywhere[f"owned/{name}/velocity"])


def test_what_a_rule_keeps_moves_with_the_experts() -> None:
    run_ranks(2, _moved)


def test_adamw_keeps_what_planners_count_where_no_optimizer_is_known() -> None:
    assert owner_bytes(OPTIMIZERS["adamw"].STATE, ParameterSpec((7,)), 4) == STATE_NUMBERS * 7 * 4


def test_the_configured_rule_and_learning_rate(tmp_path: Path) -> None:
    write_parts(tmp_path)
    keys = ("weight_decay=0.1", "adam_beta1=0.8", "adam_beta2=0.95", "adam_epsilon=1e-6", "weight_decay_exclude=[norms]")
    config = config_of(tmp_path, *keys, "learning_rate=0.5", "lr_scheduler_type=constant", "warmup_ratio=0")
    adamw = AdamW(weight_decay=0.1, beta1=0.8, beta2=0.95, epsilon=1e-6, exclude=("norms",))
    made = gradient_rule(config)
    assert made.step.__self__ == adamw  # type: ignore[attr-defined]
    assert made.state_specs(ParameterSpec((3,))) == adamw.state_specs(ParameterSpec((3,)))
    assert [learning_rate(config).of(step) for step in (0, 7)] == [0.5, 0.5]


def test_an_optimizer_gets_its_section_and_the_peak_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parts(tmp_path)
    config = config_of(tmp_path, "optim=muon", "muon.momentum=0.9", "weight_decay=0.1", "learning_rate=0.5")
    found: list[tuple[object, ...]] = []
    monkeypatch.setattr(OPTIMIZERS["muon"], "STEP", lambda *given: found.append(given))
    assert gradient_rule(config).state_specs is OPTIMIZERS["muon"].STATE
    assert found == [(MuonConfig(momentum=0.9), AdamW(weight_decay=0.1), 0.5)]


def test_the_schedule_gets_its_section(tmp_path: Path) -> None:
    write_parts(tmp_path)
    after = ("lr_scheduler_kwargs.decay_ratio=0.5", "lr_scheduler_kwargs.min_lr_rate=0.2")
    rate = learning_rate(config_of(tmp_path, "lr_scheduler_type=wsd", *after, "max_steps=8", "learning_rate=0.5"))
    assert [rate.of(step) for step in (0, 4, 6, 8)] == pytest.approx([0.5, 0.5, 0.3, 0.1])
