"""LoRA on real MoE architectures, sharded over any ranks, is the computation that PEFT does in one process with `target_parameters`.

The parent trains tiny random models with PEFT for three AdamW steps and writes every loss, gradient and parameter down. Ranks load the
same folders as a run does, each its own experts alone, train their shares of the rows, and compare.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from hecate.engine.step_plans import EngineConfig
from hecate.experts.family import Site
from hecate.experts.pairs.source_table import trains_a
from hecate.experts.pairs.sources.fixed_a import FixedA
from hecate.kernels.common.ffn import FfnShape
from hecate.model.causal_head import LanguageModelHead
from hecate.model.files.load import ModelSource
from hecate.model.files.load_moe import load_moe_model
from hecate.model.insert import InsertionPlan, insert_experts
from hecate.model.moe_model import MoeModel
from hecate.model.sharded_layers import shard_frozen_layers
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables, owned_parameters
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.cost.cost_model import PlanMode
from hecate.parallel.values.expert_kinds import MOE_LORA, LoraShape
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import expert_groups, own_group
from hecate.train.steps.step import StepBatches, StepRules, train_step
from testing.ranks import run_ranks
from tests.hecate.equivalence_cases import (
    LENGTH,
    MICRO_STEPS,
    ROWS,
    STEPS,
    assert_groups_equal,
    calibrating_at_whim,
    micro_batch,
    planner_of,
    rows_of,
    topology,
)
from tests.hecate.watching import gradients_of
from tests.plain_mixlora import clip
from tests.plain_moe_lora import EXPERTS, KINDS, PlainMoeLora, biased_routers, peft_model, save_tiny

RANK, ALPHA, MAX_NORM, AUX_COEF, SEED = 3, 6, 0.5, 0.05, 5
LEARNING_RATE, WEIGHT_DECAY = 1e-2, 0.1
TOLERANCE = 1e-7
"""in float64, but for the norms, which work in float32 in these models"""
TARGETS = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Model:
    """What the parent trains."""

    kind: str
    idle: bool = False
    """expert 1 gets no token, expert 0 many"""
    train_router: bool = False
    empty_rows: int = 0
    """rows at the end that are all padding"""
    pairs: str = "plain"
    half: int | None = None
    """0: of gate and up, gate alone has a pair; 1: up alone"""
    expert_rank: int | None = None
    """the rank of the experts' pairs, if it is another"""
    chosen: tuple[tuple[int, ...], ...] = ()
    """the experts of each layer that train, if not all do"""

    @property
    def lora(self) -> LoraShape:
        return LoraShape(RANK, ALPHA / RANK, 0.0, self.pairs)

    @property
    def lora_of_experts(self) -> LoraShape:
        rank = self.expert_rank or RANK
        return LoraShape(rank, ALPHA / rank, 0.0, self.pairs, chosen=self.chosen)

    @property
    def left_out(self) -> set[tuple[int, int]]:
        """(layer, expert) of those that do not train."""
        return {(layer, expert) for layer, chosen in enumerate(self.chosen) for expert in range(EXPERTS) if expert not in chosen}

    @property
    def targets(self) -> tuple[str, ...]:
        left_out = () if self.half is None else (("up_proj", "gate_proj")[self.half],)
        return tuple(name for name in TARGETS if name not in left_out)

    @property
    def name(self) -> str:
        return "-".join(map(str, asdict(self).values()))

    def bias(self) -> Tensor:
        bias_E = torch.zeros(EXPERTS, dtype=torch.float64)
        if self.idle:
            bias_E[0], bias_E[1] = 4.0, -1e4
        return bias_E

    def empty(self) -> range:
        return range(ROWS - self.empty_rows, ROWS)


MODELS = (
    Model("mixtral", train_router=True),
    Model("mixtral", idle=True, empty_rows=6),
    Model("qwen3_moe", train_router=True, idle=True),
    Model("olmoe"),
    Model("qwen2_moe", empty_rows=6),
)


PLACED = (
    Model("qwen3_moe", idle=True, half=0),
    Model("mixtral", empty_rows=6, half=1),
    Model("olmoe", expert_rank=1),
    Model("qwen2_moe", chosen=((1, 4), (0, 2, 3))),
)
"""LoRA at a part of the experts or of their weights, or of another rank there"""

FIXED_A = Model("qwen3_moe", idle=True, empty_rows=6, pairs="fixed_a")


def initial(numel: int, layer: int, expert: int) -> Tensor:
    random = torch.Generator().manual_seed(1000 + 50 * layer + expert)
    return torch.randn(numel, generator=random, dtype=torch.float64) * 0.2


