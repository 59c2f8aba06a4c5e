"""Routing that the samples bring, in place of the routers' own choice or beside it (`moe.replay`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from hecate.data.batches import Batch
from hecate.experts.forward_pass import PassTokens
from hecate.experts.pass_routing import PassRouting
from hecate.experts.routers.router import RouterStats
from hecate.model.causal_head import CausalHead
from hecate.model.moe_model import MoeModel
from hecate.parallel.values.units import Unit
from hecate.report.events import StepResult
from hecate.train.extensions.extension import StepExtension


def with_routing(tokens: PassTokens, moe: MoeModel, batch: Batch, *, forced: bool) -> PassTokens:
    """The tokens of a batch with the routing that its samples bring."""
    units = sorted(moe.layers)
    routed_NUK = batch.routed
    if routed_NUK is None:
        assert not bool(batch.layout.is_token.any()), "the batch does not bring its samples' routing"
        routed_NUK = batch.task.new_zeros((batch.task.numel(), len(units), moe.engine.shards.config.top_k), dtype=torch.int16)
    else:
        routed_NUK = routed_NUK.flatten(0, 1)
    return replace(tokens, routing=PassRouting.of_tokens(routed_NUK, tokens.valid, units, forced=forced))


class ReplayedRouting(StepExtension):
    """Every pass of a step has its samples' routing; of one step."""

    def __init__(self, mode: Literal["force", "check"], device: torch.device) -> None:
        """Args:
        mode: layers go by that routing; or they go by their own, and the step counts where it differs.
        device: of the batches.
        """
        self._forced = mode == "force"
        self._differing = torch.zeros(1, dtype=torch.float64, device=device)
        """The number of this rank's assignments to other experts than those that the samples bring."""

    def tokens(self, tokens: PassTokens, moe: MoeModel, head: CausalHead, batch: Batch) -> PassTokens:
        return with_routing(tokens, moe, batch, forced=self._forced)

    def routed(self, stats: Mapping[Unit, RouterStats]) -> None:
        if not self._forced:
            self._differing += torch.stack([of_unit.differing for of_unit in stats.values() if of_unit.differing is not None]).sum()

    def sums(self) -> Tensor | None:
        return None if self._forced else self._differing

    def completed(self, result: StepResult, figures: Sequence[Sequence[float]], sums: Sequence[float]) -> StepResult:
        return result if self._forced else replace(result, differing=int(sums[0]))
