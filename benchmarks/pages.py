"""What pages of the documentation say of recordings, made of the recordings.

    python -m benchmarks.pages [PAGE]

prints it, a piece a paragraph. `tests/benchmarks/test_pages.py` holds each page to it: every piece is on the page, the recording is named
with its commit, and no figure of the page's section is in none of the pieces. So a new recording shows which sentences are to be written
anew.

A piece is a table, or as much of a sentence as has figures. Give a page that quotes a recording a function in `SAID`, which gets what the
recording's file holds. Where all figures under a heading are from recordings, say so in `SECTIONS`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.federated_cases import ARMS
from benchmarks.federated_cases import Round as FederatedRound
from benchmarks.federated_cases import Run as FederatedRun
from benchmarks.method_cases import EXACT, GOALS, LONG, LOSS, SEEDS, SHORT, Run, Runs
from benchmarks.methods import by_method
from benchmarks.ratios import VERDICTS, reached
from benchmarks.whole_run import ROOT

Pieces = Sequence[str]

_SHORT_ROWS = {
    "lora_r1_ffn": "LoRA r 1, FFNs only",
    "lora_r1_ffn_faster": "LoRA r 1, FFNs only, at 1e-2",
    "lora_r2": "LoRA r 2",
    "lora_r8": "LoRA r 8",
    "lora_r8_slower": "LoRA r 8 at 1e-3",
    "lora_r8_faster": "LoRA r 8 at 4e-3",
    "lora_r16": "LoRA r 16",
    "lora_r16_ffn": "LoRA r 16, FFNs only",
    "lora_r64": "LoRA r 64",
    "mixlora": "MixLoRA, 2 of 8 experts of r 8",
    "smora": "SMoRA, 8 of 64 ranks",
    "mola_8228": "MoLA, 8, 2, 2 and 8 experts",
    "llava_mole": "LLaVA-MoLE, 1 of 3 experts",
    "allora": "ALLoRA r 8",
    "mos": "MoS, at r 2's parameters",
    "nola": "NOLA r 16, FFNs only, at 1e-2",
    "ffa_lora": "FFA-LoRA r 8 at 4e-3",
}
_LONG_ROWS = {
    "lora_r8": "LoRA r 8",
    "lora_r64": "LoRA r 64",
    "mixlora": "MixLoRA, 2 of 8 experts of r 8",
    "smora": "SMoRA, 8 of 64 ranks",
    "llava_mole": "LLaVA-MoLE, 1 of 3 experts",
    "mola_2468": "MoLA, 2, 4, 6 and 8 experts",
    "mola_8642": "MoLA, 8, 6, 4 and 2",
    "mola_2882": "MoLA, 2, 8, 8 and 2",
    "mola_8228": "MoLA, 8, 2, 2 and 8",
    "mola_5555": "MoLA, 5 in each layer",
}


def methods(recording: Mapping[str, Any]) -> Pieces:
    found = by_method([Run(**row) for row in recording["runs"]])
    return [_short_table(found), _long_table(found), _goals(found)]


def _short_table(found: Runs) -> str:
    lines = ["| system | held-out loss | exact answers | million parameters | MB sent in a step | tokens a processor second |", _rule(6)]
    for name, label in _SHORT_ROWS.items():
        if runs := found.get((name, SHORT)):
            numbers = [run.parameters / 1e6 for run in runs.values()], [run.bytes_per_step / 1e6 for run in runs.values()]
            speed = fmean(run.tokens_per_processor_second for run in runs.values())
            figures = f"{fmean(numbers[0]):.2f} | {fmean(numbers[1]):.1f} | {speed:.0f}"
            lines.append(f"| {label} | {LOSS.mean(runs)} | {EXACT.both(runs)} | {figures} |")
    return "\n".join(lines)


def _long_table(found: Runs) -> str:
    lines = ["| system | loss at 2e-3 | exact answers at 2e-3 | loss at 1e-3 | exact answers at 1e-3 |", _rule(5)]
    for name, label in _LONG_ROWS.items():
        cells = [_of_rate(found.get((one, LONG), {})) for one in (name, f"{name}_slower")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _of_rate(runs: Mapping[int, Run]) -> str:
    if not runs:
        return " | "
    seeds = "" if len(runs) == len(SEEDS) else f" ({len(runs)} of {len(SEEDS)} seeds)"
    return f"{LOSS.mean(runs)}{seeds} | {EXACT.both(runs)}{seeds}"


def _goals(found: Runs) -> str:
    rows = [f"| {goal.system} | {goal.text} | {goal.steps} | {goal.verdict(found)} |" for goal in GOALS]
    return "\n".join(["| system | goal | steps | verdict |", _rule(4), *rows])


def many_adapters(recording: Mapping[str, Any]) -> Pieces:
    found = recording["summary"]
    batch = "recipe's batch"
    time, memory = found["to the end, seconds"], found["peak megabytes, side by side"]
    return [
        f"{_between(found, batch)} of the tokens a second at the recipe's 4,096 tokens a step (goal 0.97: "
        f"**{_reached(found, batch, at_least=0.97)}**), {_between(found, '512 tokens')} at 512 tokens, "
        f"{_between(found, 'small batches')} with one short sequence of each in a step, and from start to export, once, {time:.2f} of "
        f"the time and {memory:.2f} of the memory of eight runs"
    ]


def method_speed(recording: Mapping[str, Any]) -> Pieces:
    found = recording["summary"]
    names = ("allora", "mos", "ffa_lora", "nola", "mola_5555", "llava_mole", "smora", "mixlora")
    of = {name: _between(found, f"{name} / lora_r8") for name in names}
    return [
        f"A step of ALLoRA takes {of['allora']} of LoRA's (goal 1.05: {_reached(found, 'allora / lora_r8', at_most=1.05)}), one of MoS "
        f"{of['mos']}, of FFA-LoRA {of['ffa_lora']}, of NOLA {of['nola']}, of MoLA with 5 experts a linear {of['mola_5555']}, "
        f"of LLaVA-MoLE {of['llava_mole']}, of SMoRA {of['smora']}, and of MixLoRA {of['mixlora']}"
    ]


def _between(summary: Mapping[str, float], key: str) -> str:
    """A ratio with its interval."""
    return f"{summary[key]:.2f} ({summary[f'{key}_low']:.2f} to {summary[f'{key}_high']:.2f})"


def _reached(summary: Mapping[str, float], key: str, *, at_least: float = -math.inf, at_most: float = math.inf) -> str:
    """What a ratio's interval says of a goal."""
    return reached(summary[f"{key}_low"], summary[f"{key}_high"], at_least=at_least, at_most=at_most)


