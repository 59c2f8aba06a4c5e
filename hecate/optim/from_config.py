"""The gradient rule and the learning rate, from the configuration."""

from __future__ import annotations

from hecate.config import Config
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import LearningRate, schedule
from hecate.optim.rule import GradientRule


def gradient_rule(config: Config) -> GradientRule:
    """The rule by which a run's parameters are stepped. A further rule is chosen here, by a key of its own."""
    return AdamW(
        weight_decay=config.weight_decay,
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        epsilon=config.adam_epsilon,
        exclude=config.weight_decay_exclude,
    )


def learning_rate(config: Config) -> LearningRate:
    return LearningRate(config.learning_rate, schedule(config.lr_scheduler_type, config.max_steps, config.warmup_ratio))
