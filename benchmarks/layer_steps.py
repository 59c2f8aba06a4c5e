"""A rank that takes steps of one MoE layer for `benchmarks.before_after`, by the code of the checkout that PYTHONPATH names.

    python layer_steps.py KIND

KIND is one of `benchmarks.moe_layer`'s kinds of experts. A step is the processor seconds of `REPEATS` forward and backward passes of each
policy under each routing, planned for a topology that is the same everywhere. It imports only what checkouts have had under the same names
since commit c7498cd8.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist

from benchmarks import moe_layer_parts as parts

POLICIES, ROUTINGS, REPEATS = ("static_ep", "auto"), ("zipf(1.2)", "balanced"), 2


def main(kind: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    default = dist.group.WORLD
    assert default is not None
    groups = parts.ExpertGroups(default, dist.new_group())
    topology = sys.modules[parts.Topology.__module__].local_topology(world, cuda=False)
    shape = parts.Shape(hidden=256, ffn=704, tokens=512)
    family, before = parts.make_family(kind, shape), parts.Projections(shape, trained=kind == "full")
    engines = {(policy, routing): parts.make_engine(policy, shape, groups, topology, family) for policy in POLICIES for routing in ROUTINGS}
    x = torch.randn(shape.tokens, shape.hidden, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    number = 0

    def step() -> float:
        nonlocal number
        used = 0.0
        for _ in range(REPEATS):
            for (_, routing), engine in engines.items():
                expert, weight = parts.route(routing, shape, seed=rank, step=number)
                before.zero_grad(set_to_none=True)
                x.grad = None
                dist.barrier()
                started = time.process_time()
                parts.one_step(engine, number, x, expert, weight.requires_grad_(), before=before)
                used += time.process_time() - started
            number += 1
        return used

    # As `benchmarks.handover.take_steps`, which the other checkout need not have.
    for _ in sys.stdin:
        print(f"took {step()!r}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
