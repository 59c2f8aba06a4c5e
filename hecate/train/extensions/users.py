"""Users in a step: layers decide by the vector of each sample's user (RecLoRA)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hecate.data.batches import Batch
from hecate.experts.forward_pass import PassTokens
from hecate.experts.pass_users import users_of_packed
from hecate.model.causal_head import CausalHead
from hecate.model.moe_model import MoeModel
from hecate.train.extensions.extension import StepExtension


def with_users(tokens: PassTokens, head: CausalHead, batch: Batch, features_UF: Tensor) -> PassTokens:
    """The tokens of a batch with the users of its samples. The host does not wait for the batch's device.

    Args:
        features_UF: the vectors of all users, on the batch's device.
    """
    own = head.own_positions(batch.segment_ids.shape[1])
    assert batch.user is not None or not bool(batch.layout.is_token[:, own].any()), "the batch does not say its samples' users"
    segment_ids, token_ids = batch.segment_ids[:, own], batch.token_ids[:, own]
    user = torch.full_like(segment_ids, -1) if batch.user is None else batch.user[:, own]
    return replace(tokens, users=users_of_packed(features_UF, user, segment_ids, token_ids, batch.layout.most_samples))


@dataclass(frozen=True)
class UsersOfSamples(StepExtension):
    """Every pass of a step knows its samples' users."""

    features_UF: Tensor
    """The vectors of all users, on the batches' device."""

    def tokens(self, tokens: PassTokens, moe: MoeModel, head: CausalHead, batch: Batch) -> PassTokens:
        return with_users(tokens, head, batch, self.features_UF)
