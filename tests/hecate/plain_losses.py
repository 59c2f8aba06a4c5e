"""A loss of one's own, plainly: the cross-entropy of each label token, times what the model lacks of being sure of it."""

from __future__ import annotations

from torch import Tensor


def focal(logits_NV: Tensor, label_N: Tensor) -> Tensor:
    """Focal loss with gamma 1, [N]."""
    log_p_N = logits_NV.log_softmax(-1).gather(1, label_N[:, None]).squeeze(1)
    return -(1 - log_p_N.exp()) * log_p_N
