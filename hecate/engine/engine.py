"""The FSSDP engine of one rank: it begins training steps and evaluations, in which experts are gathered, run and reduced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

import numpy as np
from torch import Tensor

from hecate.engine.evaluation import EvaluationPass, evaluation
from hecate.engine.shards import ExpertShards
from hecate.engine.step import Step, StepLedger, require_nothing_under_way
from hecate.engine.step_plans import EngineConfig
from hecate.experts.family import ExpertFamily
from hecate.experts.forward_pass import CurrentPass
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import ExpertGroups

_S = TypeVar("_S", bound=Step)


class Engine:
    """The `ExpertEngine` (`hecate.engine.protocol` describes its methods) that places experts as a planner decides in every step."""

    def __init__(self, families: dict[Unit, ExpertFamily], config: EngineConfig, groups: ExpertGroups) -> None:
        pools = [family.pool for family in families.values()]
        self.shards = ExpertShards(families, config, groups, pools={pool.unit: pool for pool in pools if pool is not None})
        self.current = CurrentPass()
        self._last: StepLedger | None = None
        """The ledger of the step that began last; None: no step has begun."""

    @property
    def runs_in_lockstep(self) -> bool:
        return bool(self.shards.frozen) and self.shards.world_size > 1

    def begin_step(self, number: int, micro_steps: int = 1) -> Step:
        return self.begin(lambda: Step(self.shards, self.current, number, micro_steps))

    def begin(self, make: Callable[[], _S]) -> _S:
        """Begin the step that `make` returns, once nothing else is under way."""
        require_nothing_under_way(self._last, self.current)
        step = make()
        self._last = step.ledger
        return step

    def evaluation(self, *, in_lockstep: bool = False) -> AbstractContextManager[EvaluationPass]:
        require_nothing_under_way(self._last, self.current)
        return evaluation(self.shards, self.current, in_lockstep=in_lockstep)

    def rejoin(
        self, topology: Topology, groups: ExpertGroups, owners: dict[Unit, np.ndarray], chunks: Mapping[Unit, Mapping[int, Tensor]]
    ) -> None:
        self._last, self.current.now = None, None
        self.shards.rejoin(topology, groups, owners, chunks)
