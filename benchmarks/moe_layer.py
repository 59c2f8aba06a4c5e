"""One MixLoRA layer, forward and backward, on 2 gloo ranks of one thread: policies side by side under skewed and balanced routing.

The layer is the engine's own, with the collectives of a real step: gather, dispatch where the placement asks for it, combine, reduce.
All policies alternate in the same processes; a sample is the slowest rank's time.

`static_ep` is ours: a token travels once per rank and pays one base FFN there, whatever number of its experts is there.
`ep_per_choice` is expert parallelism as the textbook (and Megatron's dispatcher) has it: every (token, choice) pair travels and pays a
base FFN of its own.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.report import arguments, finish
from hecate.kernels.mixlora_inputs import FfnBase
from hecate.kernels.mixlora_reference import mixlora_ffn_reference
from hecate.moe.engine import Engine, EngineConfig, ExpertGroups
from hecate.moe.mixlora import LoraShape, MixLoraExperts
from hecate.parallel.planners import POLICIES
from hecate.parallel.topology import Topology, local_topology
from tests.ranks import run_ranks

WORLD = 2
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PER_CHOICE = "ep_per_choice"
ROUTINGS = ("zipf(1.2)", "balanced")


@dataclass(frozen=True)
class Shape:
    hidden: int = 512
    ffn: int = 1408
    rank: int = 16
    experts: int = 8
    top_k: int = 2
    tokens: int = 2048
    """per rank"""


def route(routing: str, shape: Shape, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(experts, weights) of each token: k different experts drawn with Zipf or equal probabilities, expert 0 the hottest."""
    rng = np.random.default_rng(seed)
    odds = np.arange(1, shape.experts + 1, dtype=np.float64) ** (-1.2 if routing.startswith("zipf") else 0.0)
    # Exponential races draw without replacement with the given odds.
    arrival = rng.exponential(size=(shape.tokens, shape.experts)) / odds
    expert = np.argsort(arrival, axis=1)[:, : shape.top_k]
    weight = rng.random((shape.tokens, shape.top_k)) + 0.5
    return torch.from_numpy(expert), torch.from_numpy(weight / weight.sum(1, keepdims=True)).float()


def make_engine(policy: str, shape: Shape, groups: ExpertGroups, topology: Topology | None = None) -> Engine:
    """
    Args:
        topology: what to plan with; None: this machine's, roughly.
    """
    random = torch.Generator().manual_seed(0)
    base = FfnBase(
        torch.randn(shape.ffn, shape.hidden, generator=random) / shape.hidden**0.5,
        torch.randn(shape.ffn, shape.hidden, generator=random) / shape.hidden**0.5,
        torch.randn(shape.hidden, shape.ffn, generator=random) / shape.ffn**0.5,
        "silu",
    )
    family = MixLoraExperts(
        base, LoraShape(shape.rank, 2.0, 0.0), PROJECTIONS, layer=0, num_experts=shape.experts, seed=0, master_dtype=torch.float32
    )
    # What would hide the gather: this layer's attention, four hidden x hidden projections.
    flops = 8.0 * shape.hidden**2 * shape.tokens
    topology = topology or local_topology(WORLD, cuda=False)
    engine = Engine({0: family}, EngineConfig(POLICIES[policy], topology, top_k=shape.top_k, non_moe_flops=flops), groups)
    for (_, expert), chunk in engine.named_parameters().items():
        values = torch.randn(chunk.shape, generator=torch.Generator().manual_seed(expert))
        chunk.data.copy_(values * 0.02)
    return engine


def one_step(
    engine: Engine, step: int, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor, *, per_choice: bool = False
) -> tuple[torch.Tensor, dict[int, np.ndarray]]:
    engine.begin_step(step)
    engine.last_micro_step()
    if per_choice:
        tokens, k = expert.shape
        token = torch.arange(tokens).repeat_interleave(k)
        y = engine.experts(0, x.repeat_interleave(k, 0), expert.reshape(-1, 1), weight.reshape(-1, 1), token, count=True)
        y = y.view(tokens, k, -1).sum(1)
    else:
        y = engine.experts(0, x, expert, weight, torch.arange(len(x)), count=True)
    y.backward(torch.ones_like(y))
    return y, engine.finish_step()


