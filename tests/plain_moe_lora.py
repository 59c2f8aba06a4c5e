"""LoRA on the experts of MoE models in one process, by PEFT and plain autograd: what the trainer is held to. Shares no code with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
EXPERTS = 5
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 20, "norm_topk_prob": True},
    "olmoe": {"num_experts": EXPERTS, "norm_topk_prob": False, "intermediate_size": 20},
    "qwen2_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 12},
}
MORE_KINDS: dict[str, dict[str, Any]] = {
    "granitemoe": {"num_local_experts": EXPERTS, "logits_scaling": 4.0, "residual_multiplier": 0.5},
}
PROJECTIONS = ("gate_up_proj", "down_proj")


def save_tiny(kind: str, folder: Path, dtype: torch.dtype = torch.float64, **changes: Any) -> None:
    """A random model in a folder, in the layout of real checkpoints: one tensor a projection and expert."""
    torch.manual_seed(len(kind))
    config = AutoConfig.for_model(kind, **{**SIZES, **(KINDS | MORE_KINDS)[kind], **changes})
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)


def peft_model(
    folder: Path, rank: int, alpha: int, modules: list[str], dtype: torch.dtype = torch.float64, *, expert_rank: int | None = None
) -> Any:
    """The model of a folder with PEFT's adapters on its experts, of a rank of their own if it is given, and on `modules`."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    parameters = [f"mlp.experts.{name}" for name in PROJECTIONS]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=modules, target_parameters=parameters)
    if expert_rank is not None:
        config.rank_pattern = dict.fromkeys(parameters, expert_rank)
    return get_peft_model(model, config).eval()


@contextmanager
def biased_routers(gates: list[nn.Module], bias_E: Tensor) -> Iterator[None]:
    """Add to the logits of routers, so that experts are idle or hot whatever the weights say.

    They also work in the model's own type throughout, and not in float32, whose rounding would hide mistakes.
    """
    linear, softmax = F.linear, F.softmax

    def with_bias(gate: nn.Module) -> Any:
        plain = gate.forward

        def forward(x: Tensor) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(F, "linear", lambda *given: linear(*given) + bias_E)
                patch.setattr(F, "softmax", lambda logits, dim, dtype=None: softmax(logits, dim=dim))
                patch.setattr(Tensor, "float", lambda self: self)
                return plain(x)

        return forward

    for gate in gates:
        gate.forward = with_bias(gate)
    try:
        yield
    finally:
        for gate in gates:
            del gate.forward


class PlainMoeLora:
    """Leaves for each expert's pairs, put together into the tensors that PEFT has: an idle expert has no gradient of its own."""

    def __init__(
        self, model: Any, chunks: dict[tuple[int, int], dict[str, Tensor]], others: dict[str, Tensor], half: int | None = None
    ) -> None:
        """Args:
        chunks: (layer, expert) -> gate_up_proj.A [r, D], .B [2F, r], down_proj.A [r, F], .B [D, r].
        others: the model's further trained tensors, by its own names.
        half: 0 or 1: gate_up_proj.B is [F, r], gate's or up's rows alone.
        """
        self.model, self.half = model, half
        self.chunks = {key: {name: nn.Parameter(value.clone()) for name, value in parts.items()} for key, parts in chunks.items()}
        self.others = {name: nn.Parameter(value.clone()) for name, value in others.items()}
        self.gates = [layer.mlp.gate for layer in model.base_model.model.model.layers]
        self.chosen: list[Tensor] = []
        self.logits: list[Tensor] = []
        for gate in self.gates:
            gate.register_forward_hook(self._note)

    def _note(self, _gate: nn.Module, _inputs: Any, outputs: Any) -> None:
        self.logits.append(outputs[0])
        self.chosen.append(outputs[2])

    def freeze_a(self) -> None:
        for parts in (*self.chunks.values(), self.others):
            for name, parameter in parts.items():
                parameter.requires_grad_(not (name.endswith(".A") or "lora_A" in name))

    def parameters(self) -> list[nn.Parameter]:
        return [p for parts in self.chunks.values() for p in parts.values()] + list(self.others.values())

    def tensors(self) -> dict[str, Tensor]:
        """What PEFT's modules hold, differentiable in the leaves."""
        tensors: dict[str, Tensor] = dict(self.others)
        experts = 1 + max(expert for _, expert in self.chunks)
        for layer in {layer for layer, _ in self.chunks}:
            at = f"base_model.model.model.layers.{layer}.mlp.experts"
            for name, where in (("gate_up_proj", f"{at}.base_layer"), ("down_proj", at)):
                parts = [self.chunks[layer, expert] for expert in range(experts)]
                tensors[f"{where}.lora_A.default.weight"] = torch.cat([part[f"{name}.A"] for part in parts])
                tensors[f"{where}.lora_B.default.weight"] = torch.stack([part[f"{name}.B"] for part in parts], dim=2).flatten(1)
                if self.half is not None and name == "gate_up_proj":
                    b = tensors[f"{where}.lora_B.default.weight"]
                    rows = [torch.zeros_like(b), torch.zeros_like(b)]
                    rows[self.half] = b
                    tensors[f"{where}.lora_B.default.weight"] = torch.cat(rows)
        return tensors

    def __call__(self, **inputs: Any) -> Tensor:
        """Logits [B, S, vocabulary]."""
        self.chosen, self.logits = [], []
        return torch.func.functional_call(self.model, self.tensors(), kwargs={**inputs, "use_cache": False}).logits

    def loss(self, batch: Any, num_labels: int, micro_steps: int, aux_coef: float) -> tuple[Tensor, float]:
        """(loss share of this micro-step, cross-entropy part of it); each packed sample a row of its own, padded behind."""
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        samples = []
        for row in range(len(batch.input_ids)):
            for segment in range(1, int(batch.segment_ids[row].max()) + 1):
                here = batch.segment_ids[row] == segment
                samples.append((batch.input_ids[row, here], batch.targets[row, here]))
        length = max(len(ids) for ids, _ in samples)
        ids, targets = torch.zeros(len(samples), length, dtype=torch.int64), torch.full((len(samples), length), -100)
        valid = torch.zeros(len(samples), length, dtype=torch.bool)
        for i, (sample_ids, sample_targets) in enumerate(samples):
            ids[i, : len(sample_ids)], targets[i, : len(sample_ids)], valid[i, : len(sample_ids)] = sample_ids, sample_targets, True
        logits = self(input_ids=ids)
        cross = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / num_labels
        kept = valid.flatten()
        self.chosen = [chosen[kept] for chosen in self.chosen]
        aux = load_balancing_loss_func(tuple(one[kept] for one in self.logits), self.logits[0].shape[1], self.chosen[0].shape[1])
        return cross + aux_coef * aux / micro_steps, float(cross.detach())

    def reached(self) -> set[tuple[int, int]]:
        """(layer, expert) of the last loss's tokens."""
        return {(layer, int(expert)) for layer, chosen in enumerate(self.chosen) for expert in chosen.unique()}