def beside_compiler(recording: Mapping[str, Any]) -> Pieces:
    found = recording["summary"]
    return [
        f"A step beside that compiler takes {_between(found, 'slowdown')} of one without it",
        f"whether it is within the goal of 3 % is {_reached(found, 'slowdown', at_most=1.03)}",
    ]


def replay(recording: Mapping[str, Any]) -> Pieces:
    found = recording["summary"]
    settings, plans = ("loopback", "4 Gbit/s"), ("history", "exact")
    of = {(where, plan): _between(found, f"{where}: replay over {plan}") for where in settings for plan in plans}
    largest = found["largest_loss_difference"]
    return [
        f"Over the loopback interface a step takes {of['loopback', 'history']} of one planned from history and "
        f"{of['loopback', 'exact']} of one planned under `exact`; over a link of 4 Gbit/s {of['4 Gbit/s', 'history']} and "
        f"{of['4 Gbit/s', 'exact']}",
        f"Losses differ by {largest:.0e} at most".replace("e-0", "e-"),
    ]


_MODEL_ROWS = {
    "wide": "2 layers, hidden size 512, sequences of 256 tokens",
    "small": "4 layers, hidden size 256, sequences of 128 tokens",
}


def deterministic(recording: Mapping[str, Any]) -> Pieces:
    of = {(row["model"], row["ranks"], row["group"]): row for row in recording["rows"]}
    groups = sorted({group for _, _, group in of})
    lines = [f"| model | ranks | {' | '.join(f'groups of {group}' for group in groups)}, the whole micro-batch |", _rule(5)]
    for model, label in _MODEL_ROWS.items():
        for ranks in sorted({ranks for _, ranks, _ in of}):
            cells = [_cost_of_order(of[model, ranks, group]) for group in groups]
            lines.append(f"| {label if ranks == 1 else ''} | {ranks} | {' | '.join(cells)} |".replace("|  |", "| |"))
    return ["\n".join(lines)]


def _cost_of_order(row: Mapping[str, Any]) -> str:
    return f"{_between(row, 'processor_slowdown')}, {_reached(row, 'processor_slowdown', at_most=1.05)}"


