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
    """The probabilities summed over tokens; differentiable."""
    count_KE: Tensor
    """The number of tokens whose k-th expert is expert e, int64."""
    samples: SampleMeans | None = None
    """The means over each sample; None: nothing balances by samples."""
    differing: Tensor | None = None
    """The number of assignments that differ from a given routing (`Routing.differing`)."""
    expert_TK: Tensor | None = None
    """The chosen experts (`Routing.expert_TK`); None: they are not kept, as in training."""


@dataclass(frozen=True)
class Routing:
    """The router's decision for some tokens."""

    prob_TE: Tensor
    """The probability of each expert, such as a softmax over all, in the router's dtype; the load-balancing loss is computed from it."""
    expert_TK: Tensor
    """The chosen experts, best first, int64."""
    weight_TK: Tensor
    """The weight by which each expert's result is multiplied."""
    samples: SampleMeans | None = None
    """The means from which a loss that balances each sample is computed. The router computes them, so that a layer that runs again keeps
    the same."""
    differing: Tensor | None = None
    """The number of assignments to other experts than those that samples bring (`PassRouting`), an int64 scalar; None: it is not
    counted."""

    def stats(self) -> RouterStats:
        """What the load-balancing loss needs of it."""
        count_KE = torch.zeros((self.expert_TK.shape[1], self.prob_TE.shape[1]), dtype=torch.int64, device=self.expert_TK.device)
        count_KE.scatter_add_(1, self.expert_TK.T, torch.ones_like(self.expert_TK.T))
        return RouterStats(self.prob_TE.sum(0), count_KE, self.samples, self.differing)


@dataclass(frozen=True)
class TokenFeatures:
    """What a router may need of the tokens beside their hidden states."""

    valid_T: Tensor | None = None
    """The indices of the T tokens among all N, int64; None: all are valid."""
    samples: PassSamples | None = None
    """The samples of the N tokens; None: not known, as outside training."""
    source_N: Tensor | None = None
    """The number in the training data of the source of each of the N tokens, or of all ([1]), int64; None: not known."""
    users: PassUsers | None = None
    """The users of the tokens' samples; None: not known."""
    step: int | None = None
    """The optimizer step, which keys dropout; None outside training."""
    decided: tuple[Tensor, ...] = ()
    """What the model itself has decided for the T tokens: experts [T, K] and weights [T, K]; nothing where the router is to decide."""
    forced_TK: Tensor | None = None
    """The experts that tokens go to, whatever the router would choose, int64; None: it chooses. See `Router.replays`."""


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
        * (_mean(means.prob_ME for means in of_layers) * _mean(means.chosen_ME for means in of_layers)).sum()
        for of_layers in by_experts.values()
    ]
    return torch.stack(losses).sum()


def _mean(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(0)


BalanceLoss = Callable[[Mapping[Unit, RouterStats], dist.ProcessGroup], Tensor]
"""Computes from the stats of some units this rank's share of their loss; every rank calls it with the same units."""


class Router(nn.Module, ABC):
    """One unit's router.

    Its buffers, if it has any, are float vectors of one number per expert, alike on every rank. They are saved in checkpoints and adapters,
    and sent to ranks that come new.
    """

    loss: BalanceLoss | None = staticmethod(load_balancing_loss)
    """The loss that balances the experts; None: nothing balances them, or no loss does. Units whose routers have the same loss are balanced
    by one sum (`MoeModel.balance_loss`)."""
    separates: ClassVar[bool] = False
    """Whether the experts are adapters that must not influence one another: each has its own mean loss and its own gradient norm."""

    replays: ClassVar[bool] = False
    """Whether the router can give tokens to `TokenFeatures.forced_TK`, which its `Routing.expert_TK` then is, with its own weights for
    them."""

    user_width: int | None = None
    """The number of elements in the vectors of the samples' users, by which the router decides; None: it decides by something else."""

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
    """The size of the rows that the router reads."""
    num_experts: int
    top_k: int
    """The number of experts of a token, at most the number of experts."""
    seed: int
    dtype: torch.dtype
    """The type of what is trained: float32 or wider."""
    device: torch.device
    choices: RouterConfig = field(default_factory=RouterConfig)
    """What the configuration says of the router."""
    user_width: int | None = None
    """The size of a user's vector (`Router.user_width`); None: nothing is known of users."""


MakeRouter = Callable[[RouterSite], Router]
"""Returns the new router of a unit: a class of routers, or a function."""


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "renormalised": lambda top_TK: top_TK / top_TK.sum(dim=-1, keepdim=True),
    "gate": lambda top_TK: top_TK,
    "one": torch.ones_like,
}
"""The functions from the scores of chosen experts to their weights, [T, K] -> [T, K], by the name that `moe.router.weights` gives."""
LOSSES: dict[str, BalanceLoss] = {"batch": load_balancing_loss, "sample": sample_balance_loss}
"""The balancing losses, by the name that `moe.router.balance` gives."""


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
