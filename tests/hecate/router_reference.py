"""Sharded training with any router, held to the plain reference of it, for all tests of that kind."""

from __future__ import annotations

from dataclasses import asdict

import torch

from hecate.elastic.move_experts import move_experts
from hecate.model.moe_model import MoeModel
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables
from hecate.parallel.values.units import Unit
from hecate.train.steps.step import StepBatches, StepRules, train_step
from tests import plain_mixlora
from tests.hecate.equivalence_cases import (
    AUX_COEF,
    LEARNING_RATE,
    MAX_NORM,
    MICRO_STEPS,
    ROWS,
    WEIGHT_DECAY,
    Case,
    micro_batch,
    random_owners,
    router_bias,
    rows_of,
    sharded,
    tiny_llama,
)
from tests.hecate.watching import gradients_of
from tests.plain_routers import PlainRouted, plain_sample_aux

TOLERANCE = 1e-10
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def aux_coef(case: Case) -> float:
    return 0.0 if case.router.bias == "balancing" else AUX_COEF


class RoutedReference:
    """The plain model with the values that the sharded one begins with, and its own optimizer."""

    def __init__(self, case: Case, moe: MoeModel) -> None:
        self.case = case
        self.model = tiny_llama(case.dtype).requires_grad_(False)
        self.layers: list[PlainRouted] = []
        self.named: dict[str, torch.Tensor] = {}
        """parameters by the names that checkpoints have, experts whole"""
        self.chunks: dict[str, list[torch.Tensor]] = {}
        values = moe.replicated_parameters()
        words = {name: value for name, value in asdict(case.router).items() if name in ("score", "bias", "bias_in_weights", "weights")}
        specs = moe.engine.shards.families[Unit(0)].layout().trainable
        for index, layer in enumerate(self.model.model.layers):
            experts = []
            for expert in range(case.num_experts):
                random = torch.Generator().manual_seed(1000 + 50 * index + expert)
                flat = torch.randn(sum(s.numel for s in specs), generator=random, dtype=torch.float64) * 0.2
                parts = flat.split([s.numel for s in specs])
                experts.append({s.name: part.view(s.shape) for s, part in zip(specs, parts, strict=True)})
            router = values[f"layers.{index}.router"].detach()
            layer.mlp = PlainRouted(layer.mlp, router, router_bias(case), experts, 0.7, case.top_k, 50, **words)
            self.layers.append(layer.mlp)
            self.named[f"layers.{index}.router"] = layer.mlp.router
            if case.router.bias == "learned":
                self.named[f"layers.{index}.router.bias"] = layer.mlp.expert_bias
            for expert in range(case.num_experts):
                self.chunks[f"{index}.{expert}"] = [layer.mlp.experts[expert][s.name.replace(".", "_")] for s in specs]
            for name in ATTENTION:
                key = f"layers.{index}.self_attn.{name}"
                lora = plain_mixlora.PlainLora(
                    getattr(layer.self_attn, name), values[f"{key}.A"].detach(), values[f"{key}.B"].detach(), 0.7
                )
                setattr(layer.self_attn, name, lora)
                self.named[f"{key}.A"], self.named[f"{key}.B"] = lora.a, lora.b
        self.parameters = [p for parts in self.chunks.values() for p in parts] + list(self.named.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def step(self, step: int, empty_rows: range) -> tuple[float, float, float, dict[str, torch.Tensor | None]]:
        """(cross-entropy, balance loss, gradient norm, clipped gradients); None for an expert without tokens. The optimizer steps."""
        case = self.case
        batches = [micro_batch(step, micro, empty_rows) for micro in range(MICRO_STEPS)]
        num_labels = sum(int((b.targets != -100).sum()) for b in batches)
        num_samples = sum(int(b.segment_ids.amax(1).sum()) for b in batches)
        total, balance, reached = 0.0, 0.0, set()
        for batch in batches:
            loss, cross = plain_mixlora.plain_loss(self.model, self.layers, batch, num_labels, MICRO_STEPS, 0.0)
            if case.router.bias != "balancing":
                by_sample = case.router.balance == "sample"
                aux = plain_sample_aux(self.layers, batch, num_samples) if by_sample else plain_mixlora.plain_aux(self.layers) / MICRO_STEPS
                loss, balance = loss + aux_coef(case) * aux, balance + float(aux.detach())
            loss.backward()
            total += cross
            for index, layer in enumerate(self.layers):
                layer.note_loads()
                reached |= {f"{index}.{expert}" for expert, count in enumerate(layer.seen) if count}
        for name in set(self.chunks) - reached:
            for parameter in self.chunks[name]:
                parameter.grad = None
        norm = plain_mixlora.clip(self.parameters, MAX_NORM)
        grads = {name: parameter.grad.clone() if parameter.grad is not None else None for name, parameter in self.named.items()}
        for name, parts in self.chunks.items():
            flat = [p.grad.flatten() for p in parts if p.grad is not None]
            grads[name] = torch.cat(flat) if flat else None
        self.optimizer.step()
        self.optimizer.zero_grad()
        for layer in self.layers:
            layer.move_bias(case.router.bias_rate)
        return total, balance, norm, grads

    def values(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.named.items()} | {
            name: torch.cat([p.detach().flatten() for p in parts]) for name, parts in self.chunks.items()
        }


def close(name: str, got: torch.Tensor | None, wanted: torch.Tensor | None) -> None:
    if got is None or wanted is None:
        assert got is None or not got.any(), f"{name}: not expected"
        assert wanted is None or not wanted.any(), f"{name}: missing"
        return
    error = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)) if got.numel() else 0.0
    assert error <= TOLERANCE, f"{name}: off by {error:.2e}"


