"""Compare `auto` with the best of all other policies on layers drawn at random (`testing.drawn_layers`), from history and exactly.

Planners are given the exact loads, as in `benchmarks.plan_quality`, whose workloads have names; nobody has chosen these sizes, skews,
clusters and slots. Other policies count with their authors' split of tokens and collectives and with ours, whichever is faster. A row holds
one kind of layers in one way to plan: `auto` over the best other policy (`benchmarks.report.spread`), and the share of layers in which it
is more than 0.5 % slower. A third of the layers is kept for a last look, when nothing is to be decided by them any more.

    python -m benchmarks.drawn_plans [--quick] [--last-look] [--json FILE]
    python -m benchmarks.drawn_plans --ablation [--quick] [--json FILE]

With `--ablation` each rule, start and kind of change is left out in a copy of this checkout, whose loops are compiled anew, and plans of
the copy are compared with these: over all layers, and in the kind of layers where it makes the largest difference.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plan_quality import geomean
from benchmarks.report import arguments, finish, spread
from hecate.parallel.cost.cost_model import ExecutionMode, PlanMode
from hecate.parallel.loops import jit
from hecate.parallel.planners import ROWS, PlanInput
from hecate.parallel.planners.policies.auto import plan_auto
from testing.drawn_layers import LAYERS, drawn_layer, is_kept
from testing.plan_cases import price_row

ROOT = Path(__file__).resolve().parent.parent
MODES: tuple[PlanMode, ...] = ("history", "exact")
KINDS = ("cluster", "kind", "skew", "slots", "experts", "tokens")
LOST = 1.005
_AUTO = "parallel/planners/policies/auto.py"
_SEARCH = "parallel/planners/local_search.py"
ABLATIONS: dict[str, tuple[str, str, str]] = {
    **{
        f"rule {name}": (_AUTO, f"    ({name}, (", f"    (OWNERS, ()), #  {name}, (")
        for name in ("NODES", "NODES_BUT_ONE", "WANTED", "OWNERS")
    },
    **{
        f"start {name}": (_AUTO, "if begins <= left and (", f"if begins <= left and start != {number} and (")
        for number, name in ((1, "FILLED"), (2, "UNDER"), (3, "EVEN"), (4, "EVEN_SLOTS"), (5, "DEALT"))
    },
    "change relieve_port": (_SEARCH, "        count = relieve_port(", "        count = count if count >= 0 else relieve_port("),
    "change give_up": (_SEARCH, "if costly:\n            count = give_up(", "if False:\n            count = give_up("),
    "change exchange": (_SEARCH, "        count = exchange(", "        count = count if count >= 0 else exchange("),
    "the search": (_AUTO, "allowance = max(search_share * best_seconds, least_search)", "allowance = -1.0"),
}
"""what is left out -> the file, and what stands there with and without it"""


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--last-look", action="store_true", help="the layers that are kept for a last look")
    parser.add_argument("--ablation", action="store_true", help="what each part of the planner is worth")
    parser.add_argument("--seconds-into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    indices = [index for index in range(LAYERS) if is_kept(index) == options.last_look][:: 25 if options.quick else 1]
    jit.compile_and_wait()
    if options.seconds_into is not None:
        np.save(options.seconds_into, [auto_seconds(given) for _, _, given in inputs(indices)])
    elif options.ablation:
        rows = ablations(indices, options.quick)
        finish("plan_ablation", rows, {row["without"]: row["over_all"] for row in rows}, options.json)
    else:
        rows, total = compared(indices)
        finish("drawn_plans_last_look" if options.last_look else "drawn_plans", rows, total, options.json)


def inputs(indices: Sequence[int]) -> Iterator[tuple[PlanMode, dict[str, object], PlanInput]]:
    for mode in MODES:
        for index in indices:
            layer = drawn_layer(index)
            yield mode, layer.case, replace(layer.given, execution=ExecutionMode(plan=mode))


def auto_seconds(given: PlanInput) -> float:
    return float(plan_auto(given).seconds(given).total[0])


def best_other(given: PlanInput) -> float:
    """Return the seconds of the fastest other policy whose replicas fit."""
    best = math.inf
    for name, planner in ROWS.items():
        plan = planner(given)
        if name != "auto" and ((plan.where_LED[0] & ~given.owned_LED[0]).sum(0) <= given.slots_D).all():
            best = min(best, float(price_row(name, plan, given).seconds.total[0]))
    return best


def grouped(indices: Sequence[int], values: Sequence[float], key: Callable[[PlanMode, dict[str, object]], Any]) -> dict[Any, list[float]]:
    groups: dict[Any, list[float]] = defaultdict(list)
    for (mode, case, _), value in zip(inputs(indices), values, strict=True):
        groups[key(mode, case)].append(value)
    return groups


def compared(indices: Sequence[int]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    over = [auto_seconds(given) / best_other(given) for _, _, given in inputs(indices)]
    rows: list[dict[str, Any]] = []
    for kind in KINDS:

        def of_kind(mode: PlanMode, case: dict[str, object], kind: str = kind) -> tuple[str, str]:
            return mode, str(case[kind])

        for (mode, value), found in sorted(grouped(indices, over, of_kind).items()):
            rows.append({"plan": mode, kind: value, "auto / best other": spread(found), "lost": float(np.mean(np.array(found) > LOST))})
    total: dict[str, float] = {}
    for mode, found in grouped(indices, over, lambda mode, _: mode).items():
        total |= {
            f"{mode}_geomean": geomean(np.array(found)),
            f"{mode}_worst": max(found),
            f"{mode}_lost": float(np.mean(np.array(found) > LOST)),
        }
    return rows, total | {"layers": len(indices)}


def ablations(indices: Sequence[int], quick: bool) -> list[dict[str, Any]]:
    whole = np.array([auto_seconds(given) for _, _, given in inputs(indices)])
    rows: list[dict[str, Any]] = []
    for name, (file, old, new) in ABLATIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            copy, found = Path(folder) / "copy", Path(folder) / "seconds.npy"
            for part in ("hecate", "parallel", "kernels", "launch", "benchmarks", "testing", "configs"):
                shutil.copytree(ROOT / part, copy / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "results"))
            text = (copy / file).read_text(encoding="utf-8")
            assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
            (copy / file).write_text(text.replace(old, new), encoding="utf-8")
            command = [sys.executable, "-m", "benchmarks.drawn_plans", "--seconds-into", str(found), *(["--quick"] if quick else [])]
            subprocess.run(command, cwd=copy, check=True)
            over = (np.load(found) / whole).tolist()
        worst: dict[str, float] = {}
        for kind in KINDS:

            def of_kind(mode: PlanMode, case: dict[str, object], kind: str = kind) -> str:
                return f"{kind} {case[kind]}, {mode}"

            worst |= {
                key: geomean(np.array(values)) for key, values in grouped(indices, over, of_kind).items() if len(values) >= 20 or quick
            }
        most = max(worst, key=lambda key: worst[key])
        rows.append({"without": name, "over_all": geomean(np.array(over)), "most_in": most, "over_most": worst[most]})
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
