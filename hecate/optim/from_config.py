"""The gradient rule and the learning rate, from the configuration."""

from __future__ import annotations

from hecate.config import Config
from hecate.config.sections import OPTIMIZERS
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import LearningRate, schedule
from hecate.optim.rule import GradientRule


def gradient_rule(config: Config) -> GradientRule:
    """The rule by which a run's parameters are stepped, that of `optim`."""
    adamw = AdamW(
        weight_decay=config.weight_decay,
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        epsilon=config.adam_epsilon,
        exclude=config.weight_decay_exclude,
    )
    module = OPTIMIZERS[config.optim]
    return GradientRule(module.STATE, module.STEP(getattr(config, config.optim, None), adamw, config.learning_rate))


def learning_rate(config: Config) -> LearningRate:
    warmup, steps, after = config.warmup_steps, config.max_steps, config.lr_scheduler_kwargs
    # A schedule rounds a share up to whole steps, so half a step less leaves no room for rounding.
    share = config.warmup_ratio if warmup is None else max(0, warmup - 0.5) / max(1, steps)
    ends = {"min_lr_rate": after.min_lr_rate or 0.0, "decay_ratio": after.decay_ratio or 0.0}
    return LearningRate(config.learning_rate, schedule(config.lr_scheduler_type, steps, share, **ends))