_COST_ROWS = {
    "digests of a save": "the digests' share of a save",
    "save_async, of a step": "what a save beside the steps (`save_async`) adds, over one step",
    "redundancy: 1, of a step": "what `fssdp.redundancy: 1` adds to a step",
    "redundancy: 1, more copies": "how many more copies of the experts that are trained, with their moments",
    "whole": "what `deterministic: true` adds to a step, with the whole micro-batch of a rank as one group",
    "ones": "the same with groups of one",
    "a killed rank is noticed in ms": "from a kill until all of three other ranks have noticed it, ms",
    "the others go on in ms": "until they go on, ms",
}


def faults(recording: Mapping[str, Any]) -> Pieces:
    lines = ["| what | goal | median | interval | by processor time | verdict |", _rule(6)]
    for row in recording["rows"]:
        name = row["cost"]
        if name.startswith("deterministic"):
            name = "ones" if "groups of 1)" in name else "whole"
        shares = row["narrow"] != ""
        median, low, high = (f"{100 * row[key]:.1f} %" if shares else f"{row[key]:.3g}" for key in ("median", "low", "high"))
        goal = f"at most {100 * float(row['goal'].split()[-1]):.0f} %" if shares else row["goal"]
        interval = f"{low} to {high}" if shares else f"{high} at worst" if name.endswith("ms") else "counted"
        processor = "" if row["by_processor"] == "" else f"{100 * row['by_processor']:.1f} %"
        lines.append(f"| {_COST_ROWS[name]} | {goal} | {median} | {interval} | {processor} | {row['verdict']} |".replace("|  |", "| |"))
    return ["\n".join(lines), f"a step takes {recording['summary']['step_s']:.2f} s"]


def effective_time(recording: Mapping[str, Any]) -> Pieces:
    of = {(row["way"], row["ranks"], row["arrival_s"], row["growth"]): row["work"] for row in recording["rows"]}
    ends = of["copies", 8, 0.0, "log"], of["copies", 1024, 0.0, "log"]
    in_proportion, restart = of["copies", 1024, 0.0, "linear"], of["restart", 1024, 0.0, "-"]
    less = "less" if in_proportion < restart else "more"
    return [
        f"With second copies and a replacement that stands by, {ends[0]:.3f} of the time of 8 ranks is training and {ends[1]:.3f} of "
        f"that of 1,024, if the time to go on grows with the logarithm of their number. Going back to checkpoints leaves "
        f"{of['checkpoint', 8, 0.0, 'log']:.3f} of that of 8",
        f"If it grows in proportion, {in_proportion:.3f} of the time of 1,024 ranks is left, {less} than the {restart:.3f} of starting all "
        "processes again",
        f"The goal of 0.99 is **{_met(min(ends) >= 0.99)}**",
        f"If a replacement comes after a minute, the ranks that are left train on meanwhile: {of['copies', 8, 60.0, 'log']:.3f}",
    ]


def reclora(recording: Mapping[str, Any]) -> Pieces:
    auc = {(row["system"], row["seed"]): row["auc"] for row in recording["rows"]}
    seeds = sorted({seed for _, seed in auc})
    products, factors, lora = (_listed([auc[system, seed] for seed in seeds]) for system in ("reclora", "reclora_factors", "lora"))
    found = recording["summary"]
    met = found["reclora_smallest_gain"] > 0 and found["reclora_gain"] >= 0.005
    of_factors = found["reclora_factors_smallest_gain"] > 0 and found["reclora_factors_gain"] >= 0.005
    ahead = auc["lora", 2] - auc["reclora_factors", 2]
    return [
        f"The goal is a larger AUC with each of three seeds, and by 0.005 on average: **{_met(met)}** by the recipe, which sums products "
        f"at temperature 1. It has {products}, and LoRA {lora}",
        f"it has {factors}: **{_met(of_factors)}**, since with the second seed LoRA lies {ahead:.3f} above",
        f"The recommender alone, which is trained on 80,000 ratings, has {found['recommender_auc']:.3f}",
    ]


_ARM_ROWS = {
    "fedavg": "FedAvg",
    "fedavg mixed": "FedAvg, ranks 16 8 8 4 4",
    "flora": "FLoRA, ranks 16 8 8 4 4",
    "lora_fair": "LoRA-FAIR's ridge stand-in",
    "lora_fair cosine": "LoRA-FAIR, the paper's cosine",
    "ffa": "FFA-LoRA",
    "cellm 1": "CELLM, density 1",
    "cellm 1/2": "CELLM, ½",
    "cellm 1/4": "CELLM, ¼",
    "cellm 0.1": "CELLM, 0.1",
}


