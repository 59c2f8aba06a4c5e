"""What a program that trains by calling `hecate.api.train` brings to its run, and what it gets of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from hecate.engine.evaluation import materialized
from hecate.errors import UserError
from hecate.model.causal_head import TokenLoss
from hecate.model.layers.attention import leave_to_transformers
from hecate.report.events import EvalScore, Evaluation, StepEvent
from hecate.train.training import Training

Stop = Literal["stop"] | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run has done; the same on every rank."""

    finished: bool
    """Whether the run came to its end; False: it was asked to stop before, and has saved."""
    step: int
    """The number of optimizer steps done, those before a resume included."""
    losses: Mapping[int, float]
    """The training loss of each step that this call has done, by the step's number, from 1."""
    evaluations: Mapping[int, Mapping[str, EvalScore]]
    """The scores of this call's evaluations, by the number of steps done and the held-out source."""
    output: Path | None
    """The folder of the adapter, or of the whole model, that the run has written; None: it has not finished."""
    model: nn.Module | None
    """The base model with what was trained in it, to be called, or asked to `generate`, as any of transformers. None: there are several
    ranks, over which the experts are spread, or the model must be told the source or the user of a text, or is Megatron's."""


class Callback:
    """What a calling program does at points of its run; by default nothing. It is called on rank 0, between steps, which wait for it.

    A method that returns "stop" ends the run after the step, with a checkpoint. What a method raises ends the run on all ranks, and
    reaches the caller of `train` on rank 0.
    """

    def on_step(self, event: StepEvent) -> Stop:
        """A step has ended, with this loss (`event.result.loss`), so many tokens and seconds."""

    def on_evaluate(self, step: int, evaluation: Evaluation) -> Stop:
        """The held-out sources were evaluated after so many steps."""

    def on_save(self, step: int, folder: Path) -> Stop:
        """The checkpoint of a step is complete. With `save_async` that is some steps later."""

    def on_end(self, result: Result) -> None:
        """The run has ended, or has stopped; it has written all that it leaves."""


class Caller:
    """A calling program, as its run sees it on one rank."""

    def __init__(self, callbacks: Sequence[Callback] = (), loss: TokenLoss | None = None) -> None:
        """`callbacks`: none on ranks other than the first. `loss`: in place of the cross-entropy; the same on every rank."""
        self.loss = loss
        self.wants_stop = False
        """Whether a callback has asked for the end of the run."""
        self.result: Result | None = None
        """What the run has done; None: it has not ended."""
        self._callbacks = callbacks
        self._losses: dict[int, float] = {}
        self._evaluations: dict[int, Mapping[str, EvalScore]] = {}

    def stepped(self, event: StepEvent) -> None:
        self._losses[event.step] = event.result.loss
        self._call("on_step", event)

    def evaluated(self, step: int, found: Evaluation) -> None:
        self._evaluations[step] = found.scores
        self._call("on_evaluate", step, found)

    def saved(self, step: int, folder: Path) -> None:
        self._call("on_save", step, folder)

    def ended(self, training: Training, *, finished: bool) -> None:
        """The run has ended. Every rank must call it, once."""
        self.result = Result(
            finished=finished,
            step=training.run_state.step,
            losses=self._losses,
            evaluations=self._evaluations,
            output=Path(training.parts.config.output_dir) / training.parts.output.name if finished else None,
            model=_callable_model(training),
        )
        self._call("on_end", self.result)

    def _call(self, method: str, *given: Any) -> None:
        for callback in self._callbacks:
            answer = getattr(callback, method)(*given)
            if answer not in (None, "stop"):
                raise UserError(
                    f'{type(callback).__name__}.{method} has returned {answer!r:.80}\n  return "stop" to end the run, else None'
                )
            self.wants_stop |= answer == "stop"


def _callable_model(training: Training) -> nn.Module | None:
    """See `Result.model`. From then on the engine holds every expert, and begins no further step."""
    parts, moe = training.parts, training.parts.moe
    told = moe.separate_experts or moe.user_width is not None
    if training.ranks.world_size > 1 or told or parts.config.model.front_end != "transformers":
        return None
    moe.engine.current.now = materialized(moe.engine.shards, moe.engine.current)
    leave_to_transformers(parts.base.model)
    return parts.base.model
