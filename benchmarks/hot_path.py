"""Count what a training step gives a GPU to do, and time the host that gives it: per layer, micro-step and step, on a mock GPU.

    python -m benchmarks.hot_path [OTHER_CHECKOUT] [--quick] [--json FILE]

A tiny Llama in bfloat16 trains MixLoRA experts, attention adapters and dropout with Triton kernels on one rank of the mock device of
`tests/mock_cuda`. Counted are torch operators that the device was given, launches of Triton kernels, and what makes the host wait. Runs of
1 and 3 layers and of 1 and 2 micro-steps tell apart what is due in each layer of each micro-step, in each layer once a step, in each
micro-step, and in each step. The counts do not depend on sizes. Launches are counted and not run, since nothing that is counted depends
on values. Attention is a launch in each pass, as flash attention is on a GPU; a checkout without `model.attention` computes it in
torch's plain form, a dozen operators.

The processor time of the host is measured in runs of their own. It has Python, torch's dispatch and what the mock device adds to each
operator; it lacks what CUDA and Triton take to launch. A sample is a step, and a layer's time is
the difference of the least of runs of 6 and 2 layers, divided by 4. With OTHER_CHECKOUT, processes of both checkouts take turns until the
ratio of their times is known well enough (`benchmarks.ratios`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ratios import Budget, Ratio, of_times, until_narrow
from benchmarks.report import arguments, finish
from testing.tiny_run import save_random_llama, write_samples

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = Path("tests", "mock_cuda", "hot_path_rank.py")
"""in a checkout: each one has the probes for its own code"""
COUNTED = (1, 3)
"""the layers of the runs that count"""
TIMED = (2, 6)
"""the layers of the runs that are timed"""
ENOUGH, ALONE, QUICK = Budget(half_width=0.03, rounds=40), Budget(half_width=0.03, rounds=4), Budget(half_width=0.03, rounds=2)
"""with another checkout; without; and for `--quick`"""
PARTS = ("forward", "backward", "rest")
KINDS = {"operators": "operator", "launches": "launch", "waits": "wait"}
"""column -> the first word of its calls"""
Calls = dict[str, float]
"""what was called, as in "operator aten::mm" -> how often"""


def make_folder(folder: Path, layers: Iterable[int]) -> None:
    """Fill the empty `folder` with a random Llama of each number of layers, data, and a configuration for all."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    for number in layers:
        save_random_llama(folder / f"model{number}", num_hidden_layers=number, **sizes)
    write_samples(folder / "train.jsonl", [f"w{number}" for number in range(10, 74)], str.upper)
    (folder / "config.yaml").write_text(
        f"model: {{name_or_path: {folder}/model1, dtype: bfloat16}}\ndata: {{train: {folder}/train.jsonl, seq_len: 52}}\n"
        f"output_dir: {folder}/unset\nmicro_batch_size: 1\nlora: {{r: 4, alpha: 8.0, dropout: 0.1}}\n"
        "moe: {num_experts: 4, top_k: 2}\neval: {on_start: false, generate: false}\nkernels: triton\n",
        encoding="utf-8",
    )


