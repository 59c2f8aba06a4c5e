"""What several GPUs do together: trainings, exchanges, and going on without a rank that was killed."""

from __future__ import annotations

import json
import shutil
import sys

from hecate.ranks import launcher_files
from tests.gpu.bench import ROOT, Bench, Failed, Figures, Skipped
from tests.gpu.training_checks import ROUNDING, SLOWLY, compare
from tests.mock_cuda.trainings import EVERYWHERE, FREED, FULL, HECATE, MOE_LORA, STATIC, Settings

CASES: dict[str, Settings] = {
    "mixlora-static": (*STATIC, *SLOWLY),
    "mixlora-hecate-freed": (*HECATE, *FREED, *SLOWLY),
    "full-static": (*FULL, *STATIC, *SLOWLY),
    "moe_lora-everywhere": (*MOE_LORA, *EVERYWHERE, "model.shard_non_experts=true", *SLOWLY),
}
LOST_RANK = ROOT / "benchmarks" / "lost_rank.py"
"""kills a rank; a run's processes import it as their sitecustomize"""
KILLED_AT, STEPS = 6, 6
"""a backward pass of rank 1, two of which are a step; the steps of the run"""


def two_gpus(bench: Bench) -> Figures:
    """Trainings of two ranks over NCCL, against the CPU's over gloo, in float64."""
    bench.needs(2)
    cpu = bench.train("two-cpu", CASES, world=2, on_cpu=True)
    gpu = bench.train("two-gpu", CASES, world=2)
    return {case: compare(gpu, cpu, case, ROUNDING["float64"]) for case in CASES}


def two_ranks_on_one_gpu(bench: Bench) -> Figures:
    """Two ranks share a GPU by gloo, for which NCCL has no way: gathers over the flat route, and tokens that travel."""
    bench.real()
    variable = getattr(launcher_files, "COLLECTIVES_VARIABLE", None)
    if variable is None:
        raise Skipped("this version has no switch that takes gloo on a GPU")
    cases = {case: CASES[case] for case in ("mixlora-static", "mixlora-hecate-freed")}
    cpu = bench.train("shared-cpu", cases, world=2, on_cpu=True)
    gpu = bench.train("shared-gpu", cases, world=2, environment={variable: "gloo", "CUDA_VISIBLE_DEVICES": "0"})
    return {case: compare(gpu, cpu, case, ROUNDING["float64"]) for case in cases}


def uneven_exchanges(bench: Bench) -> Figures:
    """All-to-alls in which a rank sends nothing, receives nothing, or neither does anything; two groups in flight at once."""
    bench.needs(2)
    device, store = "mock" if bench.mock else "gpu", bench.folder / "exchanges.store"
    command = [sys.executable, "-m", "tests.gpu.exchange_rank", device, str(store)]
    with bench.beside([*command, "1"]) as other:
        printed = bench.program([*command, "0"], seconds=120)
        if other.wait(60):
            raise Failed("rank 1 has failed; see above")
    found: Figures = json.loads(printed.strip().splitlines()[-1])
    return found


def killed_rank(bench: Bench) -> Figures:
    """Rank 1 of two is killed (kill -9) in the middle of a step; the other goes on with the backups, and the run comes to its end."""
    bench.real()
    bench.needs(2)
    hooks, output, marker = bench.folder / "hooks", bench.folder / "runs-killed", bench.folder / "killed"
    hooks.mkdir(exist_ok=True)
    shutil.copy(LOST_RANK, hooks / "sitecustomize.py")
    settings = ["nproc=2", "fssdp.redundancy=1", f"max_steps={STEPS}", "data.eval=[]", f"output_dir={output}"]
    command = [sys.executable, "-m", "hecate", "train", str(bench.folder / "config.yaml"), *settings]
    bench.program(command, {"LOST_RANK_AT": str(KILLED_AT), "LOST_RANK_MARKER": str(marker)}, seconds=180, first_path=hooks)
    if not marker.exists():
        raise Failed("no rank was killed: nothing was shown")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "step"]
    if steps != list(range(1, STEPS + 1)):
        raise Failed(f"the steps were {steps}")
    went_on = [line["text"] for line in lines if "go on after step" in line.get("text", "")]
    if not went_on:
        raise Failed("no rank went on alone: the metrics have no such event")
    return {"steps": float(len(steps)), "went_on": went_on[0]}
