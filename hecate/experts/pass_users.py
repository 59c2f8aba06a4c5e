"""The users of a forward pass's samples, by whose vectors routers may choose.

Shapes: B rows of S positions, N = B·S tokens with padding among them, T tokens without padding, M samples, U users, F numbers of a user.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PassUsers:
    """Which user each token of a forward pass belongs to, and each user's vector."""

    features_MF: Tensor
    """The vector of the user of each sample."""
    sample_N: Tensor
    """Each token's sample, int64 [N]; of passes whose rows are one sample each, of unknown length, [B]; of a single sample [1]."""
    number_M: Tensor | None = None
    """The number in the run of each sample's first token, which keys dropout, int64; None outside training."""

    def sample_of(self, valid_T: Tensor | None, tokens: int) -> Tensor:
        """int64 [T]: the sample of each of the pass's `tokens` = T tokens without padding."""
        if valid_T is not None:
            return self.sample_N[valid_T]
        return self.sample_N.repeat_interleave(tokens // len(self.sample_N))


def users_of_rows(features_UF: Tensor, user_B: Tensor) -> PassUsers:
    """The users of a pass whose rows are one sample each, as in generation, from the number of each row's user, int64 [B]."""
    return PassUsers(features_UF[user_B], torch.arange(len(user_B), device=user_B.device))


def users_of_packed(features_UF: Tensor, user_BS: Tensor, segment_BS: Tensor, token_BS: Tensor, most: int) -> PassUsers:
    """The users of a pass in whose rows samples are packed. The host does not wait for the device.

    Args:
        user_BS: int64: the number of each token's user; -1 at padding.
        segment_BS: int64: the sample's number within its row, from 1; 0 at padding.
        token_BS: int64: the number of each token in the run.
        most: the most samples of a row. A row with fewer, or none, has samples without tokens, whose user is the first of all.
    """
    rows = torch.arange(len(segment_BS), device=segment_BS.device)[:, None]
    # Padding counts to its row's first sample, whose user and first token it leaves as they are.
    sample_N = (rows * most + (segment_BS - 1).clamp(min=0)).flatten()
    none_M = torch.zeros(len(segment_BS) * most, dtype=torch.int64, device=segment_BS.device)
    user_M = none_M.scatter_reduce(0, sample_N, user_BS.flatten(), "amax")
    last = torch.iinfo(torch.int64).max
    number_N = token_BS.masked_fill(segment_BS == 0, last).flatten()
    number_M = (none_M + last).scatter_reduce(0, sample_N, number_N, "amin")
    return PassUsers(features_UF[user_M], sample_N, number_M)
