"""Routers: which experts each token goes to, and with which weights.

Shapes: N tokens of a micro-step with padding among them, T tokens without padding, D hidden, E experts, K experts of a token, M samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hecate.config import RouterConfig
from hecate.experts.pass_samples import PassSamples, SampleMeans
from hecate.experts.pass_users import PassUsers
from hecate.parallel.values.units import Unit


@dataclass(frozen=True)
class RouterStats:
    """One layer's routing of the valid tokens of one forward pass on this rank."""

    prob_sum_E: Tensor
    """probabilities summed over tokens; differentiable"""
    count_KE: Tensor
    """int64: tokens whose k-th expert is expert e"""
    samples: SampleMeans | None = None
    """of each sample; None: nothing balances by samples"""
    differing: Tensor | None = None
    """see `Routing.differing`"""
    expert_TK: Tensor | None = None
    """see `Routing.expert_TK`; None: it is not kept, as in training"""


@dataclass(frozen=True)
class Routing:
    """The router's decision for some tokens."""

    prob_TE: Tensor
    """the probability of each expert, such as a softmax over all, in the router's dtype; the load-balancing loss is made of it"""
    expert_TK: Tensor
    """int64: the chosen experts, best first"""
    weight_TK: Tensor
    """what each expert's result is multiplied by"""
    samples: SampleMeans | None = None
    """what a loss that balances each sample by itself is made of; made by the router, so that a layer that runs again keeps the same"""
    differing: Tensor | None = None
    """int64 scalar: assignments to other experts than those that samples bring (`PassRouting`); None: it is not counted"""

    def stats(self) -> RouterStats:
        """What the load-balancing loss needs of it."""
        count_KE = torch.zeros((self.expert_TK.shape[1], self.prob_TE.shape[1]), dtype=torch.int64, device=self.expert_TK.device)
        count_KE.scatter_add_(1, self.expert_TK.T, torch.ones_like(self.expert_TK.T))
        return RouterStats(self.prob_TE.sum(0), count_KE, self.samples, self.differing)


@dataclass(frozen=True)
class TokenFeatures:
    """What a router may need of the tokens beside their hidden states."""

    valid_T: Tensor | None = None
    """int64 indices of the T tokens among all N; None: all are"""
    samples: PassSamples | None = None
    """the samples of the N tokens; None: not known, as outside training"""
    source_N: Tensor | None = None
    """int64: of the source of each of the N tokens, or of all ([1]), its number in the training data; None: not known"""
    users: PassUsers | None = None
    """the users of the tokens' samples; None: not known"""
    step: int | None = None
    """the optimizer step, which keys dropout; None outside training"""
    decided: tuple[Tensor, ...] = ()
    """what the model itself has decided for the T tokens: experts [T, K] and weights [T, K]; nothing where the router is to decide"""
    forced_TK: Tensor | None = None
    """int64: the experts that tokens go to, whatever the router would choose; None: it chooses. See `Router.replays`"""


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


def sample_balance_loss(stats: Mapping[Unit, RouterStats], group: dist.ProcessGroup) -> Tensor:
    """This rank's share of the mean over a step's samples of sum_e P_e · f_e, which carries no factor E.

    P is the mean probability of expert e, f the share of assignments to e times K, both over the sample's valid tokens of all layers with
    the same number of experts together; several such groups are averaged by their number of layers. f carries no gradient. A sample lies
    on one rank, so no message is sent, and neither padding nor the spread of samples over ranks or micro-steps changes the loss. The
    shares of all ranks and micro-steps add up to it times the number of micro-steps, because micro-steps are averaged.
    Source: LLaVA-MoLE (arXiv 2401.16160).
    """
    by_experts: dict[int, list[SampleMeans]] = {}
    for unit in sorted(stats):
        means = stats[unit].samples
        assert means is not None, "the samples of the tokens are not known"
        by_experts.setdefault(means.prob_ME.shape[1], []).append(means)
    losses = [
        len(of_layers)
        / len(stats)
        / of_layers[0].expected
        * (_mean(one.prob_ME for one in of_layers) * _mean(one.chosen_ME for one in of_layers)).sum()
        for of_layers in by_experts.values()
    ]
    return torch.stack(losses).sum()


