"""What happens in a run, as values: written by training and elasticity, read by reports and by whoever watches the run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hecate.parallel.sharding import ReshardGain
from hecate.parallel.units import Unit


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same on every rank."""

    loss: float
    """cross-entropy per label token"""
    aux_loss: float
    """load-balancing loss before its coefficient; top_k when balanced"""
    grad_norm: float
    """before clipping"""
    skipped: bool
    """a gradient was not finite, so that nothing was changed"""
    loads: dict[Unit, np.ndarray]
    """per unit, int64 [experts, ranks of the job]"""


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """One optimizer step that has ended, and what it took; the same on every rank, but for `seconds`."""

    step: int
    """optimizer steps done, this one among them"""
    result: StepResult
    tokens: int
    """of the whole step, padding not counted"""
    seconds: float
    """on this rank"""
    learning_rate: float
    imbalance: float
    """largest over mean load of the ranks, averaged over the units"""
    calibrations: int
    """plans so far that gave way to better ones after the gate"""
    bytes_sent: int
    """by all ranks together"""


@dataclass(frozen=True)
class EvalScore:
    """What an evaluation found for one held-out source, all ranks together."""

    loss: float
    """cross-entropy per label token"""
    accuracy: float | None
    """share of the answers that were exact, 0 to 1; None where nothing was generated"""
    samples: int


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, by source name; the same on every rank."""

    scores: dict[str, EvalScore]
    loads: dict[str, dict[Unit, list[int]]]
    """source -> unit -> assignments of each expert"""


@dataclass(frozen=True)
class Move:
    """Experts that changed their owners; the same on every rank."""

    experts: int
    num_bytes: int
    """sent by all ranks of the job together"""


@dataclass(frozen=True)
class Resharding:
    """A re-sharding that was done, and why; the same on every rank, but for `seconds`."""

    move: Move
    gain: ReshardGain
    """as predicted"""
    seconds: float
    """planning and moving, on this rank"""


@dataclass(frozen=True)
class Rebuilt:
    """A run that goes on with other ranks; the same on every rank."""

    step: int
    """optimizer steps done"""
    went_back: bool
    """to a checkpoint, because no copy of some experts was left"""
    moved: int
    """experts that travelled to other owners"""
