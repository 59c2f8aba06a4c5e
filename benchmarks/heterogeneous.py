"""Compare equal shares of tokens, shares planned by speed, and the ideal, on devices of different speeds.

Measured: two ranks train, one of them limited to half of a processor. Free and limited, equal and planned take turns in the same
processes (`benchmarks.ratios`). The planned shares come from the probe that a Ray job starts with, run while the rank is limited. The
ideal is three quarters of the tokens/s of two free ranks. Simulated: a mixed cluster of 20 GPUs of three kinds (`rows` are the
sequences of a device of each kind). Its ideal shares out the dense part in fractions of a sequence.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.ratios import Budget, Ratio, speedup, until_narrow
from benchmarks.report import arguments, finish
from benchmarks.small_run import make_folder
from benchmarks.throttle import Processor
from hecate.config import load_config
from hecate.config.files.presets import find_preset
from hecate.launch.profile.fit import topology_from
from hecate.launch.profile.probe import quick_sizes
from hecate.launch.profile.run import measure
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cluster.topology_file import load_topology
from hecate.parallel.cost.model_shapes import load_model_shape
from hecate.parallel.planners import POLICIES
from hecate.parallel.simulate.simulated_step import Setting
from hecate.parallel.simulate.simulator import simulate, slots_in_memory
from hecate.parallel.simulate.workloads import WORKLOADS
from hecate.parallel.values.sequence_shares import dense_seconds, sequences_by_speed
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from hecate.train.training import Training
from testing.ranks import run_ranks

HELD = 1
"""the rank that is limited to half of a core"""
MODES = ("free", "planned", "equal")
ENOUGH, QUICK = Budget(half_width=0.02, rounds=60), Budget(half_width=0.02, rounds=2)
STEPS = 2
"""of a sample"""
IDEAL = 0.75
"""of two ranks, one of which has half of a processor, over two free ones"""
SEQUENCES_PER_RANK = 8
"""the sequences of each rank in the simulated cluster, on average"""


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory(prefix="hecate-") as folder:
        config = make_folder(Path(folder))
        measured = run_ranks(2, bench_rank, str(config), QUICK if options.quick else ENOUGH, timeout=3600)[0]
    rows, summary = measured
    more_rows, more = simulated(steps=4 if options.quick else 12)
    finish("heterogeneous", [*rows, *more_rows], summary | more, options.json)


def bench_rank(rank: int, world: int, config: str, budget: Budget) -> tuple[list[dict[str, Any]], dict[str, float | Ratio]]:
    default = dist.group.WORLD
    assert default is not None
    ranks = Ranks(rank, world, torch.device("cpu"), ExpertGroups(default, dist.new_group()))
    run = Training(load_config(config, claim_output=False), ranks)
    equal = run.parts.moe.engine.shards.config.topology
    processor = Processor(os.getpid())

    def held(on: bool) -> None:
        if rank == HELD:
            processor.halve() if on else processor.free()
        dist.barrier()

    try:
        held(True)
        speeds = topology_from(measure(ranks, (0, 0), ("CPU", "CPU"), quick_sizes(ranks.device))).flops
        planned = replace(equal, flops=speeds)
        check(run, equal, planned)
        shares: dict[str, tuple[int, ...]] = {}

        def token_seconds(mode: str) -> float:
            """Seconds a token."""
            held(mode != "free")
            run.plan_for(planned if mode == "planned" else equal)
            shares[mode] = run.shares
            dist.barrier()
            started = time.perf_counter()
            tokens = sum(run.train_one().tokens for _ in range(STEPS))
            dist.barrier()
            return ranks.all_max((time.perf_counter() - started) / tokens)

        seconds = until_narrow(token_seconds, MODES, [("planned", "free"), ("planned", "equal")], budget)
    finally:
        processor.close()
    rows = [
        {
            "setting": mode,
            "rows": ":".join(map(str, shares[mode])),
            "held_by": processor.how,
            "tokens_per_s": 1 / statistics.median(seconds[mode]),
            "token_seconds": seconds[mode],
        }
        for mode in MODES
    ]
    ideal = [one / IDEAL for one in seconds["free"]]
    return rows, {
        "share_of_ideal": speedup(seconds["planned"], ideal, budget),
        "speedup_over_equal_shares": speedup(seconds["planned"], seconds["equal"], budget),
    }


def check(run: Training, equal: Any, planned: Any) -> None:
    """Check that a step has the same result, whichever rank computes which sequences."""
    losses = []
    for topology in (equal, planned):
        run.plan_for(topology)
        state = run.parts.stream.state_dict()
        rows = run.parts.stream.next_step()
        run.parts.stream.load_state_dict(state)
        with run.parts.moe.engine.evaluation() as evaluation, torch.no_grad():
            from hecate.train.steps.passes import forward_loss, pass_tokens

            loss = torch.zeros((), dtype=torch.float64)
            for batch in run.micro_batches(rows):
                with evaluation.forward(pass_tokens(run.parts.base.head, batch)):
                    loss += forward_loss(run.parts.base.head, batch)
        losses.append(float(run.ranks.all_sum(loss)))
    assert abs(losses[0] - losses[1]) <= 1e-4 * abs(losses[0]), losses


def simulated(steps: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Simulate MixLoRA on Llama-7B on the mixed cluster, with `auto` and Zipf loads."""
    topology = load_topology(find_preset("topologies", "topology", "mixed"))
    model = load_model_shape(find_preset("models", "model", "llama-7b-mixlora"))
    world, layers = topology.world_size, 4
    total = SEQUENCES_PER_RANK * world
    equal_loads = WORKLOADS["zipf"](steps, layers, world, model.experts, SEQUENCES_PER_RANK * model.seq, model.top_k, 0)
    fractions = [total * rate / sum(topology.flops) for rate in topology.flops]
    seconds = {}
    shares: dict[str, Any] = {
        "equal": [SEQUENCES_PER_RANK] * world,
        "planned": sequences_by_speed(total, topology.flops),
        "ideal": fractions,
    }
    for name, sequences_D in shares.items():
        loads = np.rint(equal_loads * (np.asarray(sequences_D) / SEQUENCES_PER_RANK)[None, None, None, :]).astype(np.int64)
        cost = model.layer_cost(model.seq)  # of one sequence
        flops = cost.non_moe_flops * dense_seconds(sequences_D, topology.flops) * min(topology.flops)
        slots_D = slots_in_memory(topology, cost, num_layers=model.layers, num_experts=model.experts, other_bytes=model.replicated_bytes())
        found = simulate(
            loads,
            {"auto": POLICIES["auto"]},
            Setting(topology=topology, cost=replace(cost, non_moe_flops=flops), slots_D=slots_D, num_layers=model.layers),
        )
        seconds[name] = found[0].step_seconds
    tokens = total * model.seq
    rows = [
        {"setting": f"simulated {name}", "rows": _text(shares[name], topology), "held_by": "-", "tokens_per_s": tokens / value}
        for name, value in seconds.items()
    ]
    summary = {
        "simulated_share_of_ideal": seconds["ideal"] / seconds["planned"],
        "simulated_speedup_over_equal_shares": seconds["equal"] / seconds["planned"],
    }
    return rows, summary


def _text(sequences_D: Sequence[float], topology: Topology) -> str:
    """Return the sequences of the first rank of each node as text."""
    return ":".join(f"{sequences_D[topology.ranks_of_node(node)[0]]:.3g}" for node in range(topology.num_nodes))


if __name__ == "__main__":
    main()