def federated(recording: Mapping[str, Any]) -> Pieces:
    runs: dict[str, dict[int, FederatedRun]] = {}
    for row in recording["runs"]:
        run = FederatedRun(**{**row, "rounds": tuple(FederatedRound(**one) for one in row["rounds"])})
        runs.setdefault(run.arm, {})[run.seed] = run
    lines = ["| | held-out loss, seed by seed | mean | error of the aggregate | MB up | MB down |", _rule(6)]
    for arm in ARMS:
        if of := runs.get(arm.name):
            error = fmean(run.rounds[-1].aggregation_error for run in of.values())
            up, down = (
                fmean(sum(getattr(one, way) for one in run.rounds) for run in of.values()) / 1e6 for way in ("bytes_up", "bytes_down")
            )
            losses = [of[seed].loss for seed in sorted(of)]
            shown = f"{100 * error:.0f} %" if error > 1e-6 else "0"
            by_seed = " ".join(f"{loss:.3f}" for loss in losses)
            lines.append(f"| {_ARM_ROWS[arm.name]} | {by_seed} | {fmean(losses):.3f} | {shown} | {up:.0f} | {down:.0f} |")
    return ["\n".join(lines), *_lora_fair(runs), *_cellm(runs)]


def _lora_fair(runs: Mapping[str, Mapping[int, FederatedRun]]) -> Pieces:
    left = [one.aggregation_error / one.average_error for run in runs["lora_fair"].values() for one in run.rounds]
    below = sum(run.loss < runs["fedavg"][seed].loss for seed, run in runs["lora_fair"].items())
    cosine = runs["lora_fair cosine"]
    below_of_cosine = sum(run.loss < runs["fedavg"][seed].loss for seed, run in cosine.items())
    error = fmean(one.aggregation_error / one.average_error for run in cosine.values() for one in run.rounds)
    return [
        f"leaves {min(left):.2f} to {max(left):.2f} of averaging's error (goal: 0.8), and its loss is below FedAvg's with {below} of "
        f"{len(runs['lora_fair'])} seeds",
        f"leaves {error:.2f} of averaging's error, and its loss is below FedAvg's with {below_of_cosine} of {len(cosine)} seeds",
    ]


def _cellm(runs: Mapping[str, Mapping[int, FederatedRun]]) -> Pieces:
    def mean_of(arm: str, round_: int) -> float:
        return fmean(run.rounds[round_].loss for run in runs[arm].values())

    sent, dense = (fmean(run.traffic for run in runs[arm].values()) for arm in ("cellm 0.1", "cellm 1"))
    curves = [" ".join(f"{mean_of(arm, number):.2f}" for number in range(5)) for arm in ("cellm 1", "cellm 1/4", "cellm 0.1")]
    loss = mean_of("cellm 0.1", -1) / mean_of("cellm 1", -1)
    both = runs["cellm 1/4"].keys() & runs["cellm 0.1"].keys()
    better = sum(runs["cellm 1/4"][seed].loss < runs["cellm 0.1"][seed].loss for seed in both)
    return [
        f"at density 0.1 sends {sent / dense:.2f} of the bytes, but after five rounds its loss is {loss:.2f} of the dense one's "
        "(goal: 1.02)",
        f"at ¼ the loss is below that at 0.1 with {better} of {len(both)} seeds",
        f"{curves[0]} at density 1, {curves[1]} at ¼, {curves[2]} at 0.1",
    ]


_MERGED_ROWS = {
    "base": "base model",
    "chain_sum": "the adapter of chain_sum alone",
    "spell_backward": "that of spell_backward",
    "word_sequence_reversal": "that of word_sequence_reversal",
    "lego": "`lego`, rank 16",
    "stack x 3": "`stack`, times 3: the exact sum",
    "stack 16 x 3": "`stack --rank 16`, times 3",
    "linear": "`linear`",
    "linear x 3": "`linear`, times 3",
    "ties": "`ties`",
    "ties x 3": "`ties`, times 3",
    "average": "`average --inexact`",
    "stack": "`stack`",
}


def merging(recording: Mapping[str, Any]) -> Pieces:
    found, tasks = {one["name"]: one for one in recording["adapters"]}, recording["training"]["tasks"]
    lines = [f"| answers of | {' | '.join(tasks)} | mean | error |", _rule(6)]
    for name, label in _MERGED_ROWS.items():
        one = found[name]
        shares = [one["exact"][task] for task in tasks]
        error = "" if not one["seconds"] else f" {one['error']:.2f}" if one["error"] > 1e-6 else " 0"
        lines.append(f"| {label} | {' | '.join(f'{share:.2f}' for share in (*shares, fmean(shares)))} |{error} |")
    single, kept = fmean(found[task]["exact"][task] for task in tasks), fmean(found["lego"]["exact"].values())
    return ["\n".join(lines), f"keeps {100 * kept / single:.0f} % of the {single:.2f} that the adapters have on their own tasks"]


