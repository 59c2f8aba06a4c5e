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
    after, shape = config.lr_scheduler_kwargs, (config.lr_scheduler_type, config.max_steps, config.warmup_ratio)
    return LearningRate(config.learning_rate, schedule(*shape, min_lr_rate=after.min_lr_rate or 0.0, decay_ratio=after.decay_ratio or 0.0))