def initial_other(name: str, shape: torch.Size) -> Tensor:
    """Of attention adapters, by PEFT's names."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name))), dtype=torch.float64) * 0.1


def fixed_a(layer: int, hidden: int, ffn: int) -> dict[str, Tensor]:
    """The A that a layer's experts share, by name: values alone are handed to PEFT."""
    double = torch.float64
    site = Site(Unit(layer), EXPERTS, FfnShape(hidden, ffn, "silu"), SEED, double, double, torch.device("cpu"))
    source = FixedA(site, FIXED_A.lora, ("gate_up_proj", "down_proj"))
    pairs = source.stacked(torch.zeros(1, source.sizes.trained_numel, dtype=double), torch.arange(1))
    return {f"{name}.A": of.a_SrI[0] for name, of in pairs.items()}


def train_with_peft(model: Model, base: Path) -> dict[str, Tensor]:
    """All that happens in the steps, by name."""
    wrapped = peft_model(base, RANK, ALPHA, ["q_proj", "v_proj"], expert_rank=model.expert_rank)
    hidden, ffn = wrapped.config.hidden_size, wrapped.base_model.model.model.layers[0].mlp.experts.get_param().shape[2]
    rank, outputs = model.expert_rank or RANK, 2 * ffn if model.half is None else ffn
    sizes = {"gate_up_proj.A": (rank, hidden), "gate_up_proj.B": (outputs, rank), "down_proj.A": (rank, ffn), "down_proj.B": (hidden, rank)}
    trained = {name: shape for name, shape in sizes.items() if trains_a(model.lora) or name.endswith(".B")}
    chunks = {}
    for layer in range(2):
        drawn = {} if trains_a(model.lora) else fixed_a(layer, hidden, ffn)
        for expert in range(EXPERTS):
            flat = initial(sum(a * b for a, b in trained.values()), layer, expert) * ((layer, expert) not in model.left_out)
            parts = flat.split([a * b for a, b in trained.values()])
            given = {name: part.view(shape) for (name, shape), part in zip(trained.items(), parts, strict=True)}
            chunks[layer, expert] = {name: drawn[name] if name in drawn else given[name] for name in sizes}
    others = {name: initial_other(name, p.shape) for name, p in wrapped.named_parameters() if "self_attn" in name and "lora_" in name}
    if model.train_router:
        others |= {name: p.detach() for name, p in wrapped.named_parameters() if name.endswith("mlp.gate.weight")}
    plain = PlainMoeLora(wrapped, chunks, others, model.half)
    if not trains_a(model.lora):
        plain.freeze_a()
    for layer, expert in plain.chunks:
        for parameter in plain.chunks[layer, expert].values() if (layer, expert) in model.left_out else ():
            parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    with biased_routers(plain.gates, model.bias()):
        ids = micro_batch(0, 0, range(0)).input_ids
        seen = {"logits": plain(input_ids=ids).detach()}
        for step in range(STEPS):
            batches = [micro_batch(step, micro, model.empty()) for micro in range(MICRO_STEPS)]
            num_labels = sum(int((batch.targets != -100).sum()) for batch in batches)
            total, reached = 0.0, set()
            for batch in batches:
                loss, cross = plain.loss(batch, num_labels, MICRO_STEPS, AUX_COEF)
                loss.backward()
                total, reached = total + cross, reached | plain.reached()
            for key in set(plain.chunks) - reached:
                for parameter in plain.chunks[key].values():
                    parameter.grad = None
            seen[f"{step}/loss"] = torch.tensor(total, dtype=torch.float64)
            seen[f"{step}/norm"] = torch.tensor(clip(list(plain.parameters()), MAX_NORM), dtype=torch.float64)
            for (layer, expert), parts in plain.chunks.items():
                if (layer, expert) in reached - model.left_out:
                    found = [p.grad.flatten() for p in parts.values() if p.grad is not None]
                    seen[f"{step}/grad/{layer}.{expert}"] = torch.cat(found)
            others_trained = {name: p for name, p in plain.others.items() if p.requires_grad}
            for name, p in others_trained.items():
                seen[f"{step}/grad/{our_name(name)}"] = p.grad.clone()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
            for (layer, expert), parts in plain.chunks.items():
                seen[f"{step}/after/{layer}.{expert}"] = torch.cat(
                    [p.detach().flatten() for p in _stored(parts, (layer, expert) in model.left_out)]
                )
            for name, p in others_trained.items():
                seen[f"{step}/after/{our_name(name)}"] = p.detach().clone()
    return seen


