"""Time training steps whose experts are planned from routing that is known ahead, beside plans from history and from counts after routers.

    python -m benchmarks.replay [--quick] [--resume] [--json FILE]

A tiny Llama with full experts trains on two ranks, on samples that bring the routing of the workload `rotating`: in each step another
expert is hot in each layer, so that a prediction from past steps is always wrong. The routing is forced in all trainings
(`moe.replay: force`); only `fssdp.plan` differs. The trainings take turns in the same two processes (`benchmarks.ratios`), and a sample
is the slowest rank's time of a step. Planners get a topology that is measured first. There are two settings: the loopback interface
and, where this process may create it (root), a link of 4 Gbit/s between two network namespaces, as two nodes.

What it shows: the order of the three kinds of plans where links and cores are these, and that losses are equal. It shows no GPU's times.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.gloo_steps import draw_routing
from benchmarks.ratios import Budget, Ratio, of_times, until_narrow
from benchmarks.report import finish, kept_rows, recorded, resumable
from benchmarks.slow_link import measured_topology
from hecate.config import load_config
from hecate.data.mixture import Mixture
from hecate.data.routed_experts import routing_text
from hecate.parallel.cluster.mesh import make_mesh
from hecate.parallel.simulate.workloads import WORKLOADS
from hecate.ranks.groups import expert_groups
from hecate.ranks.ranks import Ranks
from hecate.train.training import Training
from testing.namespaces import missing_for_slow_link, slow_link
from testing.ranks import run_ranks
from testing.tiny_run import save_random_llama

PLANS = ("history", "replay", "exact")
OTHERS = ("history", "exact")
WARM_UP = 6
"""steps that are not counted: the history has five"""
SETTINGS = {"loopback": (0, 0), "4 Gbit/s": (0, 1)}
"""the node of each rank"""
RATE = "4gbit"
SEED = 0


@dataclass(frozen=True)
class Sizes:
    steps: int = 46
    """with those that are not counted; the most, if ratios are known before"""
    hidden: int = 256
    ffn: int = 1024
    layers: int = 2
    experts: int = 8
    top_k: int = 1
    seq_len: int = 128
    sequences: int = 12
    """of a rank in a step"""

    @property
    def budget(self) -> Budget:
        return Budget(half_width=0.02, rounds=self.steps - WARM_UP)


def make_inputs(folder: Path, sizes: Sizes) -> None:
    """Write a model, samples of just `seq_len` tokens with their routing, and a configuration.

    A sample's place in the run's order decides its step and its rank, and so its part of the workload's loads.
    """
    save_random_llama(
        folder / "model",
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    tokens = sizes.sequences * sizes.seq_len
    loads = WORKLOADS["rotating"](sizes.steps, sizes.layers, 2, sizes.experts, tokens, sizes.top_k, SEED)
    random = np.random.default_rng(SEED)
    number = sizes.steps * 2 * sizes.sequences
    place_of = {sample: place for place, (_, sample) in enumerate(islice(Mixture([number], [1.0], SEED), number))}
    routed: list[np.ndarray] = []
    for step in range(sizes.steps):
        for rank in range(2):
            of_layers = [draw_routing(loads[step, layer, :, rank], sizes.top_k, random) for layer in range(sizes.layers)]
            routed += np.split(np.stack(of_layers, axis=1).astype(np.int16), sizes.sequences)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz    ", np.uint8)
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for sample in range(number):
            text = "x" + random.choice(letters, sizes.seq_len - 1).tobytes().decode()
            file.write(json.dumps({"text": text, "routed_experts": routing_text(routed[place_of[sample]])}) + "\n")
    (folder / "config.yaml").write_text(
        f"model: {{name_or_path: {folder}/model, dtype: float32, train_non_experts: true}}\n"
        f"data: {{train: {folder}/train.jsonl, seq_len: {sizes.seq_len}, packing: false, cache: null}}\n"
        f"output_dir: {folder}/runs/unset\nmax_steps: {sizes.steps}\nmicro_batch_size: {sizes.sequences}\nseed: {SEED}\n"
        f"moe: {{family: full, num_experts: {sizes.experts}, top_k: {sizes.top_k}, replay: force}}\nlearning_rate: 1.0e-4\n",
        encoding="utf-8",
    )


def bench_rank(rank: int, world: int, folder: str, node_of_rank: tuple[int, ...], sizes: Sizes) -> list[dict[str, Any]]:
    """Train with all plans in turn; what there is to say of each."""
    ranks = Ranks(rank, world, torch.device("cpu"), expert_groups(make_mesh(world, None)))
    topology = measured_topology(ranks, node_of_rank)
    trainings = {
        plan: Training(
            load_config(f"{folder}/config.yaml", [f"fssdp.plan={plan}", f"output_dir={folder}/runs/{plan}"], claim_output=False),
            ranks,
            topology,
        )
        for plan in PLANS
    }
    losses: dict[str, list[float]] = {plan: [] for plan in PLANS}
    imbalances: dict[str, list[float]] = {plan: [] for plan in PLANS}
    sent: dict[str, list[int]] = {plan: [] for plan in PLANS}

    def step(plan: str) -> float:
        dist.barrier()
        started = time.perf_counter()
        event = trainings[plan].train_one()
        slowest = ranks.all_max(time.perf_counter() - started)
        losses[plan].append(event.result.loss)
        imbalances[plan].append(event.imbalance)
        sent[plan].append(event.result.bytes_sent)
        return slowest

    for _ in range(WARM_UP):
        for plan in PLANS:
            step(plan)
    seconds = until_narrow(step, PLANS, [("replay", plan) for plan in OTHERS], sizes.budget)
    return [
        {
            "plan": plan,
            "step_seconds": statistics.median(seconds[plan]),
            "step_seconds_min": min(seconds[plan]),
            "imbalance": statistics.mean(imbalances[plan][WARM_UP:]),
            "megabytes_sent": statistics.mean(sent[plan][WARM_UP:]) / 1e6,
            "loss_difference": max(abs(a - b) for a, b in zip(losses[plan], losses["history"], strict=True)),
            "gflops_per_rank": min(topology.flops) / 1e9,
            "gbit_per_s": 8e-9 * min(topology.uplink_bandwidth if node_of_rank[-1] else topology.port_bandwidth),
            "seconds_all": seconds[plan],
            "losses": losses[plan],
        }
        for plan in PLANS
    ]


def measure(node_of_rank: tuple[int, ...], sizes: Sizes) -> list[dict[str, Any]]:
    """Rows of one setting."""
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name), sizes)
        given = (name, node_of_rank, sizes)
        if node_of_rank[-1] == 0:
            return run_ranks(2, bench_rank, *given, timeout=1800)[0]
        with slow_link(RATE) as names:
            return run_ranks(2, bench_rank, *given, timeout=1800, namespaces=names)[0]


def summarize(rows: list[dict[str, Any]], budget: Budget) -> dict[str, float | Ratio]:
    """Step times of replay over those of the others, in turn and by a setting's fastest steps; the largest difference of losses."""
    found: dict[str, float | Ratio] = {}
    for setting in dict.fromkeys(row["setting"] for row in rows):
        of = {row["plan"]: row["seconds_all"] for row in rows if row["setting"] == setting}
        least = {row["plan"]: row["step_seconds_min"] for row in rows if row["setting"] == setting}
        for plan in OTHERS:
            found[f"{setting}: replay over {plan}"] = of_times(of["replay"], of[plan], budget)
            found[f"{setting}: replay over {plan}, by the least"] = least["replay"] / least[plan]
    return found | {"largest_loss_difference": max(row["loss_difference"] for row in rows)}


def main() -> None:
    options = resumable(__doc__ or "").parse_args()
    sizes = Sizes(steps=WARM_UP + 4, sequences=2) if options.quick else Sizes()
    rows = kept_rows(options)
    for setting, node_of_rank in SETTINGS.items():
        if node_of_rank[-1] and (missing := missing_for_slow_link()) is not None:
            print(f"{setting} is left out: {missing}")
            continue
        recorded(rows, {"setting": setting}, partial(measure, node_of_rank, sizes), options.json)
    finish("replay", rows, summarize(rows, sizes.budget), options.json)


if __name__ == "__main__":
    main()