def check(engine: Engine, rank: int, shape: Shape, expert: torch.Tensor, weight: torch.Tensor, *, per_choice: bool) -> None:
    """The layer's output and gradients against the plain formula over the experts of both ranks. Raises AssertionError."""
    x = torch.randn(shape.tokens, shape.hidden, generator=torch.Generator().manual_seed(9 + rank)).requires_grad_()
    y, _ = one_step(engine, 0, x, expert, weight, per_choice=per_choice)
    family = engine.families[0]
    assert isinstance(family, MixLoraExperts)
    chunks = torch.stack(
        [torch.randn(family.init_chunk(0).shape, generator=torch.Generator().manual_seed(e)) * 0.02 for e in range(shape.experts)]
    )
    chunks.requires_grad_()
    plain_x = x.detach().clone().requires_grad_()
    wanted = mixlora_ffn_reference(plain_x, expert, weight, family.base, family.pairs(chunks))
    wanted.backward(torch.ones_like(wanted))
    assert chunks.grad is not None
    dist.all_reduce(chunks.grad)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, plain_x.grad, rtol=1e-3, atol=1e-3)
    for (_, number), parameter in engine.named_parameters().items():
        assert parameter.grad is not None
        error = float((parameter.grad - chunks.grad[number]).norm() / chunks.grad[number].norm())
        assert error < 1e-5, f"gradient of expert {number} is off by {error:.1e}"


def bench_rank(rank: int, world: int, shape: Shape, samples: int) -> list[dict[str, Any]]:
    default = dist.group.WORLD
    assert default is not None
    groups = ExpertGroups(default, dist.new_group())
    engines = {policy: make_engine(policy, shape, groups) for policy in POLICIES}
    engines[PER_CHOICE] = make_engine("static_ep", shape, groups)
    rows = []
    for routing in ROUTINGS:
        expert, weight = route(routing, shape, seed=rank)
        x = torch.randn(shape.tokens, shape.hidden, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        weight.requires_grad_()
        for policy, engine in engines.items():
            check(engine, rank, shape, expert, weight, per_choice=policy == PER_CHOICE)
        times: dict[str, list[float]] = {policy: [] for policy in engines}
        sent: dict[str, int] = {}
        skew: dict[str, float] = {}
        for sample in range(samples + 2):
            for policy, engine in engines.items():
                before = engine.bytes_sent
                dist.barrier()
                start = time.perf_counter()
                _, loads = one_step(engine, sample, x, expert, weight, per_choice=policy == PER_CHOICE)
                seconds = torch.tensor(time.perf_counter() - start)
                dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
                if sample >= 2:
                    times[policy].append(1e3 * seconds.item())
                total = torch.tensor(engine.bytes_sent - before)
                dist.all_reduce(total)
                sent[policy] = int(total)
                skew[policy] = engine.imbalance(loads)
        rows += [
            {
                "policy": policy,
                "routing": routing,
                "ms_median": statistics.median(times[policy]),
                "ms_min": min(times[policy]),
                "ms_all": times[policy],
                "bytes_sent": sent[policy],
                "imbalance": skew[policy],
            }
            for policy in engines
        ]
    return rows


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    rows = run_ranks(WORLD, bench_rank, Shape(), 3 if options.quick else 15, timeout=600)[0]
    median = {(row["policy"], row["routing"]): row["ms_median"] for row in rows}
    summary = {
        "zipf_speedup_over_static_ep": median["static_ep", ROUTINGS[0]] / median["hecate", ROUTINGS[0]],
        "balanced_speedup_over_static_ep": median["static_ep", ROUTINGS[1]] / median["hecate", ROUTINGS[1]],
        "zipf_speedup_over_ep_per_choice": median[PER_CHOICE, ROUTINGS[0]] / median["hecate", ROUTINGS[0]],
        "balanced_speedup_over_ep_per_choice": median[PER_CHOICE, ROUTINGS[1]] / median["hecate", ROUTINGS[1]],
    }
    finish("moe_layer", rows, summary, options.json)


if __name__ == "__main__":
    main()
