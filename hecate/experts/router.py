"""Routers: which experts each token goes to, and with which weights. Softmax over all experts, the k largest, as in Mixtral and MixLoRA.

Shapes: N tokens of a micro-step with padding among them, T tokens without padding, D hidden, E experts, K experts of a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hecate.experts.seeding import generator
from hecate.parallel.units import Unit


@dataclass(frozen=True)
class RouterStats:
    """One layer's routing of the valid tokens of one forward pass on this rank."""

    prob_sum_E: Tensor
    """probabilities summed over tokens; differentiable"""
    count_KE: Tensor
    """int64: tokens whose k-th expert is expert e"""


@dataclass(frozen=True)
class Routing:
    """The router's decision for some tokens."""

    prob_TE: Tensor
    """the probability of each expert, such as a softmax over all, in the router's dtype; the load-balancing loss is made of it"""
    expert_TK: Tensor
    """int64: the chosen experts, best first"""
    weight_TK: Tensor
    """what each expert's result is multiplied by; new routers renormalize the chosen probabilities to sum to 1"""

    def stats(self) -> RouterStats:
        """What the load-balancing loss needs of it."""
        count_KE = torch.zeros((self.expert_TK.shape[1], self.prob_TE.shape[1]), dtype=torch.int64, device=self.expert_TK.device)
        count_KE.scatter_add_(1, self.expert_TK.T, torch.ones_like(self.expert_TK.T))
        return RouterStats(self.prob_TE.sum(0), count_KE)


@dataclass(frozen=True)
class TokenFeatures:
    """What a router may need of the tokens beside their hidden states."""

    valid_T: Tensor | None = None
    """int64 indices of the T tokens among all N; None: all are"""
    decided: tuple[Tensor, ...] = ()
    """what the model itself has decided for the T tokens: experts [T, K] and weights [T, K]; nothing where the router is to decide"""


def load_balancing_loss(stats: Mapping[Unit, RouterStats], group: dist.ProcessGroup) -> Tensor:
    """This rank's share of E · sum_{k,e} f_{k,e} · P_e; the shares of all ranks add up to the loss. Balanced routing gives top_k.

    f is the share of tokens whose k-th choice is e, P the mean probability of e, both over the tokens of all ranks and the layers
    with the same number of experts; several such groups are averaged by their number of layers. f carries no gradient. Every rank
    must call it with the same layers; a rank without tokens, too. Source: HF Mixtral's `load_balancing_loss_func`.
    """
    by_shape: dict[tuple[int, ...], list[RouterStats]] = {}
    for unit in sorted(stats):
        by_shape.setdefault(tuple(stats[unit].count_KE.shape), []).append(stats[unit])
    counts = [torch.stack([s.count_KE for s in group_stats]).sum(0) for group_stats in by_shape.values()]
    flat = torch.cat([count.flatten() for count in counts])
    if dist.get_world_size(group) > 1:
        dist.all_reduce(flat, group=group)
    total = torch.zeros((), dtype=next(iter(stats.values())).prob_sum_E.dtype, device=flat.device)
    for (k_e, group_stats), count in zip(by_shape.items(), flat.split([c.numel() for c in counts]), strict=True):
        count_KE = count.view(k_e)
        num_tokens = count_KE[0].sum().clamp(min=1).to(total.dtype)  # times layers
        prob_E = torch.stack([s.prob_sum_E for s in group_stats]).sum(0) / num_tokens
        share_E = count_KE.sum(0).to(total.dtype) / num_tokens
        total = total + len(group_stats) / len(stats) * k_e[1] * (share_E * prob_E).sum()
    return total


BalanceLoss = Callable[[Mapping[Unit, RouterStats], dist.ProcessGroup], Tensor]
"""from the stats of some units to this rank's share of their loss; every rank calls it with the same units"""


class Router(nn.Module, ABC):
    """One unit's router.

    Its buffers, if it has any, are float vectors of one number per expert, alike on every rank. They are saved in checkpoints and adapters,
    and sent to ranks that come new.
    """

    loss = staticmethod(load_balancing_loss)
    """what balances its experts: the units whose routers have the same loss are balanced together (`MoeModel.balance_loss`)"""

    @property
    @abstractmethod
    def trained(self) -> nn.Parameter | None:
        """Its weight [E, D], if that is trained: alike on every rank, in checkpoints, and exported. All other parameters must be frozen."""

    @abstractmethod
    def route(self, x_TD: Tensor, features: TokenFeatures) -> Routing:
        """The decision for T tokens; differentiable in the weights, the probabilities and the tokens."""

    def after_step(self, load_E: Tensor) -> None:
        """Change what is not learned by gradients, such as a bias that balances the experts. Most routers have nothing of the kind.

        It is called on every rank alike, after each optimizer step that was taken, and not between micro-steps.

        Args:
            load_E: int64, on the CPU: the assignments of each expert in the step, of all ranks and micro-steps together.
        """