def check_router(rank: int, world: int, case: Case, *, reshard: bool = False) -> None:
    """Raises AssertionError where losses, gradients, parameters or a balancing bias of any step differ from the reference's.

    Args:
        reshard: whether experts get other owners after each step.
    """
    moe, head = sharded(case, world)
    reference = RoutedReference(case, moe)
    owned = {f"{unit}.{expert}": p for (unit, expert), p in moe.engine.shards.named_parameters().items()}
    trainables = Trainables(owned, moe.replicated_parameters(), routers=moe.router_modules)
    optimizer = ExpertOptimizer(trainables, AdamW(weight_decay=WEIGHT_DECAY), LearningRate(LEARNING_RATE), torch.device("cpu"))
    seen = gradients_of(optimizer)
    empty_rows = range((world - 1) * ROWS // world, ROWS) if case.scenario == "empty rank" and world > 1 else range(0)
    idle = 0
    for step in range(case.steps):
        batches = [micro_batch(step, micro, empty_rows) for micro in range(MICRO_STEPS)]
        result = train_step(
            moe,
            head,
            optimizer,
            StepBatches(
                number=step,
                micro_batches=[rows_of(batch, rank, world) for batch in batches],
                num_labels=sum(int((b.targets != -100).sum()) for b in batches),
                num_samples=sum(int(b.segment_ids.amax(1).sum()) for b in batches),
            ),
            StepRules(aux_coef=aux_coef(case), max_grad_norm=MAX_NORM),
        )
        loss, balance, norm, grads = reference.step(step, empty_rows)
        for name, got, wanted in (("loss", result.loss, loss), ("aux", result.aux_loss, balance), ("norm", result.grad_norm, norm)):
            assert abs(got - wanted) <= TOLERANCE * max(1, abs(wanted)), f"step {step}: {name} {got} against {wanted}"
        values = reference.values()
        for name, parameter in {**owned, **moe.replicated_parameters()}.items():
            close(f"step {step}, gradient of {name}", seen[name], grads[name])
            close(f"step {step}, {name}", parameter.detach(), values[name])
        for index, layer in enumerate(reference.layers):
            if case.router.bias == "balancing":
                bias = optimizer.buffers[f"layers.{index}.router.bias"]
                assert torch.equal(bias, layer.expert_bias), f"step {step}: the bias of layer {index}"
        idle += sum(grads[name] is None for name in owned)
        if reshard:
            move_experts(moe.engine, optimizer, random_owners(moe, 10 * step + world))
            owned = {f"{unit}.{expert}": p for (unit, expert), p in moe.engine.shards.named_parameters().items()}
    assert case.scenario != "idle experts" or case.num_experts <= case.top_k or idle or world > 1, "no expert was idle"
    if case.router.bias == "balancing":
        assert any(buffer.any() for buffer in optimizer.buffers.values()), "no bias has moved"


def check_routers(rank: int, world: int, cases: list[Case], reshard: bool = False) -> None:
    for case in cases:
        try:
            check_router(rank, world, case, reshard=reshard)
        except BaseException as error:
            raise AssertionError(f"{case}: {error}") from error
