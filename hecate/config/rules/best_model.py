"""Check the keys that choose the model that is kept: by which number, and when a run ends early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hecate.config.problems import Add, shorten

_ASKS = ("metric_for_best_model", "load_best_model_at_end", "early_stopping_patience")


def check_best_model(values: Mapping[str, Any], add: Add) -> None:
    """Add every problem of these keys. Keys that are absent already have a problem."""
    asks = [key for key in _ASKS if values.get(key) not in (None, False)]
    if values.get("early_stopping_threshold") and "early_stopping_patience" in values and values["early_stopping_patience"] is None:
        add("early_stopping_threshold", "is read with early_stopping_patience only", "give that, or leave it out")
    if not asks or not {"data.train", "data.eval", "data.eval_share", "eval_steps", "eval.generate"} <= values.keys():
        return
    train, held_out, share = (values[f"data.{key}"] for key in ("train", "eval", "eval_share"))
    if not held_out and not share:
        add(asks[0], "needs evaluations, but data.eval is empty", "name evaluation data, or hold some out with data.eval_share=0.05")
        return
    if values["eval_steps"] is None:
        add(asks[0], "needs evaluations before the end of the run", "set eval_steps to the number of steps between two")
    named = [source.name for source in held_out]
    sources = [*named, *(source.name for source in train if share and source.name not in named)]
    known = _metrics(sources, generates=values["eval.generate"])
    metric = values.get("metric_for_best_model")
    if metric is not None and metric not in ("eval_loss", *known):  # transformers' name of the loss
        more = "" if values["eval.generate"] else "; exact shares come with eval.generate=true"
        add("metric_for_best_model", f"no evaluation has the number {shorten(metric)}", f"there are {', '.join(known)[:200]}{more}")


def _metrics(sources: Sequence[str], *, generates: bool) -> list[str]:
    """The names of the numbers that an evaluation of these sources has."""
    kinds = ["loss", "exact"] if generates else ["loss"]
    return [*kinds, *(f"{source}.{kind}" for source in sources for kind in kinds)]
