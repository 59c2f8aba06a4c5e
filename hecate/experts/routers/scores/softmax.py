"""A share among all experts."""

from torch import Tensor


def _softmax(logit_TE: Tensor) -> Tensor:
    return logit_TE.softmax(dim=-1)


SCORE = _softmax