class MakeRouter(Protocol):
    """Makes the new router of a unit: a class of routers, or a function."""

    def __call__(
        self, hidden: int, num_experts: int, top_k: int, /, *, unit: Unit, seed: int, dtype: torch.dtype, device: torch.device
    ) -> Router:
        """The router is drawn from names, so that it is the same on every rank.

        Args:
            dtype: of what is trained: float32 or wider.
        """
        ...


class TopKRouter(Router):
    """p = softmax(x W'), the k largest renormalized. Works in its own dtype (float32 or wider) whatever x comes in."""

    def __init__(
        self, hidden: int, num_experts: int, top_k: int, *, unit: Unit, seed: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.top_k = top_k
        random = generator(seed, "router", str(unit))
        weight = torch.empty(num_experts, hidden, dtype=torch.float64).normal_(0, 0.02, generator=random)
        self.weight = nn.Parameter(weight.to(device=device, dtype=dtype))

    @property
    def trained(self) -> nn.Parameter:
        return self.weight

    def route(self, x_TD: Tensor, features: TokenFeatures) -> Routing:
        return self(x_TD)

    def logits(self, x_TD: Tensor) -> Tensor:
        return wide_linear(x_TD, self.weight)

    def forward(self, x_TD: Tensor) -> Routing:
        logits_TE = self.logits(x_TD)
        return (softmax_of_largest if logits_TE.is_cuda else largest_of_softmax)(logits_TE, self.top_k)


def largest_of_softmax(logits_TE: Tensor, top_k: int) -> Routing:
    """The k largest probabilities, renormalized."""
    prob_TE = F.softmax(logits_TE, dim=-1)
    top_TK, expert_TK = prob_TE.topk(top_k, dim=-1)
    return Routing(prob_TE, expert_TK, top_TK / top_TK.sum(dim=-1, keepdim=True))


def softmax_of_largest(logits_TE: Tensor, top_k: int) -> Routing:
    """The same but for rounding, with half the operators in the backward pass, which count on a GPU: softmax over the k largest logits."""
    top_TK, expert_TK = logits_TE.topk(top_k, dim=-1)
    return Routing(F.softmax(logits_TE, dim=-1), expert_TK, F.softmax(top_TK, dim=-1))


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


class ModelRouter(Router):
    """The router of an MoE model, which stays in its place in the model: frozen as it was loaded, or trained in float32 or wider.

    The model's block calls its router, and then its experts with what was decided. The logits, which the block keeps to itself, are noted
    at the first call for the second one: the load-balancing loss needs their probabilities.
    """

    def __init__(self, own: nn.Module, trained_dtype: torch.dtype | None) -> None:
        """Args:
        own: the model's module with the one weight [E, D]; its first output are the logits [N, E].
        trained_dtype: the dtype to train it in, whatever its input comes in; None: it stays frozen.
        """
        super().__init__()
        (weight,) = own.parameters()
        self._trained: tuple[nn.Parameter, ...] = ()  # in a tuple, for it is the model's parameter and not this module's
        self._logits_NE: Tensor | None = None
        if trained_dtype is not None:
            own.to(trained_dtype)
            own.register_forward_pre_hook(lambda _, inputs: tuple(x.to(trained_dtype) if isinstance(x, Tensor) else x for x in inputs))
            weight.requires_grad_()
            self._trained = (weight,)
        own.register_forward_hook(self._note_logits)

    @property
    def trained(self) -> nn.Parameter | None:
        return self._trained[0] if self._trained else None

    def route(self, x_TD: Tensor, features: TokenFeatures) -> Routing:
        logits_TE, self._logits_NE = self._logits_NE, None
        assert logits_TE is not None, "experts were called without their router"
        logits_TE = logits_TE if features.valid_T is None else logits_TE[features.valid_T]
        # This also runs when a checkpointed layer runs again, because autograd needs the same tensors as in the first run.
        prob_TE = torch.softmax(logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)), dim=-1)
        expert_TK, weight_TK = features.decided
        return Routing(prob_TE, expert_TK, weight_TK)

    def _note_logits(self, _own: nn.Module, _inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        self._logits_NE = outputs[0]
