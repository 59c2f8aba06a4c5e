"""The router of a token's hidden state: the experts with the largest scores.

Shapes: T tokens without padding, D hidden, E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hecate import faults
from hecate.experts.routers.router import LOSSES, WEIGHTS, Router, RouterSite, Routing, TokenFeatures, sample_balance_loss
from hecate.experts.seeding import generator
from hecate.io.registry import registered
from hecate.parallel.comm.device_tables import copy_to

SCORES: dict[str, Callable[[Tensor], Tensor]] = registered("hecate.experts.routers.scores", "SCORE")
"""what an expert's logit becomes, [T, E] -> [T, E], by the name that `moe.router.score` gives"""


def top_experts(score_TE: Tensor, k: int) -> Tensor:
    """int64 [T, k]: the indices of the k largest scores of each token, best first, and of equal ones the lower first."""
    score_TE = score_TE.detach()
    if k == 1:
        return score_TE.argmax(dim=-1, keepdim=True)
    # topk leaves the order of equal scores open.
    return score_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()


class TopKRouter(Router):
    """A score of x W' for each expert; the experts with the k largest, of equal ones the lower. What is made of that, `RouterConfig` says.

    It works in its own dtype (float32 or wider), whatever x comes in.
    """

    replays: ClassVar[bool] = True
    bias: Tensor | None

    def __init__(self, site: RouterSite) -> None:
        super().__init__()
        self.top_k = site.top_k
        self.choices = choices = site.choices
        random = generator(site.seed, "router", str(site.unit))
        weight = torch.empty(site.num_experts, site.hidden, dtype=torch.float64).normal_(0, 0.02, generator=random)
        self.weight = nn.Parameter(weight.to(device=site.device, dtype=site.dtype))
        nothing_E = torch.zeros(site.num_experts, dtype=site.dtype, device=site.device)
        if choices.bias == "balancing":
            self.register_buffer("bias", nothing_E)
        else:
            self.bias = nn.Parameter(nothing_E) if choices.bias == "learned" else None
        self.loss = None if choices.bias == "balancing" else LOSSES[choices.balance]

    def route(self, x_TD: Tensor, features: TokenFeatures) -> Routing:
        routing = self(x_TD) if features.forced_TK is None else self(x_TD, features.forced_TK)
        if self.loss is sample_balance_loss and features.samples is not None:
            means = features.samples.means(features.valid_T, routing.prob_TE, routing.expert_TK)
            return replace(routing, samples=means)
        return routing

    def logits(self, x_TD: Tensor) -> Tensor:
        return wide_linear(x_TD, self.weight)

    def forward(self, x_TD: Tensor, forced_TK: Tensor | None = None) -> Routing:
        logit_TE = self.logits(x_TD)
        if isinstance(self.bias, nn.Parameter):
            logit_TE = logit_TE + self.bias
        faults.at("router", logit_TE)
        moved_E = self._moved_bias()
        if logit_TE.is_cuda and moved_E is None and (self.choices.score, self.choices.weights) == ("softmax", "renormalised"):
            return softmax_of_largest(logit_TE, self.top_k, forced_TK)
        score_TE = SCORES[self.choices.score](logit_TE)
        biased_TE = score_TE if moved_E is None else score_TE + moved_E
        expert_TK = top_experts(biased_TE, self.top_k) if forced_TK is None else forced_TK
        weighed_TE = biased_TE if self.choices.bias_in_weights else score_TE
        # The load-balancing loss is made for probabilities that sum to 1.
        prob_TE = score_TE if self.choices.score == "softmax" else score_TE / score_TE.sum(dim=-1, keepdim=True)
        return Routing(prob_TE, expert_TK, WEIGHTS[self.choices.weights](weighed_TE.gather(1, expert_TK)))

    def after_step(self, load_E: Tensor) -> None:
        """Move a balancing bias by `bias_rate` towards even loads."""
        bias_E = self._moved_bias()
        if bias_E is not None:
            # In whole numbers, so that a load that is just the mean moves nothing.
            direction_E = torch.sign(load_E.sum() - len(load_E) * load_E).to(bias_E.dtype)
            bias_E += self.choices.bias_rate * copy_to(direction_E, bias_E.device)

    def _moved_bias(self) -> Tensor | None:
        return None if isinstance(self.bias, nn.Parameter) else self.bias


def softmax_of_largest(logit_TE: Tensor, top_k: int, forced_TK: Tensor | None = None) -> Routing:
    """The largest of a softmax, or those given, renormalised, but for rounding, with half the operators in the backward pass, which count
    on a GPU: softmax over the k largest logits."""
    expert_TK = top_experts(logit_TE, top_k) if forced_TK is None else forced_TK
    return Routing(F.softmax(logit_TE, dim=-1), expert_TK, F.softmax(logit_TE.gather(1, expert_TK), dim=-1))


def wide_linear(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x W' computed in the weight's dtype, which may be wider than x's: [T, E]. What is kept for the backward pass is x as it came."""
    if x_TD.dtype == weight_ED.dtype:
        return F.linear(x_TD, weight_ED)
    return _WideLinear.apply(x_TD, weight_ED)


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return F.linear(x_TD.to(weight_ED.dtype), weight_ED)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        (grad_TE,) = grads
        dx_TD = (grad_TE @ weight_ED).to(x_TD.dtype) if ctx.needs_input_grad[0] else None
        # In the order of torch's own backward pass, so that results are the same bits.
        dweight_ED = (x_TD.to(weight_ED.dtype).T @ grad_TE).T if ctx.needs_input_grad[1] else None
        return dx_TD, dweight_ED


ROUTER = TopKRouter
