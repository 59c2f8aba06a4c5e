"""The gradient rule and the learning rate, from the configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hecate.config import Config
from hecate.errors import UserError
from hecate.io.registry import registered
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import LearningRate, schedule
from hecate.optim.rule import GradientRule

RULES: dict[str, Callable[[Any, AdamW], GradientRule | None]] = registered("hecate.optim.rules", "RULE")
"""the rules beside AdamW, by the sections of their settings"""


def gradient_rule(config: Config) -> GradientRule:
    """The rule by which a run's parameters are stepped: AdamW, unless the section of another one says so.

    Raises:
        UserError: the sections of several do.
    """
    adamw = AdamW(
        weight_decay=config.weight_decay,
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        epsilon=config.adam_epsilon,
        exclude=config.weight_decay_exclude,
    )
    made = {name: make(getattr(config, name), adamw) for name, make in RULES.items()}
    chosen = {name: rule for name, rule in made.items() if rule is not None}
    if len(chosen) > 1:
        raise UserError(f"{', '.join(chosen)}: parameters are stepped by one rule, not by several\n  leave the keys of all but one out")
    return next(iter(chosen.values()), adamw)


def learning_rate(config: Config) -> LearningRate:
    warmup, steps = config.warmup_steps, config.max_steps
    # A schedule rounds a share up to whole steps, so half a step less leaves no room for rounding.
    share = config.warmup_ratio if warmup is None else max(0, warmup - 0.5) / max(1, steps)
    return LearningRate(config.learning_rate, schedule(config.lr_scheduler_type, steps, share))
