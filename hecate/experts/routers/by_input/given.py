"""The router that is given its decision: a sample brings the number of its expert, which is that of its source in the training data.

Shapes: N tokens with padding among them, T tokens without padding, E experts.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hecate.experts.forward_pass import OrderError
from hecate.experts.routers.router import Router, RouterSite, Routing, TokenFeatures


class GivenRouter(Router):
    """One expert for each token, with weight 1. Nothing is trained, and no loss balances it. A single expert takes all tokens."""

    loss = None
    separates: ClassVar[bool] = True

    def __init__(self, site: RouterSite) -> None:
        super().__init__()
        assert site.top_k == 1, f"a sample has one source, but top_k is {site.top_k}"
        self.num_experts = site.num_experts
        self._dtype = site.dtype

    def route(self, x_TD: Tensor, features: TokenFeatures) -> Routing:
        """Raises OrderError: the forward pass does not say the sources of its tokens."""
        expert_T1 = self._experts(x_TD, features)[:, None]
        one_T1 = torch.ones(expert_T1.shape, dtype=self._dtype, device=x_TD.device)
        prob_TE = one_T1.new_zeros((len(x_TD), self.num_experts)).scatter_(1, expert_T1, one_T1)
        return Routing(prob_TE, expert_T1, one_T1)

    def _experts(self, x_TD: Tensor, features: TokenFeatures) -> Tensor:
        source_N = features.source_N
        if self.num_experts == 1:
            return torch.zeros(len(x_TD), dtype=torch.int64, device=x_TD.device)
        if source_N is None:
            raise OrderError(
                "the model was called without the sources of its tokens, which are their experts\n"
                "  begin the forward pass with `PassTokens(source=...)`"
            )
        if len(source_N) == 1:
            return source_N.expand(len(x_TD)).contiguous()
        return source_N if features.valid_T is None else source_N[features.valid_T]


class OnlyExpert(GivenRouter):
    """All tokens go to the unit's one expert, with weight 1: there is nothing to choose, to train or to balance.

    The experts of all units together are one adapter, whose gradients have one norm.
    """

    separates: ClassVar[bool] = False


ROUTER = GivenRouter
