"""Routers without any of this project's machinery, for the plain references: each token's choice by a loop, each loss written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.plain_mixlora import PlainMixlora


class PlainChoices:
    """A router's choices for a plain module with `router` [E, D] and `top_k`; what they are is said in words, as the configuration has
    them."""

    router: Tensor
    top_k: int
    expert_TK: Tensor | None

    def set_choices(self, *, score: str, bias: str, bias_in_weights: bool, weights: str) -> None:
        self.score, self.kind_of_bias, self.bias_in_weights, self.weights = score, bias, bias_in_weights, weights
        nothing = torch.zeros_like(self.router[:, 0].detach())
        self.expert_bias = nn.Parameter(nothing) if bias == "learned" else nothing
        self.seen: list[int] = [0] * len(nothing)
        """assignments of each expert since the bias moved"""

    def choose(self, logit_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.kind_of_bias == "learned":
            logit_TE = logit_TE + self.expert_bias
        score = torch.softmax(logit_TE, -1) if self.score == "softmax" else logit_TE.sigmoid()
        biased = score + self.expert_bias if self.kind_of_bias == "balancing" else score
        chosen = []
        for token in biased.tolist():
            chosen.append(sorted(range(len(token)), key=lambda expert, token=token: (-token[expert], expert))[: self.top_k])
        expert_TK = torch.tensor(chosen, dtype=torch.int64).view(-1, self.top_k)
        weighed = (biased if self.bias_in_weights else score).gather(1, expert_TK)
        if self.weights == "one":
            weighed = torch.ones_like(weighed)
        if self.weights == "renormalised":
            weighed = weighed / weighed.sum(-1, keepdim=True)
        return score / score.sum(-1, keepdim=True), weighed, expert_TK

    def note_loads(self) -> None:
        """Count what the last forward pass has chosen."""
        assert self.expert_TK is not None
        for expert in self.expert_TK.flatten().tolist():
            self.seen[expert] += 1

    def move_bias(self, rate: float) -> None:
        """b += rate * sign(mean count - count)."""
        mean = sum(self.seen) / len(self.seen)
        moves = [rate * ((count < mean) - (count > mean)) for count in self.seen]
        if self.kind_of_bias == "balancing":
            self.expert_bias += torch.tensor(moves, dtype=self.expert_bias.dtype)
        self.seen = [0] * len(self.seen)


class PlainRouted(PlainChoices, PlainMixlora):
    """MixLoRA with other routers."""

    def __init__(self, *args: Any, score: str, bias: str, bias_in_weights: bool, weights: str, **named: Any) -> None:
        super().__init__(*args, **named)
        self.set_choices(score=score, bias=bias, bias_in_weights=bias_in_weights, weights=weights)


def plain_sample_aux(layers: Sequence[Any], batch: Any, num_samples: int) -> Tensor:
    """Sum over the batch's samples of sum_e mean(P_e) * mean(onehot_e), of all layers' tokens in one pile, divided by `num_samples`.

    `batch` is what the layers have just seen, sample by sample, as `plain_loss` takes it apart.
    """
    lengths = [
        int((batch.segment_ids[row] == segment).sum())
        for row in range(len(batch.input_ids))
        for segment in range(1, int(batch.segment_ids[row].max()) + 1)
    ]
    probs = [layer.prob.split(lengths) for layer in layers]
    experts = [layer.expert_TK.split(lengths) for layer in layers]
    total = layers[0].prob.new_zeros(())
    for sample in range(len(lengths)):
        prob = torch.cat([of_layer[sample] for of_layer in probs])
        chosen = torch.cat([of_layer[sample] for of_layer in experts])
        onehot = F.one_hot(chosen, prob.shape[1]).sum(1).to(prob.dtype)
        total = total + (prob.mean(0) * onehot.mean(0)).sum()
    return total / num_samples
