"""Which of a run's models it leaves: it counts each evaluation in `BestModel`, and says at its end what came of it."""

from __future__ import annotations

from dataclasses import asdict, replace

from hecate.checkpoint.train_state import TrainState
from hecate.config import Config
from hecate.errors import UserError
from hecate.io.strict_json import dump_json, parse_json
from hecate.optim.best_model import BestModel
from hecate.ranks.ranks import Ranks
from hecate.report.events import Evaluation
from hecate.report.metrics import ENDED_EARLY


def judged(config: Config, ranks: Ranks, state: TrainState, found: Evaluation) -> TrainState:
    """The state in which an evaluation after its step is counted, if the run looks for its best model. Every rank must call it.

    Raises:
        UserError: as `metric_value`.
    """
    if config.best_metric is None or state.step == 0:
        return state
    value = metric_value(config.best_metric, found)
    best = state.best.after(config.best_metric, value, state.step, threshold=config.early_stopping_threshold)
    # After a loss some ranks may have counted it before, as other ranks had computed it: the first rank's word holds.
    agreed = ranks.broadcast_from(0, dump_json(asdict(best)) if ranks.is_first else None)
    return replace(state, best=BestModel.from_json(parse_json(agreed)))


def metric_value(metric: str, found: Evaluation) -> float:
    """The number `loss`, `exact`, `NAME.loss` or `NAME.exact` of an evaluation; without a name, the mean of the sources that have it.

    Raises:
        UserError: no answer was scored where an exact share is wanted.
    """
    name, _, kind = metric.rpartition(".")
    scores = [found.scores[name]] if name else list(found.scores.values())
    values = [score.loss if kind == "loss" else score.accuracy for score in scores]
    known = [value for value in values if value is not None]
    if not known:
        raise UserError(f"metric_for_best_model: {metric} is not known, because the evaluated data have no questions\n  give a loss")
    return sum(known) / len(known)


def ends_early(config: Config, state: TrainState) -> bool:
    """Whether the evaluations so far end the run before its last step."""
    patience = config.early_stopping_patience
    return patience is not None and state.best.metric == config.best_metric and state.best.without >= patience


def step_to_leave(config: Config, state: TrainState) -> int:
    """The step whose parameters the run leaves if it ends now."""
    best = state.best
    return best.step if config.load_best_model_at_end and best.metric == config.best_metric and best.step is not None else state.step


def end_in_words(config: Config, state: TrainState) -> dict[str, str]:
    """What a run says at its end, by name: why it has ended early, if it has, and which model was the best, if it has looked for it."""
    best, said = state.best, dict[str, str]()
    if config.best_metric is None or best.metric != config.best_metric:
        return said
    if ends_early(config, state):
        more = f" by more than {config.early_stopping_threshold:g}" if config.early_stopping_threshold else ""
        why = f"{best.without} evaluations did not improve {best.metric}{more}"
        said["ended"] = f"{ENDED_EARLY} after step {state.step} of {config.max_steps}: {why}"
    left = step_to_leave(config, state)
    known = f"{best.metric} {best.value:.4g} after step {best.step}" if best.value is not None else f"{best.metric} was never a number"
    said["best model"] = f"{known}; the run leaves the model of step {left}"
    return said
