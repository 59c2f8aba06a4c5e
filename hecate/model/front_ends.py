"""Front ends: who builds the model that is trained, by the names in `model.front_end`.

transformers' models are built by `hecate.model.base`. Any other front end is a package with the functions of `FrontEnd`, which is imported
when it is chosen.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, cast

from hecate.config import Config
from hecate.engine.step_plans import SlotsByMemory
from hecate.errors import UserError
from hecate.model.base import BaseModel
from hecate.parallel.cluster.topology import Topology
from hecate.ranks.ranks import Ranks

_PACKAGES = {"megatron": "hecate.apps.megatron"}


class FrontEnd(Protocol):
    """What a front end's package has."""

    def require(self) -> None:
        """Check that what it needs is installed. It imports nothing heavy. Raises UserError: something is missing."""

    def build(self, config: Config, ranks: Ranks, topology: Topology | None, slots_by_memory: SlotsByMemory) -> BaseModel:
        """Build the configured model with its experts in it (`BaseModel.moe`). Every rank must call it.

        Args:
            topology, slots_by_memory: see `engine_config`.
        """

    def output(self, config: Config, base: BaseModel) -> Any:
        """Return the output that a run will write, a `TrainedOutput`."""


def other_front_end(name: str) -> FrontEnd | None:
    """Return the front end of a name; None: it is that of transformers' models. Raises UserError: hecate is installed without it."""
    if name not in _PACKAGES:
        return None
    try:
        return cast(FrontEnd, import_module(_PACKAGES[name]))
    except ModuleNotFoundError as error:
        if error.name is None or not _PACKAGES[name].startswith(error.name):
            raise
        raise UserError(f"model.front_end={name}: this installation of hecate is without it\n  install hecate whole") from error