def _mean(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(0)


BalanceLoss = Callable[[Mapping[Unit, RouterStats], dist.ProcessGroup], Tensor]
"""from the stats of some units to this rank's share of their loss; every rank calls it with the same units"""


class Router(nn.Module, ABC):
    """One unit's router.

    Its buffers, if it has any, are float vectors of one number per expert, alike on every rank. They are saved in checkpoints and adapters,
    and sent to ranks that come new.
    """

    loss: BalanceLoss | None = staticmethod(load_balancing_loss)
    """what balances its experts: the units whose routers have the same loss are balanced together (`MoeModel.balance_loss`); None: nothing,
    or no loss"""
    separates: ClassVar[bool] = False
    """whether the experts are adapters that must not influence one another: each has its own mean loss and its own gradient norm"""

    replays: ClassVar[bool] = False
    """whether it gives tokens to `TokenFeatures.forced_TK`, which its `Routing.expert_TK` then is, with its own weights for them"""

    user_width: int | None = None
    """numbers in the vectors of the samples' users, by which it decides; None: it decides by something else"""

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        """What it trains, by name: alike on every rank, in checkpoints, and exported. A matrix [E, D] that is multiplied with the tokens is
        called `weight`, and a number per expert `bias`. All other parameters must be frozen."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @abstractmethod
    def route(self, x_TD: Tensor, features: TokenFeatures) -> Routing:
        """The decision for T tokens; differentiable in the weights, the probabilities and the tokens."""

    def after_step(self, load_E: Tensor) -> None:
        """Change what is not learned by gradients, such as a bias that balances the experts. Most routers have nothing of the kind.

        It is called on every rank alike, after each optimizer step that was taken, and not between micro-steps.

        Args:
            load_E: int64, on the CPU: the assignments of each expert in the step, of all ranks and micro-steps together.
        """


@dataclass(frozen=True, kw_only=True)
class RouterSite:
    """What a unit's new router is made from: values that are the same on every rank, so that the router is, too."""

    unit: Unit
    hidden: int
    """the size of what it reads"""
    num_experts: int
    top_k: int
    """at most the number of experts"""
    seed: int
    dtype: torch.dtype
    """of what is trained: float32 or wider"""
    device: torch.device
    choices: RouterConfig = field(default_factory=RouterConfig)
    """what the configuration says of it"""
    user_width: int | None = None
    """see `Router.user_width`; None: nothing is known of users"""


MakeRouter = Callable[[RouterSite], Router]
"""makes the new router of a unit: a class of routers, or a function"""


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "renormalised": lambda top_TK: top_TK / top_TK.sum(dim=-1, keepdim=True),
    "gate": lambda top_TK: top_TK,
    "one": torch.ones_like,
}
"""the weights of chosen experts with these scores, [T, K] -> [T, K], by the name that `moe.router.weights` gives"""
LOSSES: dict[str, BalanceLoss] = {"batch": load_balancing_loss, "sample": sample_balance_loss}
"""by the name that `moe.router.balance` gives"""


class ModelRouter(Router):
    """The router of an MoE model, which stays in its place in the model: frozen as it was loaded, or trained in float32 or wider.

    The model's block calls its router, and then its experts with what was decided. The logits, which the block keeps to itself, are noted
    at the first call for the second one: the load-balancing loss needs their probabilities.
    """

    replays: ClassVar[bool] = True

    def __init__(self, own: nn.Module, trained_dtype: torch.dtype | None, *, renormalises: bool) -> None:
        """Args:
        own: the model's module with the one weight [E, D]; its first output are the logits [N, E].
        trained_dtype: the dtype to train it in, whatever its input comes in; None: it stays frozen.
        renormalises: the weights of a token's experts are their softmax probabilities divided by the sum of these; False: without that.
        """
        super().__init__()
        self._renormalises = renormalises
        (weight,) = own.parameters()
        self._trained: dict[str, nn.Parameter] = {}  # in a dict, for it is the model's parameter and not this module's
        self._logits_NE: Tensor | None = None
        if trained_dtype is not None:
            own.to(trained_dtype)
            own.register_forward_pre_hook(lambda _, inputs: tuple(x.to(trained_dtype) if isinstance(x, Tensor) else x for x in inputs))
            weight.requires_grad_()
            self._trained = {"weight": weight}
        own.register_forward_hook(self._note_logits)

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        return self._trained

    def route(self, x_TD: Tensor, features: TokenFeatures) -> Routing:
        logits_TE, self._logits_NE = self._logits_NE, None
        assert logits_TE is not None, "experts were called without their router"
        logits_TE = logits_TE if features.valid_T is None else logits_TE[features.valid_T]
        # This also runs when a checkpointed layer runs again, because autograd needs the same tensors as in the first run.
        prob_TE = torch.softmax(logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)), dim=-1)
        expert_TK, weight_TK = features.decided
        if features.forced_TK is not None:
            # In the type in which models' routers take their softmax.
            score_TK = torch.softmax(logits_TE.float(), dim=-1).gather(1, features.forced_TK)
            score_TK = WEIGHTS["renormalised"](score_TK) if self._renormalises else score_TK
            expert_TK, weight_TK = features.forced_TK, score_TK.to(weight_TK.dtype)
        return Routing(prob_TE, expert_TK, weight_TK)

    def _note_logits(self, _own: nn.Module, _inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        self._logits_NE = outputs[0]
