"""A run without experts, of one replicated parameter, and its state after some steps."""

from __future__ import annotations

from unittest import mock

import numpy as np
import torch
from torch import nn

from hecate.checkpoint.train_state import TrainedParts, TrainState
from hecate.optim.adamw import AdamW
from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables
from hecate.parallel.values.loads import LoadHistory
from hecate.parallel.values.units import Unit


def stepped_parts(rank: int, world: int, device: str = "cpu") -> TrainedParts:
    """A run without experts: one replicated parameter, two data sources' worth of nothing."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = ExpertOptimizer(Trainables({}, {"r": parameter}), AdamW(weight_decay=0.0), LearningRate(0.1), torch.device(device))
    stream = mock.Mock(sequences_per_step=4)
    stream.state_dict.return_value = {"rows": 8}
    history = LoadHistory(2)
    shards = mock.Mock(named_parameters=dict, stores={}, owners={}, world_size=world, rank=rank, in_first_group=True, history=history)
    shards.residency_to_json = shards.residency_from_json = mock.Mock(return_value={})  # nothing is frozen
    return TrainedParts(mock.Mock(shards=shards), optimizer, stream)


def state_of(parts: TrainedParts, steps: int) -> TrainState:
    state = TrainState.at_start(parts)
    for _ in range(steps):
        for parameter in parts.optimizer.replicated.values():
            parameter.grad = torch.ones(3, dtype=torch.float64)
        parts.optimizer.step(1.0, None)
        parts.engine.shards.history.record({Unit(0): np.array([[1, 2], [3, 4]])})
        state = state.after_step(parts, tokens=10, skipped=False)
    return state
