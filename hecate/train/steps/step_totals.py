"""The one message that all ranks exchange in each step: their shares of the losses and of the gradient norm, and their requests.

Every rank adds up the shares in the order of the ranks, on the host. So all ranks get the same bits, whatever kind of device each has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.parallel.comm.aborts import read
from hecate.parallel.comm.device_tables import copy_to

_ROUNDING = 1e-4
"""by which sums of the squares of the same float32 numbers may differ, relatively"""


@dataclass(frozen=True)
class Totals:
    """Sums over the ranks; the same on every rank."""

    loss: float
    aux_loss: float
    grad_norm: float
    grad_norms: tuple[float, ...]
    """of what `ExpertOptimizer.squares` tells apart; one, without what all ranks have, if it tells nothing apart"""
    bytes_sent: int
    asked: tuple[bool, ...]
    """of each request: whether any rank has made it"""
    figures: tuple[tuple[float, ...], ...] = ()
    """what each rank has given to be known, by rank"""
    more: tuple[float, ...] = ()
    """what else was to be added up"""
    unlike: tuple[int, ...] = ()
    """ranks that have summed the gradients of what all ranks have to something else than most ranks"""


def exchange_totals(
    losses: Tensor,
    squares: Tensor,
    bytes_sent: int,
    asked: Sequence[bool],
    group: dist.ProcessGroup,
    figures: Sequence[float] = (),
    together: Callable[[Sequence[float]], Sequence[float]] = lambda squares: squares,
) -> Totals:
    """Add up the ranks' shares. Every rank must call it. On a GPU the host waits once, for all that the step has computed.

    Args:
        losses: float64 [2 or more]: this rank's shares of the loss and of the aux loss, and of whatever else is to be added up. Or
            [2 or more, positions]: those of positions that one rank has each, zeros elsewhere, so that the ranks' order does not matter.
        squares: float64 of `ExpertOptimizer.squares`.
        bytes_sent: by this rank.
        asked: this rank's requests, equally many on every rank.
        group: of all ranks.
        figures: numbers of this rank that all ranks are to know, equally many on every rank.
        together: makes of the sums of squares, without that of what all ranks have, those whose roots are `Totals.grad_norms`.
    """
    device = losses.device
    own = torch.cat([losses.flatten(), squares, copy_to(torch.tensor([bytes_sent, *asked, *figures], dtype=torch.float64), device)])
    table_RF = own.new_empty((dist.get_world_size(group), len(own)))
    dist.all_gather(list(table_RF), own, group=group)
    rows = read(table_RF, group).tolist()
    end = losses.numel() + len(squares) - 1  # of what is added up; after it comes what all ranks have, once
    sums = [sum(column) for column in zip(*([*row[:end], *row[end + 1 :]] for row in rows), strict=True)]
    each, sharded, (sent, *requests) = sums[: losses.numel()], sums[losses.numel() : end], sums[end : end + 1 + len(asked)]
    positions = losses.numel() // len(losses)
    loss, aux_loss, *more = (sum(each[start : start + positions]) for start in range(0, len(each), positions))
    grad_norm = math.sqrt(sum(sharded) + rows[0][end])
    known = tuple(tuple(row[len(row) - len(figures) :]) for row in rows)
    norms, any_asked = tuple(map(math.sqrt, together(sharded))), tuple(count > 0 for count in requests)
    return Totals(loss, aux_loss, grad_norm, norms, int(sent), any_asked, known, tuple(more), _unlike([row[end] for row in rows]))


def _unlike(squares: Sequence[float]) -> tuple[int, ...]:
    """The ranks whose sum of squares is not that of most, as damaged memory leaves it; kinds of devices differ by rounding alone."""
    if not all(map(math.isfinite, squares)):
        return ()  # such a norm is refused as it is
    usual = median_low(squares)
    return tuple(rank for rank, one in enumerate(squares) if not math.isclose(one, usual, rel_tol=_ROUNDING))
