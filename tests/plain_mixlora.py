"""MixLoRA without any of this project's machinery: one process, plain autograd, every formula written out.

The reference of the equivalence suite. It shares no code with hecate: only the values of the parameters are handed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (x @ a.T) @ b.T


class PlainLora(nn.Module):
    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, scale: float, *, of: Product = product, trains_a: bool = True) -> None:
        super().__init__()
        self.base, self.scale, self.of = base, scale, of
        self.a, self.b = nn.Parameter(a.clone(), requires_grad=trains_a), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.of(x, self.a, self.b)


class PlainMixlora(nn.Module):
    """One expert after the other over all of its tokens; the whole FFN for each."""

    def __init__(
        self,
        mlp: Any,
        router: Tensor,
        bias: Tensor,
        experts: list[dict[str, Tensor]],
        scale: float,
        top_k: int,
        logit_scale: float,
        *,
        of: Product = product,
        fixed: dict[str, Tensor] | None = None,
        pair_of: Callable[[int, str], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """`fixed`: what all experts have alike and do not train, by the names that `experts` would have it under. `pair_of`: makes A and B
        of an expert's projection, in place of its own."""
        super().__init__()
        self.pair_of = pair_of
        self.of, self.fixed = of, {} if fixed is None else fixed
        self.mlp, self.scale, self.top_k, self.logit_scale = mlp, scale, top_k, logit_scale
        self.router, self.bias = nn.Parameter(router.clone()), bias
        self.experts = nn.ModuleList(
            nn.ParameterDict({name.replace(".", "_"): nn.Parameter(t.clone()) for name, t in expert.items()}) for expert in experts
        )
        self.valid: Tensor | None = None
        self.prob: Tensor | None = None
        self.expert_TK: Tensor | None = None
        self.forced_TK: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        assert self.valid is not None
        x = hidden.reshape(-1, hidden.shape[-1])
        prob, weight, expert_TK = self.choose(x @ (self.logit_scale * self.router).T + self.bias)
        self.prob, self.expert_TK = prob[self.valid], expert_TK[self.valid]
        y = torch.zeros_like(x)
        for number in range(len(self.experts)):
            share = (weight * (expert_TK == number)).sum(-1, keepdim=True) * self.valid[:, None]
            gate = self._linear(number, "gate_proj", x)
            up = self._linear(number, "up_proj", x)
            y = y + share * self._linear(number, "down_proj", F.silu(gate) * up)
        return y.view_as(hidden)

    def choose(self, logit_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(probabilities [T, E], weights [T, K], experts [T, K]) of tokens with these logits."""
        prob = F.softmax(logit_TE, dim=-1)
        if self.forced_TK is None:
            weight, expert_TK = prob.topk(self.top_k, dim=-1)
        else:
            weight, expert_TK = prob.gather(1, self.forced_TK), self.forced_TK
        return prob, weight / weight.sum(-1, keepdim=True), expert_TK

    def _linear(self, number: int, name: str, x: Tensor) -> Tensor:
        a, b = self._pair(self.experts[number], name) if self.pair_of is None else self.pair_of(number, name)
        return getattr(self.mlp, name)(x) + self.scale * self.of(x, a, b)

    def _pair(self, expert: Any, name: str) -> tuple[Tensor, Tensor]:
        if f"{name}.U" in self.fixed:  # NOLA: an expert has the coefficients of fixed matrices
            fixed, bases = self.fixed, len(self.fixed[f"{name}.U"])
            a = fixed[f"{name}.A0"] + sum(expert[f"{name}_a"][k] * fixed[f"{name}.U"][k] for k in range(bases)) / math.sqrt(bases)
            return a, sum(expert[f"{name}_b"][k] * fixed[f"{name}.V"][k] for k in range(bases)) / math.sqrt(bases)
        return self.fixed[f"{name}.A"] if self.fixed else expert[f"{name}_A"], expert[f"{name}_B"]


def plain_aux(layers: Sequence[Any]) -> Tensor:
    """HF's formula: all layers' tokens in one pile."""
    prob = torch.cat([layer.prob for layer in layers if layer.prob is not None])
    expert_TK = torch.cat([layer.expert_TK for layer in layers if layer.expert_TK is not None])
    experts = prob.shape[1]
    total = prob.new_zeros(())
    for k in range(expert_TK.shape[1]):
        f = F.one_hot(expert_TK[:, k], experts).to(prob.dtype).mean(0)
        total = total + experts * (f * prob.mean(0)).sum()
    return total


def plain_loss(
    model: Any,
    layers: Sequence[Any],
    batch: Any,
    num_labels: int,
    micro_steps: int,
    aux_coef: float,
    aux: Callable[[Sequence[Any]], Tensor] = plain_aux,
) -> tuple[Tensor, float]:
    """(loss share of this micro-step, cross-entropy part of it).

    Each sample of a packed row becomes a row of its own, padded behind, where causal attention cannot see it: no mask is needed.
    """
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
    for layer in layers:
        layer.valid = valid.flatten()
    if batch.routed is not None:
        force(layers, batch, length)
    logits = model(input_ids=ids, use_cache=False).logits
    cross = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / num_labels
    return cross + aux_coef * aux(layers) / micro_steps, float(cross.detach())


def force(layers: Sequence[Any], batch: Any, length: int) -> None:
    """Give each layer its part of the batch's routing, in `plain_loss`'s order of tokens; padding goes to the first experts."""
    for number, layer in enumerate(layers):
        rows = []
        for row in range(len(batch.input_ids)):
            for segment in range(1, int(batch.segment_ids[row].max()) + 1):
                of_sample = batch.routed[row, batch.segment_ids[row] == segment, number].long()
                padding = torch.arange(layer.top_k).expand(length - len(of_sample), -1)
                rows += [of_sample, padding]
        layer.forced_TK = torch.cat(rows)


def clip(parameters: list[Tensor], limit: float) -> float:
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None))
    if norm > limit:
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(limit / (norm + 1e-6))
    return norm
