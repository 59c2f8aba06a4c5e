"""How runs that are trained at once share the devices of one machine."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hecate.errors import UserError
from hecate.ranks.cores import usable_cores
from hecate.ranks.launcher_files import COLLECTIVES_VARIABLE


def visible_gpus() -> list[str]:
    """Return the GPUs of this machine that may be used, as CUDA_VISIBLE_DEVICES names them; [] where ranks may share one."""
    if os.environ.get(COLLECTIVES_VARIABLE) == "gloo":
        return []
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(number) for number in range(count)]
    return names[:count]


def check_share(jobs: int, gpus: Sequence[str]) -> None:
    """Check that each of the runs that are trained at once gets a GPU, if the machine has any. Raises UserError."""
    if gpus and len(gpus) < jobs:
        raise UserError(f"jobs: {jobs} runs at once, but this machine has {len(gpus)} GPUs\n  set jobs to {len(gpus)} at most")


def check_ranks(ranks: int | None, jobs: int, gpus: Sequence[str]) -> None:
    """Check that a run has no more ranks than it gets GPUs. Raises UserError."""
    share = len(gpus) // jobs
    if ranks is not None and gpus and jobs > 1 and ranks > share:
        raise UserError(
            f"nproc: {ranks} ranks, but with jobs: {jobs} each run gets {share} of {len(gpus)} GPUs\n  set nproc to {share} at most"
        )


def places_environment(place: int, jobs: int, gpus: Sequence[str], ranks: int) -> dict[str, str]:
    """Return the variables by which runs that are trained at once share a machine: each has GPUs of its own, or its part of the cores.

    Args:
        place: of the run among those trained at once, from 0.
        ranks: of the run.
    """
    if jobs == 1:
        return {}
    if gpus:
        share = len(gpus) // jobs
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[place * share : (place + 1) * share])}
    threads = max(1, usable_cores() // (ranks * jobs))
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