def _compared(keys: Sequence[str]) -> Callable[[Mapping[str, Any]], Pieces]:
    """Of a recording, its ratios of these names, each with its interval and what may be said of it."""

    def said(recording: Mapping[str, Any]) -> Pieces:
        found = recording["summary"]
        return [f"{_between(found, key)}, {VERDICTS[found[f'{key}_verdict']]}" for key in keys]

    return said


def train_step(recording: Mapping[str, Any]) -> Pieces:
    memory = f"{recording['summary']['peak_memory_over_moe_peft']:.2f} (less is better)"
    return [*_compared(["tokens_per_s_over_moe_peft"])(recording), memory]


def paper(recording: Mapping[str, Any]) -> Pieces:
    found = recording["summary"]
    inside = [round(12 * found[f"share_inside_{which}"]) for which in ("published_ranges", "least_of_draws", "most_of_draws")]
    return [
        f"{inside[0]} of the 12 speed-ups",
        f"of ten draws of a dozen layers each, {inside[1]} to {inside[2]} of the 12 are",
        _over_best(found),
    ]


def paper_under_other_loads(recording: Mapping[str, Any]) -> Pieces:
    loads = ("lognormal_4096", "lognormal_16384", "dirichlet_drift_8192")
    few, many, drifting = (round(12 * recording["summary"][f"share_inside_{load}"]) or "none" for load in loads)
    said = f"with 4,096 tokens a GPU {few} of the 12 are inside, with 16,384 {many}, and with popularities that drift {drifting}"
    return [*paper(recording), said]


def _over_best(found: Mapping[str, float]) -> str:
    clusters = ("a-16", "a", "b")
    of_all = [f"{found[f'over_best_baseline_{cluster}']:.2f}x" for cluster in clusters]
    least = min(found[f"over_best_least_of_draws_{cluster}"] for cluster in clusters)
    most = max(found[f"over_best_most_of_draws_{cluster}"] for cluster in clusters)
    return f"{of_all[0]}, {of_all[1]} and {of_all[2]} on its three clusters, and {least:.2f}x to {most:.2f}x over ten draws of loads"


def plan_quality(recording: Mapping[str, Any]) -> Pieces:
    found = recording["summary"]
    whole, one, four = (found[f"auto_over_best_policy{slots}_geomean"] for slots in ("", "_slots_1", "_slots_4"))
    worst = 100 * (found["auto_over_best_policy_worst"] - 1)
    waits = [f"{100 * found[f'exact_planning_share_{which}']:.0f} %" for which in ("mean", "most")]
    return [
        f"`auto` takes {whole:.2f} of the seconds of the best other policy (geometric mean; {one:.2f} with one slot, {four:.2f} with four)",
        f"another policy is more than half a percent faster, {worst:.1f} % at worst",
        f"of the seconds of `exact`, {waits[0]} are waiting for the plan on average, and {waits[1]} at most",
    ]


def plan_ablation(recording: Mapping[str, Any]) -> Pieces:
    rows = ["| without | seconds over all layers | most in | there |", _rule(4)]
    rows += [f"| {row['without']} | {row['over_all']:.4f} | {row['most_in']} | {row['over_most']:.3f} |" for row in recording["rows"]]
    return ["\n".join(rows)]


def drawn_plans(recording: Mapping[str, Any]) -> Pieces:
    found = recording["summary"]
    over, worst = ([f"{found[f'{mode}_{which}']:.2f}" for mode in ("history", "exact")] for which in ("geomean", "worst"))
    lost = [f"{100 * found[f'{mode}_lost']:.1f} %" for mode in ("history", "exact")]
    return [
        f"{found['layers']:,} layers: {over[0]} of the seconds of the best other policy from history and {over[1]} after the router",
        f"more than half a percent slower in {lost[0]} and {lost[1]} of them, {worst[0]} and {worst[1]} times at worst",
    ]


