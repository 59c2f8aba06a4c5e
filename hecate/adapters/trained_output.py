"""The output of a finished run: an adapter for the base model, or a whole model, and how a run begins with one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from hecate.adapters.adapter_format import WriteTrained
from hecate.adapters.format_table import FORMATS, read_adapter
from hecate.config import Config
from hecate.errors import UserError
from hecate.io.durable import put_in_place, successor_of
from hecate.model.base import BaseModel
from hecate.model.front_ends import other_front_end
from hecate.model.moe_model import MoeModel
from hecate.ranks.ranks import Ranks


@dataclass(frozen=True)
class TrainedOutput:
    """The output that a run will write. It is decided before training, so that what a format cannot hold is refused early."""

    name: str
    """the name of the folder in output_dir and of the summary's key: adapter, adapters or model"""
    write: WriteTrained

    def replace(self, run_folder: Path, moe: MoeModel, ranks: Ranks) -> Path:
        """Write the folder. One that an earlier end of the same run wrote stays until it is written. Every rank must call it.

        Raises:
            UserError: the disk refuses.
        """
        folder = run_folder / self.name
        successor = successor_of(folder) if ranks.is_first else folder  # the first rank alone writes
        self.write(successor, moe, ranks)
        if ranks.is_first:
            try:
                put_in_place(successor, folder)
            except OSError as error:
                raise UserError(f"{folder}: cannot be replaced: {error.strerror or error}; the new one is {successor}") from error
        return folder


def output_of(config: Config, base: BaseModel) -> TrainedOutput:
    """Return the output that a run of this configuration will write. `base` is the loaded model.

    Raises:
        UserError: the format cannot hold the trained model.
    """
    if other := other_front_end(config.model.front_end):
        return cast(TrainedOutput, other.output(config, base))
    return TrainedOutput(config.moe.output_folder, FORMATS[config.moe.output].output(config, base))


def begin_with_adapter(config: Config, base: BaseModel, moe: MoeModel) -> None:
    """Set all that trains to the values of the adapter that `lora.init_from` names. Every rank must call it.

    Raises:
        UserError: the adapter cannot be read, or is not for the configured model and experts.
    """
    FORMATS[config.moe.output].begin(config, base, moe, read_adapter)
