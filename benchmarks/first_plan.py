"""One rank's first plans, for `benchmarks.startup`: python -m benchmarks.first_plan EXPERTS RANKS LAYERS. Prints JSON.

Under NUMBA_CACHE_DIR, an empty folder or one that a rank before has filled. The rank plans step after step until machine code plans.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import numpy as np

from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.cost.cost_model import LayerCost
from hecate.parallel.loops import jit
from hecate.parallel.planners import POLICIES, PlanInput
from hecate.parallel.values.placement import contiguous_owners

HIDDEN, FFN, LORA_RANK, TOKENS, TOP_K = 576, 1536, 8, 384, 2
"""configs/quickstart.yaml"""
STEP_SECONDS = 2.0
"""of computing between two plans"""


def plan_input(experts: int, ranks: int, layers: int) -> PlanInput:
    random = np.random.default_rng(0)
    odds = np.arange(1, experts + 1) ** -1.2
    loads = [random.multinomial(TOKENS * TOP_K, random.permutation(odds) / odds.sum(), size=ranks).T for _ in range(layers)]
    pairs, ffn = 3 * LORA_RANK * (HIDDEN + FFN), 3 * HIDDEN * FFN
    cost = LayerCost(
        trainable_bytes=4.0 * pairs,
        state_bytes=12.0 * pairs,
        top_k=TOP_K,
        row_bytes=4.0 * HIDDEN,
        row_flops=2.0 * ffn,
        assignment_flops=2.0 * pairs,
        assignment_backward=3.0,
        non_moe_flops=6.0 * HIDDEN**2 * TOKENS,
    )
    owners = np.stack([contiguous_owners(experts, ranks)] * layers)
    return PlanInput(owners, np.stack(loads).astype(np.float64), local_topology(ranks, cuda=False), cost, np.full(ranks, experts))


def main() -> None:
    given = plan_input(*map(int, sys.argv[1:4]))
    seconds: list[float] = []
    began, plain = time.perf_counter(), 0
    while not seconds or jit.start_compiling() == "compiling":
        start = time.perf_counter()
        POLICIES["auto"](given)
        seconds.append(time.perf_counter() - start)
        plain += jit.start_compiling() != "ready"
        time.sleep(STEP_SECONDS if plain else 0.0)
    print(
        json.dumps(
            {
                "first_plan_seconds": seconds[0],
                "waited_seconds": jit.waited_seconds(),
                "plain_plans": plain,
                "slowest_plan_seconds": max(seconds),
                "until_machine_code_seconds": time.perf_counter() - began,
                "compiler_processor_seconds": resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime,
            }
        )
    )


if __name__ == "__main__":
    main()
