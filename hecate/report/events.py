"""The events of a run, as values. Training and elasticity make them; reports and observers of the run read them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from hecate.parallel.plan.sharding import ReshardGain
from hecate.parallel.values.units import Unit


@dataclass(frozen=True)
class DenseWork:
    """Work that one rank has done in its layers up to their experts, where it waits for no other rank."""

    tokens: int = 0
    """a token counts once for each unit with experts; padding counts, too"""
    seconds: float = 0.0

    def __add__(self, other: DenseWork) -> DenseWork:
        return DenseWork(self.tokens + other.tokens, self.seconds + other.seconds)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same on every rank."""

    loss: float
    """cross-entropy per label token; where each expert is an adapter of its own, the mean over those with label tokens of each one's"""
    aux_loss: float
    """load-balancing loss before its coefficient; top_k when a batch is balanced"""
    grad_norm: float
    """norm of all gradients before clipping; NaN if the loss or the aux loss was not finite"""
    skipped: bool
    """whether the norm was not finite or a spike, so that no parameter was changed, or none of an adapter of its own"""
    loads: dict[Unit, np.ndarray]
    """per unit, int64 [experts, ranks of the job]"""
    bytes_sent: int
    """number of bytes of experts, their gradients and tokens that all ranks together have sent"""
    bytes_between_nodes: int
    """of `bytes_sent`, those that went from one node of the topology to another"""
    peak_bytes: tuple[int, ...]
    """the most memory that each rank has had so far: allocated on its GPU, or else resident on the host"""
    differing: int | None = None
    """assignments of all units to other experts than those that samples bring (`moe.replay: check`); None: they are not counted"""
    norm_limit: float = math.inf
    """what makes a larger gradient norm a spike"""
    asked: tuple[bool, ...] = ()
    """of each request of the ranks: whether any rank has made it"""
    unlike: tuple[int, ...] = ()
    """ranks whose gradients of what all ranks have differ from those of most ranks"""
    work_before: tuple[DenseWork, ...] = ()
    """each rank's work in the step before, by rank"""

    @property
    def why_skipped(self) -> str:
        """Why the step was skipped, in a few words; empty if it was taken."""
        if not self.skipped:
            return ""
        if self.unlike:
            return f"the gradients that all ranks have alike differ on rank {', '.join(map(str, self.unlike))}: is its memory damaged?"
        if not math.isfinite(self.grad_norm):
            return "the loss or a gradient was not finite"
        return f"gradient norm {self.grad_norm:.4g} is a spike, above {self.norm_limit:.4g}"


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """One optimizer step that has ended, with its figures; the same on every rank, except `seconds`, `copies`, `new_copies`,
    `plan_modes`, `work` and `parts`."""

    step: int
    """number of optimizer steps done, this one included"""
    epoch: float
    """how often these steps have gone through the data"""
    epoch_samples: int | None
    """the number of samples of an epoch; None: it ends with the longest of sources that are not mixed"""
    result: StepResult
    tokens: int
    """number of tokens of the whole step, without padding"""
    seconds: float
    """duration of the step on this rank"""
    learning_rate: float
    imbalance: float
    """largest over mean load of the ranks, averaged over the units"""
    calibrations: int
    """number of plans of this run that were replaced by better ones once the routers had chosen (plan source `calibrated`)"""
    plan_modes: dict[Unit, str]
    """by which loads each unit of the reporting rank's sharding group was planned, where that is chosen in each step; else empty"""
    static_imbalance: float
    """what `imbalance` would have been under static expert parallelism (`hecate.parallel.values.static_ep_imbalance`)"""
    copies: int
    """number of replicas, all units together, that were on other ranks than their owners', in the reporting rank's sharding group"""
    new_copies: int
    """of these, those that were not there in the step before"""
    work: DenseWork = DenseWork()
    """of this rank in this step"""
    parts: dict[str, float]
    """seconds of the step's parts on this rank, in their order (`StepClock`); what is missing from `seconds` belongs to none of them"""


@dataclass(frozen=True)
class EvalScore:
    """The result of an evaluation for one held-out source, over all ranks."""

    loss: float
    """cross-entropy per label token"""
    accuracy: float | None
    """share of the answers that were exact, 0 to 1; None where nothing was generated"""
    samples: int


@dataclass(frozen=True)
class ShownAnswer:
    """A question of a held-out source and what the model has said; each text is cut where it is long, and says so."""

    prompt: str
    """as the model has read it, without special tokens"""
    expected: str
    answer: str


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation; the same on every rank."""

    scores: dict[str, EvalScore]
    """source -> its result"""
    loads: dict[str, dict[Unit, list[int]]]
    """source -> unit -> assignments of each expert"""
    answers: dict[str, tuple[ShownAnswer, ...]] = field(default_factory=dict)
    """source -> the answers to its first questions; without a source where nothing was generated"""


@dataclass(frozen=True)
class Move:
    """Experts that changed their owners; the same on every rank."""

    experts: int
    num_bytes: int
    """sent by all ranks of the job together"""


@dataclass(frozen=True)
class Resharding:
    """A re-sharding that was done, and the predicted gain; the same on every rank, except `seconds`."""

    move: Move
    gain: ReshardGain
    """the gain that was predicted"""
    seconds: float
    """duration of planning and moving on this rank"""


@dataclass(frozen=True)
class Rebuilt:
    """A change of ranks after which the run goes on; the same on every rank, except that a new rank gave up no save."""

    step: int
    """number of optimizer steps done"""
    lost: str
    """the experts that had no copy left, in words, so that the run went back to a checkpoint; empty: it did not"""
    moved: int
    """number of experts that moved to other owners"""
    warnings: tuple[str, ...] = ()
    """a save under way that was given up, checkpoints that were passed over on the way back, and why"""
