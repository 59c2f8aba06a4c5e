"""What `hecate plan` says of the memory of a run that is there, for the run's report."""

from __future__ import annotations

from pathlib import Path

from hecate.apps.foresee.dry_run import forecast
from hecate.config import load_config
from hecate.errors import UserError
from hecate.model.sizes.run_shape import run_shape
from hecate.report.pages.page import PlannedMemory

WORKLOAD = "dirichlet_drift"
"""as `hecate plan` has it where nothing is said"""


def planned_memory(folder: Path, ranks: int) -> PlannedMemory | str:
    """Return the memory that is predicted for a run's configuration, or why nothing can be: a model that has gone, for example.

    Args:
        folder: of the run.
        ranks: how many it had.
    """
    try:
        config = load_config(folder / "config.yaml", ("resume=false",), claim_output=False)
        found = forecast(run_shape(config, None, ranks), WORKLOAD)
    except UserError as error:
        return str(error).splitlines()[0]
    one = found.policies[0]
    by_rank = one.memory_PD.max(0)
    rank = int(by_rank.argmax())
    phase = int(one.memory_PD[:, rank].argmax())
    parts = {part.name: float(part.bytes_PD[phase, rank]) for part in one.memory}
    return PlannedMemory(by_rank, parts, bool(found.run.is_gpu_D.any()))