def _stored(parts: dict[str, Tensor], left_out: bool) -> list[Tensor]:
    """What an expert's chunk holds: of one that is left out all that others train."""
    return [p for p in parts.values() if p.requires_grad or left_out]


def our_name(name: str) -> str:
    """Of a replicated parameter in PEFT's model."""
    name = name.removeprefix("base_model.model.model.").replace(".mlp.gate.weight", ".router")
    return name.replace(".lora_A.default.weight", ".A").replace(".lora_B.default.weight", ".B")


@pytest.fixture(scope="module")
def peft_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models, and what PEFT made of them."""
    pytest.importorskip("peft", reason="PEFT, which the trainer is held to, is not installed")
    folder = tmp_path_factory.mktemp("moe_lora")
    for kind in KINDS:
        save_tiny(kind, folder / kind)
    for model in (*MODELS, *PLACED, FIXED_A):
        save_file(train_with_peft(model, folder / model.kind), folder / f"{model.name}.safetensors")
    return folder


@dataclass(frozen=True)
class Case:
    model: Model
    policy: str
    slots: int | None = None
    checkpointing: bool = False
    rematerialize: bool = False
    shard_layers: bool = False
    shard_size: int | None = None
    plan: PlanMode = "history"
    prefetch: int = 1


def sharded(case: Case, base: Path, world: int) -> tuple[MoeModel, LanguageModelHead]:
    model, layers = load_moe_model(ModelSource(base, None), torch.float64, torch.device("cpu"), MOE_LORA)
    head = LanguageModelHead(model)
    config = EngineConfig(
        planner_of(case.policy),
        topology(world),
        memory_slots=case.slots,
        top_k=2,
        non_moe_flops=1e6,
        rematerialize=case.rematerialize,
        plan=case.plan,
        prefetch=case.prefetch,
    )
    mesh = make_mesh(world, case.shard_size)
    plan = InsertionPlan(
        kind=MOE_LORA,
        lora=case.model.lora,
        lora_of_experts=case.model.lora_of_experts,
        target_modules=case.model.targets,
        train_router=case.model.train_router,
        seed=SEED,
    )
    moe = insert_experts(model, layers, plan, config, expert_groups(mesh))
    for (unit, expert), chunk in moe.engine.shards.named_parameters().items():
        layer = unit.layer
        if (layer, expert) not in case.model.left_out:
            chunk.data.copy_(initial(len(chunk), layer, expert))
    for (layer, module), lora in moe.attention.items():
        for matrix, parameter in (("A", lora.lora_A), ("B", lora.lora_B)):
            name = f"base_model.model.model.layers.{layer}.{module}.lora_{matrix}.default.weight"
            parameter.data.copy_(initial_other(name, parameter.shape))
    if case.shard_layers:
        whole = sum(p.numel() for p in model.parameters())
        shard_frozen_layers(moe, own_group(mesh.sharding_groups()))
        here = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
        assert here < whole or mesh.shard_size == 1
    if case.checkpointing:
        from hecate.model.layers.checkpointing import checkpoint_activations

        checkpoint_activations(moe)
    return moe, head


def close(name: str, got: Tensor | None, wanted: Tensor | None) -> None:
    assert (got is None) == (wanted is None), f"{name}: {'missing' if got is None else 'not expected'}"
    if got is not None and wanted is not None:
        error = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))
        assert error <= TOLERANCE, f"{name}: off by {error:.2e}"


def check_case(rank: int, world: int, case: Case, folder: Path) -> None:
    wanted = load_file(folder / f"{case.model.name}.safetensors")
    moe, head = sharded(case, folder / case.model.kind, world)
    gates: list[Any] = [layer.mlp.gate for layer in moe.model.model.layers]  # type: ignore[union-attr]
    optimizer = ExpertOptimizer(
        Trainables(owned_parameters(moe.engine), moe.replicated_parameters()),
        AdamW(weight_decay=WEIGHT_DECAY),
        LearningRate(LEARNING_RATE),
        torch.device("cpu"),
    )
    seen = gradients_of(optimizer)
    with ExitStack() as stack:
        stack.enter_context(biased_routers(gates, case.model.bias()))
        for in_lockstep in (False, True):  # everywhere, and with their owners
            with moe.engine.evaluation(in_lockstep=in_lockstep), torch.no_grad():
                batch = micro_batch(0, 0, range(0))
                hidden = head.hidden(batch.input_ids, None, torch.arange(LENGTH).expand(ROWS, LENGTH))
                close("logits", head.logits(hidden), wanted["logits"])
        for step in range(STEPS):
            batches = [micro_batch(step, micro, case.model.empty()) for micro in range(MICRO_STEPS)]
            result = train_step(
                moe,
                head,
                optimizer,
                StepBatches(
                    number=step,
                    micro_batches=[rows_of(batch, rank, world) for batch in batches],
                    num_labels=sum(int((batch.targets != -100).sum()) for batch in batches),
                ),
                StepRules(aux_coef=AUX_COEF, max_grad_norm=MAX_NORM),
            )
            close(f"step {step}, loss", torch.tensor(result.loss, dtype=torch.float64), wanted[f"{step}/loss"])
            close(f"step {step}, norm", torch.tensor(result.grad_norm, dtype=torch.float64), wanted[f"{step}/norm"])
            for name, p in {**optimizer.owned, **optimizer.replicated}.items():
                close(f"step {step}, gradient of {name}", seen[name], wanted.get(f"{step}/grad/{name}"))
                close(f"step {step}, {name}", p.detach(), wanted[f"{step}/after/{name}"])
            assert_groups_equal(moe, optimizer)
    assert not case.model.idle or "0/grad/0.1" not in wanted, "no expert was idle"
    kept = optimizer.state_tensors()
    assert not [name for name in kept if name.startswith(tuple(f"owned/{layer}.{expert}/" for layer, expert in case.model.left_out))]


def _check_cases(rank: int, world: int, cases: list[Case], folder: Path) -> None:
    for case in cases:
        try:
            with calibrating_at_whim():
                check_case(rank, world, case, folder)
        except BaseException as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize("world", [3, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 2, 4))])
def test_sharded_training_equals_peft_in_one_process(peft_runs: Path, world: int) -> None:
    """All replicas, some, none; frozen parts that have to make room; at 2 and 4 ranks half of the ranks have no tokens."""
    policies = ("full", "hecate_paper", "static_ep", "random 2", "auto")
    cases = [Case(model, policy, slots=2) for model, policy in zip(MODELS, policies, strict=True)]
    if world % 2 == 0:
        cases += [Case(MODELS[2], "static_ep", checkpointing=True, shard_layers=True), Case(MODELS[4], "full", shard_layers=True)]
        cases += [Case(MODELS[0], "hecate_paper", slots=1, rematerialize=True)]
    run_ranks(world, _check_cases, cases, peft_runs, timeout=240)


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 4))])
def test_gate_or_up_alone_another_rank_and_chosen_experts_equal_peft(peft_runs: Path, world: int) -> None:
    cases = [Case(model, policy, slots=2) for model, policy in zip(PLACED, ("static_ep", "hecate_paper", "auto", "full"), strict=True)]
    run_ranks(world, _check_cases, cases, peft_runs, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_with_a_fixed_a_it_equals_peft_whose_a_is_frozen(peft_runs: Path, world: int) -> None:
    cases = [Case(FIXED_A, "hecate_paper", slots=2, rematerialize=True)]
    if world != 2:
        cases += [Case(FIXED_A, policy, slots=2) for policy in ("full", "static_ep", "random 2", "auto")]
    run_ranks(world, _check_cases, cases, peft_runs, timeout=240)


@pytest.mark.slow
def test_whenever_replicas_come_and_go_it_equals_peft(peft_runs: Path) -> None:
    """With idle experts, and with ranks that have no tokens."""
    cases = [
        Case(MODELS[1], "llep", slots=2, plan="exact", prefetch=0),
        Case(MODELS[1], "random 5", plan="calibrated", checkpointing=True),
        Case(MODELS[2], "random 6", slots=1, plan="calibrated", rematerialize=True, prefetch=2),
        Case(MODELS[4], "random 3", slots=2, plan="exact", rematerialize=True, checkpointing=True),
    ]
    run_ranks(3, _check_cases, cases, peft_runs, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "shard_size"), [(2, 1), (4, 1), (4, 2)])
def test_sharding_groups_smaller_than_the_world_equal_peft(peft_runs: Path, world: int, shard_size: int) -> None:
    cases = [
        Case(MODELS[0], "hecate_paper", slots=2),
        Case(MODELS[1], "static_ep"),
        Case(MODELS[2], "random 2", slots=1, rematerialize=True),
    ]
    if shard_size > 1:
        cases += [Case(MODELS[3], "auto", slots=2, shard_layers=True), Case(MODELS[4], "full", checkpointing=True)]
    run_ranks(world, _check_cases, [replace(case, shard_size=shard_size) for case in cases], peft_runs, timeout=240)
