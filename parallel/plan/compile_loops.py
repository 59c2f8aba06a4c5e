"""`python -m hecate.parallel.plan.compile_loops`: compile the planner's loops for this machine (see `hecate.parallel.loops.jit`)."""

from __future__ import annotations

import gc
import os
import threading
import time
from dataclasses import replace

import numpy as np

from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.cost.cost_model import LayerCost, transfer_seconds
from hecate.parallel.cost.gather_bytes import PortBytes
from hecate.parallel.loops import jit
from hecate.parallel.plan.after_router import best_after_router
from hecate.parallel.planners import PlanInput
from hecate.parallel.planners.policies.auto import plan_auto
from hecate.parallel.transfer.transfer_plan import fastest_route
from hecate.parallel.values.layout import ChunkSize


def compile_all() -> None:
    """Call every entry once, with the smallest of inputs."""
    owners = np.zeros((1, 1), dtype=np.int64)
    cost = LayerCost(trainable_bytes=1.0, row_bytes=1.0)
    with jit.compiling_in_this_process():
        given = PlanInput(owners, None, local_topology(1, cuda=False), cost, np.ones(1, dtype=np.int64))
        plan = plan_auto(given)
        plan.seconds(given)
        plan.traffic(given.expected_LED, given.expected_LED, given.topology)
        best_after_router(plan_auto, replace(given, loads_LED=2 * given.expected_LED), [plan.layer(given, 0)], splits=True)
        fastest_route(plan.placement(0), ChunkSize(1, 1), given.topology)
        transfer_seconds(PortBytes(*np.zeros((4, 1))), 1.0, given.topology)
    jit.all_is_compiled()


def end_with(parent: int) -> None:
    """End this process when the one that has started it has ended: nobody waits for the rest, and the next compiler keeps what is done."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    gc.disable()  # saves a sixth of the time; the process takes 0.8 GB: numba makes much and throws away little
    compile_all()
