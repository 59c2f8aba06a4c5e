"""Muon (kellerjordan.github.io/posts/muon): torch.optim.Muon's step of every hidden matrix, and AdamW's of all else.

Muon needs all of a matrix to orthogonalise its momentum. The owner of an expert has all of its matrices, so this takes no communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from hecate.config.ranges import POSITIVE, Range, key
from hecate.optim.rules import adamw as beside
from hecate.parallel.values.optimizer_state import ParameterSpec, StateSpec, of_each

if TYPE_CHECKING:
    from hecate.optim.adamw import AdamW
    from hecate.optim.rule import Step, Stepped


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Of optim muon. It steps the matrices of experts, adapters and decoder layers, each by itself; AdamW steps embeddings, the output
    layer, routers, norms and biases."""

    momentum: float = field(default=0.95, metadata=key(Range(0, 1, high_open=True)))
    """The decay rate of the mean of the gradients, of which Nesterov's step is made."""
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """By what learning_rate is multiplied for a matrix [m, n]. match_rms_adamw: 0.2 sqrt(max(m, n)), so that steps are as large as AdamW's
    and its learning rates fit. original: sqrt(max(1, m / n)), torch's default, with which 0.02 is usual."""
    adamw_learning_rate: float | None = field(default=None, metadata=key(POSITIVE))
    """The peak learning rate of what AdamW steps. null: learning_rate, which with adjust_lr_fn original is too high for it."""


def _is_hidden_matrix(parameter: ParameterSpec) -> bool:
    return len(parameter.shape) == 2 and parameter.kind is None


def _of_one(parameter: ParameterSpec) -> dict[str, StateSpec]:
    return {"momentum_buffer": StateSpec(parameter.shape)} if _is_hidden_matrix(parameter) else beside.STATE(parameter)


def _step(settings: MuonConfig, adamw: AdamW, peak: float) -> Step:
    from torch.optim import Muon

    from hecate.optim.rule import step_with, stepped_tensors

    adamw_share = (settings.adamw_learning_rate or peak) / peak

    def step(stepped: Sequence[Stepped], learning_rate: float) -> None:
        each = stepped_tensors(stepped)
        hidden = [one for one in each if _is_hidden_matrix(one.spec)]
        configured = partial(Muon, momentum=settings.momentum, adjust_lr_fn=settings.adjust_lr_fn)
        step_with(partial(configured, lr=learning_rate, weight_decay=adamw.weight_decay), hidden)
        adamw.step([one for one in each if not _is_hidden_matrix(one.spec)], adamw_share * learning_rate)

    return step


SETTINGS, STATE, STEP = MuonConfig, of_each(_of_one), _step