def drift(recording: Mapping[str, Any]) -> Pieces:
    found = recording["summary"]
    rows = [
        "| `fssdp.plan` | over the best other policy | at worst | more than 2 % slower in | steady loads: over the fastest way |",
        _rule(5),
    ]
    for way in ("history", "calibrated", "exact", "auto"):
        mean, worst, share = (found[f"{way}_over_best_other_{which}"] for which in ("geomean", "worst", "more_than_2_percent"))
        steady = found[f"{way}_steady_over_fastest_way_worst"]
        rows.append(f"| `{way}` | {mean:.3f} | {worst:.2f} | {100 * share:.0f} % | {steady:.3f} at worst |")
    return ["\n".join(rows)]


def memory_plan(recording: Mapping[str, Any]) -> Pieces:
    cases = len(recording["rows"])
    worst = max((row["error"] for row in recording["rows"]), key=abs)
    within = sum(abs(row["error"]) <= recording["summary"]["goal"] for row in recording["rows"])
    side = "low" if worst < 0 else "high"
    counted = f"all {cases}" if within == cases else f"{within} of {cases}"
    return [f"goal: within 5 %, **{_met(within == cases)}** in {counted} cases, of which the worst is {100 * abs(worst):.1f} % too {side}"]


def fidelity(recording: Mapping[str, Any]) -> Pieces:
    found = recording["summary"]
    mean, worst, two = (100 * found[f"step_time_error_{which}"] for which in ("geomean", "worst", "geomean_2_ranks"))
    return [
        f"the predicted step times are {mean:.1f} % off (geometric mean of {len(recording['rows'])} runs",
        f"{worst:.0f} % at worst; goals: 6 % and 12 %, **{_met(mean <= 6 and worst <= 12)}**",
        f"Two ranks, with a core each, are {two:.1f} % off",
    ]


def _met(found: bool) -> str:
    return "met" if found else "missed"


def _listed(figures: Sequence[float]) -> str:
    shown = [f"{figure:.3f}" for figure in figures]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns


SAID: Mapping[str, Mapping[str, Callable[[Mapping[str, Any]], Pieces]]] = {
    "docs/results/systems.md": {"methods": methods, "many_adapters": many_adapters, "method_speed": method_speed, "reclora": reclora},
    "docs/use/federated.md": {"federated": federated},
    "docs/use/adapters.md": {"merging": merging},
    "docs/design/planners.md": {
        "plan_quality": plan_quality,
        "drawn_plans": drawn_plans,
        "plan_ablation": plan_ablation,
        "drawn_plans_last_look": drawn_plans,
        "paper": paper_under_other_loads,
    },
    "README.md": {
        "paper": paper,
        "beside_trl": _compared(["tokens_per_processor_s_over_trl", "processor_seconds_to_the_first_step_over_trl"]),
        "train_step": train_step,
        "moe_layer_beside_megatron": _compared(["zipf_speedup_over_megatron_ep", "balanced_speedup_over_megatron_ep"]),
        "moe_layer_beside_fsdp2": _compared(["zipf_speedup_over_fsdp2"]),
        "slow_link": _compared([f"slow_link_speedup_over_{rival}" for rival in ("static_ep", "ep_per_choice", "full")]),
    },
    "docs/use/deterministic.md": {"deterministic": deterministic},
    "docs/use/drills.md": {"faults": faults, "effective_time": effective_time},
    "docs/design/placement.md": {"drift": drift, "replay": replay, "beside_compiler": beside_compiler},
    "docs/use/simulator.md": {"memory_plan": memory_plan, "fidelity": fidelity},
}
"""page -> recording -> its pieces on that page"""
SECTIONS: Mapping[str, str] = {
    "README.md": "Measured against others",
    "docs/results/systems.md": "What they reach",
    "docs/use/federated.md": "How they compare",
}
"""page -> the heading under which all figures are from recordings"""


def recording_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def named(name: str, recording: Mapping[str, Any]) -> str:
    """How a page names a recording: with the commit of the program, or the first and the last of those of its runs."""
    commits = [recording["commit"]] if "commit" in recording else [run["commit"] for run in recording["runs"]]
    which = f"commit {commits[0]}" if len(set(commits)) == 1 else f"commits {commits[0]} to {commits[-1]}"
    return f"`benchmarks/results/{name}.json`, {which}"


def pieces(page: str) -> Pieces:
    """All that a page must say."""
    found = []
    for name, said in SAID[page].items():
        recording = recording_of(name)
        found += [named(name, recording), *said(recording)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", default=list(SAID), metavar="PAGE")
    for page in parser.parse_args().pages:
        print("\n\n".join([f"# {page}", *pieces(page)]), end="\n\n")


if __name__ == "__main__":
    main()
