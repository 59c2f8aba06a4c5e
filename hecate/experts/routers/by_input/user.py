"""The router of RecLoRA (arXiv 2408.03533): the sample's user decides in which shares all experts of a unit are mixed.

Shapes: T tokens without padding, E experts, M samples, F numbers of a user, H numbers inside the gate.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hecate.experts.forward_pass import OrderError
from hecate.experts.pass_users import PassUsers
from hecate.experts.routers.router import Router, RouterSite, Routing, TokenFeatures
from hecate.experts.seeding import generator, linear_weight, unit_numbers
from hecate.kernels.common.dropout import Dropout, dropout_key
from hecate.parallel.values.expert_kinds import GATE_WIDTH

GATE_DROPOUT = 0.1
"""The share of the numbers inside the gate that training drops, as in the authors' code."""


class UserRouter(Router):
    """softmax(gate(u) / temperature) over all experts, in their order, for every token of a sample whose user's vector is u.

    The gate is LayerNorm, Linear(F, H), ReLU, dropout, Linear(H, E), in its own dtype. It runs once for each sample. Its dropout is keyed
    by the sample's first token, so that it does not depend on the number of ranks. No loss balances the experts, which are all used.
    """

    loss = None

    def __init__(self, site: RouterSite) -> None:
        super().__init__()
        assert site.user_width is not None, "the width of users' vectors is not known"
        assert site.top_k == site.num_experts, f"every token goes to all experts, but top_k is {site.top_k}"
        self.user_width: int = site.user_width
        self._temperature, self._site = site.choices.temperature, site
        self.norm = nn.LayerNorm(site.user_width, dtype=site.dtype, device=site.device)
        self.hidden = self._linear("hidden", site.user_width, GATE_WIDTH)
        self.out = self._linear("out", GATE_WIDTH, site.num_experts)

    def route(self, x_TD: Tensor, features: TokenFeatures) -> Routing:
        """Raises OrderError: the forward pass does not say the users of its samples."""
        users = features.users
        if users is None:
            raise OrderError(
                "the model was called without the users of its samples, by which its experts are mixed\n"
                "  begin the forward pass with `PassTokens(users=...)`"
            )
        sample_T = users.sample_of(features.valid_T, len(x_TD))
        weight_TE = self.weights(users, features.step)[sample_T]
        expert_TE = torch.arange(weight_TE.shape[1], device=x_TD.device).expand(weight_TE.shape).contiguous()
        return Routing(weight_TE, expert_TE, weight_TE)

    def weights(self, users: PassUsers, step: int | None = None) -> Tensor:
        """[M, E]: the share of each expert for each sample. `step`: the optimizer step, which keys dropout; None outside training."""
        inner_MH = F.relu(self.hidden(self.norm(users.features_MF.to(self.norm.weight.dtype))))
        if step is not None and users.number_M is not None:
            dropout = Dropout(GATE_DROPOUT, dropout_key(self._site.seed, step, *unit_numbers(self._site.unit)))
            inner_MH = inner_MH * dropout.mask(users.number_M, _STREAM, GATE_WIDTH, inner_MH.dtype)
        return F.softmax(self.out(inner_MH) / self._temperature, dim=-1)

    def _linear(self, name: str, inputs: int, outputs: int) -> nn.Linear:
        """A linear that begins as torch's own do, with numbers that are drawn by name."""
        site = self._site
        random = generator(site.seed, "router", str(site.unit), name)
        linear = nn.Linear(inputs, outputs, dtype=site.dtype, device=site.device)
        bound = 1 / math.sqrt(inputs)
        with torch.no_grad():
            linear.weight.copy_(linear_weight(outputs, inputs, random))
            linear.bias.copy_(torch.empty(outputs, dtype=torch.float64).uniform_(-bound, bound, generator=random))
        return linear


_STREAM = -1
"""The stream of the gate's dropout; those of a unit's experts are 0 and more."""


ROUTER = UserRouter
