"""What apps add to trainings that give their section of the configuration (`hecate.config.sections`): checks, an extension, a last word."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from hecate.config import Config
from hecate.config.sections import APPS, IN_TRAININGS, SETTINGS
from hecate.data.sequences import PackedSequence
from hecate.train.build import RunParts
from hecate.train.extensions.extension import StepExtension


class TrainingAddition:
    """`ADDITION` of the module `training` of a section that is in `IN_TRAININGS`. Every rank calls its methods alike."""

    def check_data(self, parts: RunParts) -> None:
        """Raises UserError: the section does not go together with the data."""

    def extension(self, parts: RunParts, step: int, sequences: Sequence[PackedSequence]) -> StepExtension:
        """What a step does beside training.

        Args:
            step: its number, from 0.
            sequences: of the whole step, all ranks together.
        """
        raise NotImplementedError

    def outcome(self, parts: RunParts, steps: int) -> list[tuple[str, str]]:
        """What the summary of a training of so many steps says of the section, as names and values."""
        return []


def training_additions(config: Config) -> list[TrainingAddition]:
    """Those of the sections that the configuration gives. The modules of others are not imported."""
    given = [one for one in IN_TRAININGS if one in SETTINGS and getattr(config, one) != SETTINGS[one].SETTINGS()]
    return [import_module(f"{APPS[section]}.training").ADDITION for section in given]
