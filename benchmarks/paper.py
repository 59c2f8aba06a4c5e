"""Compare the measurements of the Hecate paper (arXiv 2502.02581, figures 9 to 15) with simulations of the same models and clusters.

The paper states neither its loads nor its tokens per GPU. All figures are simulated with one setting: popularities lognormal with s = 1
(the skew with which rival systems are compared elsewhere), 8192 tokens per GPU (4 sequences of 2048, or 16 of 512), and seed 0. These are
this project's defaults, but other settings were looked at before they were kept. A dozen layers of one model, drawn once, are too few:
depending on the seed, 6 to 12 of the 12 speed-ups fall into the published ranges. So 48 layers are drawn, and their mean is scaled to the
model. The `sensitivity` rows give the results of other loads and tokens.

`hecate_paper` is the paper's whole system: Algorithm 1 in every step and Algorithm 2 in every tenth. All of these policies use the same
collectives, and each divides tokens as its authors do; where the split of this project makes a difference, a row says so. The losses of the
rivals' own implementations are not in these figures. The published numbers contradict each other: 1.645 to 2.945 over
the best baseline is more than 1.26 to 1.78 over EP, which is a baseline, too; and 3.32 over sharding alone, which has 1.34 to 1.42 over
EP, makes 4.4 to 4.7 over EP. No single setting can reproduce both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.report import arguments, finish
from hecate.config.presets import find_preset
from hecate.forecast.cases import Case, Options
from hecate.forecast.sweep import load_sweep
from hecate.parallel.cost_model import ExecutionMode
from hecate.parallel.planners import COLLECTIVES, ROWS, WITH_OURS
from hecate.parallel.simulator import Simulated, fullest_owner_bytes, replica_slots, simulate
from hecate.parallel.workloads import WORKLOADS

WORKLOAD = "lognormal"
LAYERS = 48
"""the number of layers drawn for every model"""
INTERVAL = 10
"""the steps between two re-shards: the shortest interval in the paper, which costs most"""
BASELINES = ("static_ep", "fastermoe", "smartmoe", "flexmoe")
BASELINES_WITH_OURS = tuple(f"{name}+ours" if f"{name}+ours" in WITH_OURS else name for name in BASELINES)
"""the same, with this project's split of tokens and its collectives"""
OVER_EP = {"paper-cluster-a-16": (1.40, 1.58), "paper-cluster-a": (1.34, 1.78), "paper-cluster-b": (1.26, 1.70)}
OVER_BEST = {"paper-cluster-a-16": 1.645, "paper-cluster-a": 2.05, "paper-cluster-b": 2.945}
SENSITIVITY = (("lognormal", 4096), ("lognormal", 6144), ("lognormal", 16384), ("dirichlet_drift", 8192), ("zipf", 8192))


@dataclass(frozen=True, eq=False)
class Run:
    """One of the paper's models on one of its clusters, under given loads."""

    case: Case
    loads: np.ndarray
    """the loads, int64 [steps, layers, experts, source ranks]"""

    def policy(
        self, name: str, *, reshard_interval: int | None = None, rematerialize: bool = False, loads: np.ndarray | None = None
    ) -> Simulated:
        """
        Args:
            loads: in place of the run's own.
        """
        case, model = self.case, self.case.model
        cost, sizes = model.layer_cost(case.tokens_per_rank), {"num_layers": model.layers, "num_experts": model.experts}
        other_bytes = model.replicated_bytes()
        slots_D = replica_slots(case.topology, cost, **sizes, other_bytes=other_bytes, rematerialize=rematerialize)
        (found,) = simulate(
            self.loads if loads is None else loads,
            case.topology,
            cost,
            # The simulator re-shards for the policy of this name, whichever planner chooses its replicas.
            {"hecate_paper" if reshard_interval else name: ROWS[name]},
            slots_D=slots_D,
            execution=ExecutionMode(rematerialize=rematerialize),
            reshard_interval=reshard_interval,
            num_layers=model.layers,
            collectives=COLLECTIVES,
        )
        return found

    def grouped_ep(self) -> float:
        """Return the step seconds of static expert parallelism in groups, as people run it."""
        return replace(self.case, recorded=self.loads).baseline(Options()).step_seconds

    def hecate(self, *, rematerialize: bool = False, loads: np.ndarray | None = None) -> Simulated:
        """Simulate the paper's whole system."""
        return self.policy("hecate_paper", reshard_interval=INTERVAL, rematerialize=rematerialize, loads=loads)

    @property
    def held_bytes(self) -> float:
        """Return the bytes on the fullest rank, without replicas and activations."""
        model = self.case.model
        cost, sizes = model.layer_cost(self.case.tokens_per_rank), {"num_layers": model.layers, "num_experts": model.experts}
        return model.replicated_bytes() + fullest_owner_bytes(self.case.topology, cost, **sizes)


