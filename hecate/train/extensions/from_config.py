"""The extensions of a run's steps, as its configuration says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hecate import faults
from hecate.data.encode import IGNORED
from hecate.data.sequences import PackedSequence
from hecate.elastic.backups import backups_kept
from hecate.train.build import RunParts
from hecate.train.extensions.copies import BackupGradients
from hecate.train.extensions.extension import StepExtension
from hecate.train.extensions.fault_places import FaultPlaces
from hecate.train.extensions.of_apps import TrainingAddition
from hecate.train.extensions.replayed_routing import ReplayedRouting
from hecate.train.extensions.separate_adapters import SeparateAdapters
from hecate.train.extensions.users import UsersOfSamples


def step_extensions(
    parts: RunParts, step: int, sequences: Sequence[PackedSequence], additions: Sequence[TrainingAddition]
) -> list[StepExtension]:
    """What the configuration adds to one step.

    Args:
        step: its number, from 0.
        sequences: of the whole step, all ranks together.
        additions: of apps.
    """
    config, engine, found = parts.config, parts.moe.engine, list[StepExtension]()
    if parts.moe.separate_experts:
        found.append(SeparateAdapters(_labels_of_source(sequences, len(config.data.train))))
    if parts.features_UF is not None:
        found.append(UsersOfSamples(parts.features_UF))
    if config.moe.replay is not None:
        found.append(ReplayedRouting(config.moe.replay, engine.shards.device))
    found += [one.extension(parts, step, sequences) for one in additions]
    if faults.armed():
        found.append(FaultPlaces())
    if backups := backups_kept(engine, config.fssdp.redundancy):
        found.append(BackupGradients(engine, parts.optimizer, backups))
    return found


def _labels_of_source(sequences: Sequence[PackedSequence], sources: int) -> list[int]:
    """Label tokens by source."""
    labelled = np.concatenate([packed.task[packed.targets != IGNORED] for packed in sequences])
    return np.bincount(labelled, minlength=sources).tolist()
