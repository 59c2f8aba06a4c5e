"""How far the simulator can be trusted: predicted against measured seconds and bytes of real steps on gloo ranks of one thread.
"""

from __future__ import annotations

import pickle, sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.gloo_steps import Shape, Stack, Wire, Clock, draw_routing
from benchmarks.report import arguments, finish
from benchmarks.step_probes import Probes, measured_cost, plain_cost, yardstick
from hecate.moe.engine import ExpertGroups
from hecate.parallel.planners import POLICIES
from hecate.parallel.workloads import WORKLOADS
from hecate.profile.probe import ProbeSizes
from hecate.profile.run import profile
from hecate.train.ranks import Ranks
from tests.ranks import run_ranks

TRIED = ("static_ep", "full", "hecate", "auto")
CASES = ("balanced", "one_hot_expert", "hot_rank", "ragged_sources", "empty_rank", "rotating", "burst", "zipf", "dirichlet_drift")
PROFILE_SIZES = ProbeSizes(matmul=1024, copy_bytes=1 << 26, small_bytes=1 << 10, large_bytes=1 << 22, seconds=0.4)
STEPS = 6


def loads_of(workload, world, shape):
    return WORKLOADS[workload](STEPS, shape.layers, world, shape.experts, shape.tokens, shape.top_k, 0)


def routing_of(loads_E, shape, key):
    rng = np.random.default_rng([*key])
    expert = torch.from_numpy(draw_routing(loads_E, shape.top_k, rng))
    return expert, torch.full(expert.shape, 1 / shape.top_k).requires_grad_()


def measure(rank: int, world: int, shape: Shape, repeats: int, names) -> dict[str, Any]:
    default = dist.group.WORLD
    groups = ExpertGroups(default, dist.new_group())
    ranks = Ranks(rank, world, torch.device("cpu"), groups)
    def topo():
        with tempfile.TemporaryDirectory() as folder:
            return profile(ranks, Path(folder) / "topology.yaml", PROFILE_SIZES)
    topologies = [topo()]
    probes = Probes(shape, topologies[0], groups, rank)
    clock = Clock(yardstick(shape))
    first = [probes.run(clock) for _ in range(5)]
    planning = measured_cost({n: median(s[n] for s in first) for n in first[0]}, shape, topologies[0])
    stacks = {p: Stack(shape, POLICIES[p], topologies[0], planning, groups) for p in TRIED}
    x_TD = torch.randn(shape.tokens, shape.hidden, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    seconds = first[2:]
    rows = []
    for repeat in range(repeats):
        for number, name in enumerate(names):
            seconds.append(probes.run(clock))
            loads = loads_of(name, world, shape)
            for s in stacks.values(): s.forget_loads()
            for step in range(STEPS):
                routing = [routing_of(loads[step, l, rank], shape, (number, step, l, rank)) for l in range(shape.layers)]
                for p, stack in stacks.items():
                    wire = Wire(world)
                    before = stack.engine.bytes_sent
                    with wire.counting():
                        took = clock.time(lambda: stack.step(step, x_TD, routing))
                    wire.bytes_to[rank] = 0
                    rows.append(dict(workload=name, policy=p, step=step, repeat=repeat, seconds=took, bytes_to=wire.bytes_to, counter=stack.engine.bytes_sent - before))
            seconds.append(probes.run(clock))
        topologies.append(topo())
    return dict(topologies=topologies, planning=planning, probes=seconds, rows=rows)


if __name__ == "__main__":
    w = int(sys.argv[1]); rep = int(sys.argv[2])
    shape = Shape(tokens=256 if w == 2 else 128)
    import time
    t=time.time()
    res = run_ranks(w, measure, shape, rep, CASES, timeout=600)
    print(time.time()-t)
    pickle.dump((shape, res), open(f"/tmp/fidelity/res{w}.pkl","wb"))