def paper_runs(workload: str, layers: int, tokens: int | None = None, steps: int = INTERVAL + 1) -> list[Run]:
    """Return the models and clusters of the sweep. By default the counted steps are those from one re-shard to the next.

    Args:
        layers: the number of layers to draw, whatever number the model has.
        tokens: the tokens of each rank; None: those of the sweep.
    """
    cases, options = load_sweep(find_preset("experiments", "sweep", "paper"))
    runs = []
    for case in (one for one in cases if one.workload == workload):
        case = replace(case, tokens_per_rank=tokens or case.tokens_per_rank)
        model = case.model
        sizes = (case.topology.world_size, model.experts, case.tokens_per_rank, model.top_k, options.seed)
        runs.append(Run(case, WORKLOADS[workload](steps, layers, *sizes)))
    return runs


def moe_seconds(simulated: Simulated) -> float:
    """Return the seconds of a step without its attention."""
    return simulated.step_seconds - simulated.seconds.attention


def geomean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def compare(layers: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return the rows and the summary of every comparison with a published number."""
    rows: list[dict[str, Any]] = []

    def row(what: str, cluster: str, model: str, paper: str, ours: float, inside: bool | None, reproducible: str) -> None:
        rows.append(
            {"what": what, "cluster": cluster, "model": model, "paper": paper, "ours": ours, "inside": inside, "reproducible": reproducible}
        )

    runs = paper_runs(WORKLOAD, layers)
    found = [
        {
            **{name: run.policy(name) for name in dict.fromkeys((*BASELINES, *BASELINES_WITH_OURS))},
            "both": run.hecate(),
            "sharding": run.policy("static_ep", reshard_interval=INTERVAL),
            "materialization": run.policy("hecate_paper"),
            "rematerialized": run.hecate(rematerialize=True),
        }
        for run in runs
    ]
    over = [{name: one[name].step_seconds / one["both"].step_seconds for name in one} for one in found]
    inside = []
    for run, ratio in zip(runs, over, strict=True):
        low, high = OVER_EP[run.case.topology_name]
        inside.append(low <= ratio["static_ep"] <= high)
        why = "yes, as loads and tokens are assumed"
        row("over EP", run.case.topology_name, run.case.model.name, f"{low}-{high}", ratio["static_ep"], inside[-1], why)
    summary = {"share_inside_published_ranges": float(np.mean(inside))}

    def of_cluster(cluster: str) -> list[int]:
        return [number for number, run in enumerate(runs) if run.case.topology_name == cluster]

    for cluster, published in OVER_BEST.items():
        ours, with_ours = (
            geomean([min(over[i][name] for name in names) for i in of_cluster(cluster)]) for names in (BASELINES, BASELINES_WITH_OURS)
        )
        summary[f"over_best_baseline_{cluster.removeprefix('paper-cluster-')}"] = ours
        summary[f"over_best_baseline_with_ours_{cluster.removeprefix('paper-cluster-')}"] = with_ours
        why = "no: above the paper's own speed-up over EP, which is one of the baselines; rivals run on our collectives here"
        row("over the best baseline", cluster, "geo-mean", str(published), ours, None, why)
        if round(with_ours, 3) != round(ours, 3):
            row("over the best baseline, with our split", cluster, "geo-mean", str(published), with_ours, None, why)

    for cluster in OVER_EP:
        ours = geomean([runs[i].grouped_ep() / found[i]["both"].step_seconds for i in of_cluster(cluster)])
        summary[f"over_grouped_ep_{cluster.removeprefix('paper-cluster-')}"] = ours
        row(
            "over EP in groups",
            cluster,
            "geo-mean",
            "-",
            ours,
            None,
            "not published: the paper's EP is over all ranks",
        )

    def number_of(cluster: str, model: str) -> int:
        return next(i for i in of_cluster(cluster) if runs[i].case.model.name == model)

    number = number_of("paper-cluster-b", "gpt-moe-s")
    per_layer = [
        moe_seconds(runs[number].policy("static_ep", loads=one)) / moe_seconds(runs[number].hecate(loads=one))
        for one in np.split(runs[number].loads, runs[number].loads.shape[1], axis=1)
    ]
    why = "no: the busiest rank's share bounds it, and this skew has less; 11.87 a layer does not go with 1.26-1.70 a step"
    for what, published, ours in (
        ("least", "2.8", min(per_layer)),
        ("geo-mean", "11.87", geomean(per_layer)),
        ("most", "18.8", max(per_layer)),
    ):
        row(f"over EP in a MoE layer, {what}", "paper-cluster-b", "gpt-moe-s", published, ours, None, why)
    summary["layer_over_ep_geomean"], summary["layer_over_ep_most"] = geomean(per_layer), max(per_layer)

    one = found[number_of("paper-cluster-b", "bert-moe-deep")]
    ours = summary["all_to_all_over_hecate"] = one["static_ep"].seconds.dispatch / one["both"].seconds.dispatch
    why = "no: measured all-to-alls contain the wait for the busiest rank; ours are transfers only"
    row("all-to-all time, EP / hecate", "paper-cluster-b", "bert-moe-deep", "12.3", ours, None, why)

    slowdowns = [_slowdown_by_imbalance(run) for run in runs]
    ours = summary["imbalance_slows_ep_up_to"] = max(slowdowns)
    row("EP under these loads / balanced, worst layer", "all", "all", "5.18", ours, None, "partly: the paper's worst layer is more uneven")
    summary["loads_max_over_mean"] = float(np.mean([one["static_ep"].imbalance for one in found]))
    row("max / mean load of ranks under EP", "all", "mean", "-", summary["loads_max_over_mean"], None, "not published")

    gains = [one["static_ep"].step_seconds / one["sharding"].step_seconds for one in found]
    summary["sharding_alone_least"], summary["sharding_alone_most"] = min(gains), max(gains)
    for cluster in OVER_EP:
        ours = geomean([gains[i] for i in of_cluster(cluster)])
        row("sharding alone over EP", cluster, "geo-mean", "1.34-1.42", ours, bool(1.34 <= ours <= 1.42), "partly: loads not published")
    summary["sharding_interval_100_over_10"] = ours = _interval_ratio()
    row("sharding alone, every 100 / every 10 steps", "paper-cluster-b", "gpt-moe-s", "about 1", ours, None, "yes; drifting loads")

    for part, published, why in (
        ("sharding", 3.32, "no: with 1.34-1.42 for sharding alone it would be 4.4-4.7 over EP, outside the paper's own ranges"),
        ("materialization", 1.27, "yes"),
    ):
        ours = summary[f"both_over_{part}_only"] = geomean([ratio[part] for ratio in over])
        row(f"both over {part} only", "all", "geo-mean", str(published), ours, None, why)

    saved = [1 - one["rematerialized"].replica_bytes / one["both"].replica_bytes for one in found]
    slower = [one["rematerialized"].step_seconds / one["both"].step_seconds - 1 for one in found]
    summary["rematerialization_replica_bytes_saved"] = ours = float(np.mean(saved))
    row("re-materialization: replicas' bytes saved", "all", "mean", "0.902", ours, None, "yes; the paper counts owned experts, too")
    summary["rematerialization_slower_worst"] = ours = max(slower)
    why = "no: a second gather fits behind attention's backward pass unless overlapping slows it down"
    row("re-materialization: slower by, worst", "all", "all", "0.075-0.169", ours, bool(0.075 <= ours <= 0.169), why)
    for name, published in (("both", "0.64"), ("rematerialized", "0.116")):
        ours = float(np.mean([one[name].replica_bytes / run.held_bytes for run, one in zip(runs, found, strict=True)]))
        row(f"memory over EP, {name}", "all", "mean", published, ours, None, "no: activations are not simulated")
    return rows, summary


def _slowdown_by_imbalance(run: Run) -> float:
    """Return the seconds of a layer under the run's loads over those under balanced loads, for expert parallelism's slowest layer."""
    model, steps = run.case.model, 2
    sizes = (run.case.topology.world_size, model.experts, run.case.tokens_per_rank, model.top_k, 0)
    even = moe_seconds(run.policy("static_ep", loads=WORKLOADS["balanced"](steps, 1, *sizes)))
    layers = np.split(run.loads[:steps], run.loads.shape[1], axis=1)
    return max(moe_seconds(run.policy("static_ep", loads=layer)) for layer in layers) / even


def _interval_ratio() -> float:
    """Return the step time of sharding alone with an interval of 100 steps over that with 10, under drifting loads.

    Under other loads the interval has no effect.
    """
    runs = paper_runs("dirichlet_drift", 2, steps=101)
    run = next(r for r in runs if (r.case.topology_name, r.case.model.name) == ("paper-cluster-b", "gpt-moe-s"))
    often, rarely = (run.policy("static_ep", reshard_interval=interval).step_seconds for interval in (10, 100))
    return rarely / often


def sensitivity(workload: str, tokens: int) -> tuple[list[dict[str, Any]], float]:
    """Compare `hecate` with EP under other loads.

    Returns a row for each cluster, and the share of models and clusters inside the published ranges.
    """
    runs = paper_runs(workload, LAYERS, tokens)
    rows, hits = [], []
    for cluster, (low, high) in OVER_EP.items():
        of_cluster = [run for run in runs if run.case.topology_name == cluster]
        ratios = [run.policy("static_ep").step_seconds / run.hecate().step_seconds for run in of_cluster]
        hits += [low <= ratio <= high for ratio in ratios]
        rows.append(
            {
                "what": f"sensitivity: over EP, {workload}, {tokens} tokens",
                "cluster": cluster,
                "model": f"{min(ratios):.2f}-{max(ratios):.2f}",
                "paper": f"{low}-{high}",
                "ours": geomean(ratios),
                "inside": sum(hits[-len(ratios) :]) / len(ratios),
                "reproducible": "",
            }
        )
    return rows, float(np.mean(hits))


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    rows, summary = compare(LAYERS // 4 if options.quick else LAYERS)
    for workload, tokens in [] if options.quick else SENSITIVITY:
        more, share = sensitivity(workload, tokens)
        rows += more
        summary[f"share_inside_{workload}_{tokens}"] = share
    finish("paper", rows, summary, options.json)


if __name__ == "__main__":
    main()
