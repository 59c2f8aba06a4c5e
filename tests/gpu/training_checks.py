"""Trainings of one rank on a GPU, held to the same ones on the CPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from tests.gpu.bench import LAYERS, Bench, Failed, Figures
from tests.host_waits import expected_waits
from tests.mock_cuda.runs import Runs
from tests.mock_cuda.trainings import EVALUATED, FREED, FULL, MOE_LORA, SMALL, Settings

SLOWLY = ("learning_rate=1e-3",)
"""so that AdamW makes no large difference of a small one"""
KINDS: dict[str, Settings] = {"mixlora": (*SMALL, *SLOWLY), "full": (*FULL, *SMALL, *SLOWLY), "moe_lora": (*MOE_LORA, *SMALL, *SLOWLY)}
ROUNDING = {"float64": (1e-9, 1e-8), "float32": (1e-4, 1e-3), "bfloat16": (2e-2, 1e-1)}
"""type -> relative differences of the losses and of the norm of the gradients that may come from another order of sums"""


def float64_losses(bench: Bench) -> Figures:
    """Torch's path against the CPU, of each kind of experts: all but the kernels, with next to no rounding."""
    return _losses(bench, "float64", ("torch",))


def float32_losses(bench: Bench) -> Figures:
    """Torch's path and Triton's kernels against the CPU, of each kind of experts."""
    return _losses(bench, "float32", ("torch", "triton"))


def bfloat16_losses(bench: Bench) -> Figures:
    """Torch's path and Triton's kernels against the CPU, of each kind of experts."""
    # Triton's interpreter, which a mock GPU has, computes with bfloat16's bits.
    return _losses(bench, "bfloat16", ("torch",) if bench.mock else ("torch", "triton"))


def host_waits(bench: Bench) -> Figures:
    """Where the host waits for the GPU in a step: as the table says that mock GPUs are held to."""
    runs = bench.train("waits", {kind: (*settings, "kernels=triton") for kind, settings in KINDS.items()})
    wanted = expected_waits(layers=LAYERS, micro_steps=1)
    found = {kind: runs.steps(kind, rank=0)[-1]["waits"] for kind in KINDS}
    wrong = {kind: waits for kind, waits in found.items() if waits != wanted}
    if wrong:
        raise Failed(f"the table has {dict(wanted)}, but there were {wrong}")
    return {f"{kind}_waits_a_step": float(sum(waits.values())) for kind, waits in found.items()}


def freed_replicas(bench: Bench) -> Figures:
    """Freed and gathered again, with gradient checkpointing: as if nothing were freed, with torch's cache of memory and without."""
    settings = (*KINDS["mixlora"], f"kernels={'torch' if bench.mock else 'triton'}")
    kept = bench.train("kept", {"mixlora": settings})
    freed = bench.train("freed", {"mixlora": (*settings, *FREED)})
    uncached = bench.train("uncached", {"mixlora": (*settings, *FREED)}, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    return {
        "kept_and_freed": compare(freed, kept, "mixlora", ROUNDING["float32"]),
        "cached_and_uncached": compare(uncached, freed, "mixlora", ROUNDING["float32"]),
    }


def save_and_resume(bench: Bench) -> Figures:
    """Two steps, a checkpoint, two more: as four steps at once. Then what was written is evaluated, and answers."""
    settings = (*KINDS["mixlora"], "model.dtype=float64", "lr_scheduler_type=constant", "warmup_ratio=0")
    whole = bench.train("whole", {"mixlora": (*settings, *EVALUATED)})
    half = bench.train("half", {"mixlora": (*settings, "max_steps=2")})
    resumed = bench.train("resumed", {"mixlora": (*settings, *EVALUATED, "resume=true")}, asked=["mixlora"], begun=half)
    wanted, got = whole.evaluations("mixlora")[-1]["up.eval"]["loss"], resumed.evaluations("mixlora")[-1]["up.eval"]["loss"]
    if abs(got - wanted) > 1e-4 * wanted:
        raise Failed(f"held-out loss {got} after resuming, {wanted} without")
    return {"losses": compare(resumed, whole, "mixlora", ROUNDING["float64"]), "answer": resumed.answered("mixlora")["answer"]}


def command_line(bench: Bench) -> Figures:
    """`hecate train` as a user starts it (one rank, forked, NCCL), `hecate eval` and `hecate generate`."""
    bench.real()
    output = bench.folder / "runs-command-line"
    hecate = [sys.executable, "-m", "hecate"]
    settings = ["learning_rate=1e-3", "nproc=1", "eval.generate=true", f"output_dir={output}"]
    bench.program([*hecate, "train", str(bench.folder / "config.yaml"), *settings])
    losses = [float(line["loss"]) for line in _metrics(output) if line["kind"] == "step"]
    bench.program([*hecate, "eval", str(bench.folder / "config.yaml"), f"output_dir={output}"])
    answer = bench.program([*hecate, "generate", str(output / "adapter"), "w1x1"])
    if not losses[-1] < losses[0]:
        raise Failed(f"the loss does not fall: {losses}")
    return {"first_loss": losses[0], "last_loss": losses[-1], "answer": answer.strip()}


def _losses(bench: Bench, dtype: str, implementations: tuple[str, ...]) -> Figures:
    cases = {kind: (*settings, f"model.dtype={dtype}") for kind, settings in KINDS.items()}
    cpu = bench.train(f"{dtype}-cpu", cases, on_cpu=True)
    figures: Figures = {}
    for kernels in implementations:
        runs = bench.train(f"{dtype}-{kernels}", {kind: (*settings, f"kernels={kernels}") for kind, settings in cases.items()})
        for kind in cases:
            figures[f"{kind}_{kernels}"] = compare(runs, cpu, kind, ROUNDING[dtype])
    return figures


def compare(got: Runs, wanted: Runs, case: str, rounding: tuple[float, float]) -> float:
    """The largest relative difference of a loss. Raises Failed: one is larger than rounding explains, or that of a norm is."""
    losses, norms = (largest_difference(got.losses(case), wanted.losses(case), part) for part in ((0, 1), (2,)))
    if not (losses <= rounding[0] and norms <= rounding[1]):
        raise Failed(f"{case}: losses differ by {losses:.1e} (at most {rounding[0]:.0e}), norms by {norms:.1e} (at most {rounding[1]:.0e})")
    return losses


def largest_difference(got: list[tuple[float, float, float]], wanted: list[tuple[float, float, float]], parts: tuple[int, ...]) -> float:
    """Relative, over all steps, of some of (loss, load-balancing loss, norm of the gradients); NaN where any is not a number."""
    assert len(got) == len(wanted) > 0, (got, wanted)
    pairs = [(a[part], b[part]) for a, b in zip(got, wanted, strict=True) for part in parts]
    return float(torch.tensor([abs(a - b) / max(abs(b), 1e-12) for a, b in pairs]).max())


def _metrics(output: Path) -> list[Mapping[str, float | str]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
