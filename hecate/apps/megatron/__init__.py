"""Models built by Megatron (megatron-core) around our experts: a front end to the same engine and trainer as transformers' models.

Importing megatron takes seconds, so the three functions of a front end (`hecate.model.front_ends`) import it when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hecate.apps.megatron.imports import require_megatron as require

if TYPE_CHECKING:
    from hecate.adapters.trained_output import TrainedOutput
    from hecate.config import Config
    from hecate.engine.step_plans import SlotsByMemory
    from hecate.model.base import BaseModel
    from hecate.parallel.cluster.topology import Topology
    from hecate.ranks.ranks import Ranks


def build(config: Config, ranks: Ranks, topology: Topology | None, slots_by_memory: SlotsByMemory) -> BaseModel:
    """As `FrontEnd.build`. Raises UserError: megatron-core or the tokenizer is missing."""
    from hecate.apps.megatron.front_end import build_megatron

    return build_megatron(config, ranks, topology, slots_by_memory)


def output(config: Config, base: BaseModel) -> TrainedOutput:
    """As `FrontEnd.output`: a Mixtral."""
    from hecate.apps.megatron.export import mixtral_output

    return mixtral_output(config, base)


__all__ = ["build", "output", "require"]
