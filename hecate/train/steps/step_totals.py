"""The one message that all ranks exchange in each step: their shares of the losses and of the gradient norm, and what
extensions of the step add.

Every rank adds up the shares in the order of the ranks, on the host. So all ranks get the same bits, whatever kind of device each has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median_low

import torch
import torch.distributed as dist
from torch import Tensor

from hecate.parallel.comm.aborts import read
from hecate.parallel.comm.device_tables import copy_to
from hecate.parallel.comm.exchanges import all_gather_single

_ROUNDING = 1e-4
"""The relative difference that sums of the squares of the same float32 numbers may have."""


@dataclass(frozen=True)
class Totals:
    """Sums over the ranks; the same on every rank."""

    loss: float
    aux_loss: float
    grad_norm: float
    grad_norms: tuple[float, ...]
    """The norms of the parts that `ExpertOptimizer.squares` returns apart; a single norm, without replicated parameters, if it returns one
    sum."""
    figures: tuple[tuple[tuple[float, ...], ...], ...] = ()
    """For each set of figures, those of every rank, by rank."""
    more: tuple[tuple[float, ...], ...] = ()
    """The other sums, in the parts in which they were given."""
    unlike: tuple[int, ...] = ()
    """The ranks whose sum of the replicated parameters' gradients is another than that of most ranks."""


def exchange_totals(
    losses: Tensor,
    squares: Tensor,
    group: dist.ProcessGroup,
    figures: Sequence[Sequence[float]] = (),
    more: Sequence[Tensor] = (),
    by_expert: Callable[[Sequence[float]], Sequence[float]] = lambda squares: squares,
) -> Totals:
    """Add up the ranks' shares. Every rank must call it. On a GPU the host waits once, for all that the step has computed.

    Args:
        losses: float64 [2] or [2, positions]: this rank's shares of the loss and of the aux loss, of positions that one rank has each,
            zeros elsewhere, so that the ranks' order does not matter.
        squares: float64 of `ExpertOptimizer.squares`.
        group: of all ranks.
        figures: sets of numbers of this rank that all ranks are to know, equally many on every rank.
        more: float64 [n] each: what else is to be added up, equally many on every rank.
        by_expert: turns the sums of squares, without that of the replicated parameters, into the squares of `Totals.grad_norms`.
    """
    numbers = torch.tensor([number for of_set in figures for number in of_set], dtype=torch.float64)
    own = torch.cat([losses.flatten(), *more, squares, copy_to(numbers, losses.device)])
    table_RF = own.new_empty((dist.get_world_size(group), len(own)))
    all_gather_single(table_RF.view(-1), own, group=group)
    rows = read(table_RF, group).tolist()
    # The columns before this one are added up. It is of the replicated parameters, which all ranks have alike, and counts once.
    end = len(own) - len(numbers) - 1
    sums = [sum(column) for column in zip(*(row[:end] for row in rows), strict=True)]
    positions = losses.numel() // len(losses)
    loss, aux_loss = sum(sums[:positions]), sum(sums[positions : losses.numel()])
    *added, squares_of = _cut(sums[losses.numel() :], [*map(len, more), len(squares) - 1])
    grad_norm = math.sqrt(sum(squares_of) + rows[0][end])
    known = [_cut(row[end + 1 :], list(map(len, figures))) for row in rows]
    return Totals(
        loss,
        aux_loss,
        grad_norm,
        tuple(map(math.sqrt, by_expert(squares_of))),
        tuple(zip(*known, strict=True)) if figures else (),
        tuple(added),
        _unlike([row[end] for row in rows]),
    )


def _unlike(squares: Sequence[float]) -> tuple[int, ...]:
    """The ranks whose sum of squares is not that of most, as damaged memory leaves it; kinds of devices differ by rounding alone."""
    if not all(map(math.isfinite, squares)):
        return ()  # such a norm is refused as it is
    usual = median_low(squares)
    return tuple(rank for rank, square in enumerate(squares) if not math.isclose(square, usual, rel_tol=_ROUNDING))


def _cut(row: Sequence[float], lengths: Sequence[int]) -> list[tuple[float, ...]]:
    """A row in parts of these lengths."""
    numbers = iter(row)
    return [tuple(islice(numbers, length)) for length in lengths]