def run(checkout: Path, folder: Path, overrides: Mapping[str, Sequence[str]], *, count: bool) -> dict[str, list[dict[str, Any]]]:
    """Train the runs in a process of their own and return their steps by name; see `tests/mock_cuda/hot_path_rank.py`."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        runs = Path(own, "runs.json")
        given = {"config": str(folder / "config.yaml"), "folder": own, "overrides": overrides, "count": count}
        runs.write_text(json.dumps(given), encoding="utf-8")
        environment = os.environ | {
            "PYTHONPATH": str(checkout),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "TRITON_INTERPRET": "1",
        }
        # -P: the folder of the program is not searched for modules.
        command = [sys.executable, "-P", str(checkout / PROGRAM), str(runs)]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"hot_path: a run of {checkout} failed ({done.returncode}):\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def counts(checkout: Path, folder: Path) -> dict[str, dict[str, Calls]]:
    """By part of a step and by what they are due to ("layer and micro-step", ...): the calls."""
    cases = [(layers, micro) for layers in COUNTED for micro in (1, 2)]
    overrides = {
        f"{layers}x{micro}": [
            f"model.name_or_path={folder}/model{layers}",
            f"gradient_accumulation_steps={micro}",
            "max_steps=3",
        ]
        for layers, micro in cases
    }
    found = run(checkout, folder, overrides, count=True)
    return {part: due_to({case: found[f"{case[0]}x{case[1]}"][-1][part]["calls"] for case in cases}) for part in PARTS}


def due_to(calls: Mapping[tuple[int, int], Mapping[str, int]]) -> dict[str, Calls]:
    """Divide the calls of a step among what they are due to.

    A step of l layers and m micro-steps has a + b l + c m + d l m calls.

    Args:
        calls: of a step, by (layers, micro-steps), each of two numbers, the micro-steps being 1 and 2.
    """
    few, many = sorted({layers for layers, _ in calls})
    parts: dict[str, Calls] = {"layer and micro-step": {}, "layer and step": {}, "micro-step": {}, "step": {}}
    for name in sorted({name for each in calls.values() for name in each}):
        at = {case: each.get(name, 0) for case, each in calls.items()}
        of_layer = {micro: (at[many, micro] - at[few, micro]) / (many - few) for micro in (1, 2)}
        of_none = {micro: at[few, micro] - few * of_layer[micro] for micro in (1, 2)}
        values = {
            "layer and micro-step": of_layer[2] - of_layer[1],
            "layer and step": 2 * of_layer[1] - of_layer[2],
            "micro-step": of_none[2] - of_none[1],
            "step": 2 * of_none[1] - of_none[2],
        }
        for due, value in values.items():
            if value:
                parts[due][name] = value
    return parts


def layer_seconds(steps: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """By part: the processor time of the host in one layer, in seconds."""
    few, many = TIMED
    of = {(layers, part): min(step[part]["seconds"] for step in steps[f"{layers}"]) for layers in TIMED for part in PARTS}
    return {part: (of[many, part] - of[few, part]) / (many - few) for part in PARTS}


def timed(checkouts: Mapping[str, Path], folder: Path, budget: Budget, steps: int) -> dict[str, dict[str, list[float]]]:
    """By checkout and part: the milliseconds of the host in one layer, of each round."""
    overrides = {f"{layers}": [f"model.name_or_path={folder}/model{layers}", f"max_steps={steps}"] for layers in TIMED}
    found: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in checkouts}

    def both_passes(name: str) -> float:
        seconds = layer_seconds(run(checkouts[name], folder, overrides, count=False))
        for part in PARTS:
            found[name][part].append(1e3 * seconds[part])
        return seconds["forward"] + seconds["backward"]

    until_narrow(both_passes, list(checkouts), [("this", "other")] if "other" in checkouts else [], budget)
    return found


def rows_of(name: str, parts: Mapping[str, Mapping[str, Calls]], milliseconds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    rows = []
    for part, of_part in parts.items():
        for due, calls in of_part.items():
            numbers = {
                column: sum(number for call, number in calls.items() if call.startswith(f"{kind} ")) for column, kind in KINDS.items()
            }
            host = statistics.median(milliseconds[part]) if due == "layer and micro-step" else None
            by_name = [f"{number:g} {call}" for call, number in sorted(calls.items(), key=lambda item: -item[1])]
            all_of_them = list(milliseconds[part]) if host is not None else []
            rows.append(
                {"checkout": name, "part": part, "per": due, **numbers, "host_ms": host, "calls": by_name, "host_ms_all": all_of_them}
            )
    return rows


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    summary = {}
    for one in rows:
        if one["per"] == "layer and micro-step" and one["part"] != "rest":
            key = f"{one['checkout']}_{one['part']}"
            summary[f"{key}_operators_and_launches"] = one["operators"] + one["launches"]
            summary[f"{key}_host_ms"] = one["host_ms"]
    return summary


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER_CHECKOUT", help="a checkout to compare with: before a change")
    options = parser.parse_args()
    checkouts = {"this": ROOT} | ({"other": options.other.resolve()} if options.other else {})
    budget, steps = (QUICK, 6) if options.quick else (ENOUGH if options.other else ALONE, 12)
    with tempfile.TemporaryDirectory(prefix="hot_path-") as temporary:
        folder = Path(temporary)
        make_folder(folder, {*COUNTED, *TIMED})
        counted = {name: counts(checkout, folder) for name, checkout in checkouts.items()}
        milliseconds = timed(checkouts, folder, budget, steps)
    rows = [row for name in checkouts for row in rows_of(name, counted[name], milliseconds[name])]
    summary: dict[str, float | Ratio] = {**summary_of(rows)}
    if options.other:
        for part in ("forward", "backward"):
            summary[f"{part}_host_time_over_other"] = of_times(milliseconds["this"][part], milliseconds["other"][part], budget)
    finish("hot_path", rows, summary, options.json)


if __name__ == "__main__":
    main()
