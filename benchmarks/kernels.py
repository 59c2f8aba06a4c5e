"""Time one MoE-LoRA layer on a GPU, forward and backward in bfloat16, against other implementations on the same card in the same run.

    python -m benchmarks.peers.wheels                       once, where there is a network
    python -m benchmarks.kernels --json kernels.json        needs no network; some minutes

The card's two ceilings are measured first. Then, for each shape, the results of every provider are compared with the float32 reference,
and nothing is timed unless ours are right. Layers take turns, and ratios have intervals (`benchmarks.ratios`). Peers from wheels run in
processes of their own, in which our layer is timed again, so that a peer's ratio is taken within one process. The row of a peer that
cannot run, or is wrong, says why.

`--determinism` runs our layer 20 times and compares every bit of every result. `--check` only runs the check, on small layers; without a
GPU it needs TRITON_INTERPRET=1. `cpu_naive_over_ours` in the summary is copied from the result of `python -m benchmarks.moe_layer
--kernels` that `--cpu-json` names.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_timing, kernel_providers
from benchmarks.kernel_cases import SHAPES, TOLERANCE, Inputs, Layer, LayerShape, errors, expected, make_inputs
from benchmarks.ratios import Budget, Ratio, largest, least, of_times, speedup
from benchmarks.report import arguments, finish
from hecate.errors import UserError
from hecate.kernels.backend import expert_kernels

PEERS: Mapping[str, Sequence[str]] = {
    "moe_peft_layer": ("7B", "1B", "135M"),
    # Tuning its kernels takes a minute a shape.
    "scattermoe_layer": ("7B", "fine-grained"),
}
"""the peers from wheels, by their module in `benchmarks.peers`, and the shapes at which each is timed"""
NOT_RELEASED = {"axolotl_mixlora": "in no released wheel: axolotl-ai-cloud/axolotl pull request 3535 is open"}
PEER_SECONDS = 150
"""the most seconds of a peer at one shape"""
RUN_SECONDS = 540
"""the most seconds of a whole run; peers get the rest of it"""
ENOUGH = Budget(half_width=0.01, rounds=100)
RUNS = 20
"""the number of runs of `--determinism`"""


def ours(inputs: Inputs, compiled: bool = False) -> Layer:
    """Return our layer over these inputs, called as a trainer calls it. torch.compile has nothing to compile in it."""
    kernels = expert_kernels("triton", inputs.x_TD, inputs.shape.rank)
    loras = dict(inputs.loras)
    if inputs.base is not None:
        return Layer(functools.partial(kernels.mixlora_ffn, inputs.routed, inputs.base, loras), inputs.leaves())
    assert inputs.frozen_EC is not None
    frozen = list(inputs.frozen_EC)
    return Layer(functools.partial(kernels.moe_lora_ffn, inputs.routed, frozen, loras, inputs.ffn_shape), inputs.leaves())


def providers(shape: LayerShape) -> dict[str, kernel_providers.Provider]:
    """Return the providers that need only torch."""
    stock = {"stock_torch": kernel_providers.stock_torch} if shape.shared_base else {}
    return {"ours": ours, "frozen_ffn": kernel_providers.frozen_ffn, **stock, "grouped_mm": kernel_providers.grouped_mm}


def checked(inputs: Inputs, layers: Mapping[str, Layer]) -> dict[str, str]:
    """Return why each layer is wrong, or "" if it is right. A layer that raises is wrong. The memory of the check is freed."""
    wanted = expected(inputs)
    verdicts = {}
    for name, layer in layers.items():
        try:
            found = {} if name == "frozen_ffn" else errors(layer.results(inputs.dy_TD), wanted)
            verdicts[name] = "".join(f"{result} is off by {error:.2g}; " for result, error in found.items() if not error <= TOLERANCE)
        except Exception as error:  # noqa: BLE001 (others' code may raise anything, and must not take the rest with it)
            verdicts[name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    del wanted
    gc.collect()
    return verdicts


def compare(inputs: Inputs, budget: Budget, compiled: bool = True) -> list[dict[str, Any]]:
    """Return the rows of the providers that need only torch, compiled or not. Raises RuntimeError if our layer is wrong."""
    shape = inputs.shape
    layers = {name: provider(inputs, compiled) for name, provider in providers(shape).items()}
    verdicts = checked(inputs, layers)
    if verdicts["ours"]:
        raise RuntimeError(f"shape {shape.name}: ours is wrong, so nothing is timed: {verdicts['ours']}")
    right = {name: layer for name, layer in layers.items() if not verdicts[name]}
    times = gpu_timing.alternate(
        {name: functools.partial(layer.step, inputs.dy_TD) for name, layer in right.items()}, beside_ours(right), budget
    )
    return [row(shape, name, times.get(name, []), verdicts[name]) for name in layers]


def compare_peer(module: str, inputs: Inputs, budget: Budget) -> dict[str, Any]:
    """Time one peer and our layer, in a process of their own. Returns their times, or the reason why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            layer = importlib.import_module(f"benchmarks.peers.{module}").make(inputs, Path(folder))
        except Exception as error:  # noqa: BLE001 (whatever keeps a peer from running is the row's reason)
            return {"reason": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        layers = {"ours": ours(inputs), module: layer}
        verdicts = checked(inputs, layers)
        if any(verdicts.values()):
            return {"reason": "; ".join(f"{name}: {verdict}" for name, verdict in verdicts.items() if verdict)}
        return gpu_timing.alternate(
            {name: functools.partial(each.step, inputs.dy_TD) for name, each in layers.items()}, beside_ours(layers), budget
        )


def beside_ours(names: Iterable[str]) -> list[tuple[str, str]]:
    return [("ours", name) for name in names if name != "ours"]


def peer_rows(module: str, shape: LayerShape, quick: bool, seconds: float) -> list[dict[str, Any]]:
    """Run `compare_peer` in a process of its own, and return the peer's row and that of our layer in the same process."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--peer", module, "--shape", shape.name, *(["--quick"] if quick else [])]
    name = module.removesuffix("_layer")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        return [row(shape, name, [], f"not finished after {max(seconds, 0.0):.0f} s")]
    if done.returncode:
        return [row(shape, name, [], f"exit {done.returncode}: {done.stderr.strip()[-300:]}")]
    result = json.loads(done.stdout.splitlines()[-1])
    if "reason" in result:
        return [row(shape, name, [], result["reason"])]
    return [row(shape, name, result[module], ""), row(shape, f"ours, beside {name}", result["ours"], "")]


def row(shape: LayerShape, provider: str, ms_all: list[float], reason: str) -> dict[str, Any]:
    median = statistics.median(ms_all) if ms_all else None
    return {
        "shape": shape.name,
        "provider": provider,
        "ms_median": median,
        "ms_min": min(ms_all, default=None),
        "ms_all": ms_all,
        "why_not": reason,
    }


def summary_of(rows: Sequence[Mapping[str, Any]], budget: Budget) -> dict[str, Ratio]:
    """Return the ratios of times, the worst over the shapes. Ratios without measurements are left out."""
    samples = {(row["shape"], row["provider"]): row["ms_all"] for row in rows if row["ms_all"]}

    def ratios(ours: str, theirs: str, take: Callable[[Sequence[float], Sequence[float], Budget], Ratio]) -> list[Ratio]:
        shapes = dict.fromkeys(shape for shape, _ in samples)
        both = [shape for shape in shapes if {(shape, ours), (shape, theirs)} <= samples.keys()]
        return [take(samples[shape, ours], samples[shape, theirs], budget) for shape in both]

    over_frozen = ratios("ours", "frozen_ffn", of_times)
    found = {"over_frozen_ffn_worst": largest(over_frozen)} if over_frozen else {}
    for rival, ours in (
        ("stock_torch", "ours"),
        ("grouped_mm", "ours"),
        ("moe_peft", "ours, beside moe_peft"),
        ("scattermoe", "ours, beside scattermoe"),
    ):
        if speedups := ratios(ours, rival, speedup):
            found[f"{rival}_over_ours_min"] = least(speedups)
    return found


def differing_runs(layer: Layer, dy_TD: torch.Tensor, runs: int = RUNS) -> list[str]:
    """Return the names of results whose bits differ between `runs` runs."""
    first = {name: value.clone() for name, value in layer.results(dy_TD).items()}
    differing = set()
    for _ in range(runs - 1):
        differing |= {name for name, value in layer.results(dy_TD).items() if not torch.equal(value, first[name])}
    return sorted(differing)


def check_small(device: torch.device) -> dict[str, dict[str, str]]:
    """Return `checked` for small layers of both kinds, by shape, with nothing compiled by torch."""
    small = dataclasses.replace(SHAPES[0], name="small", hidden=64, ffn=96, rank=8, experts=4, tokens=48)
    verdicts = {}
    for shape in (small, dataclasses.replace(small, name="small, own weights", k=3, shared_base=False)):
        inputs = make_inputs(shape, device, torch.float32)
        verdicts[shape.name] = checked(inputs, {name: provider(inputs, False) for name, provider in providers(shape).items()})
    return verdicts


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--determinism", action="store_true", help=f"instead of times: {RUNS} runs of ours, bit for bit")
    parser.add_argument("--check", action="store_true", help="instead of times: small layers against the reference; needs no GPU")
    parser.add_argument("--shape", action="append", choices=[shape.name for shape in SHAPES], help="only this one; may be repeated")
    parser.add_argument("--cpu-json", type=Path, help="the result of benchmarks.moe_layer --kernels")
    parser.add_argument("--peer", choices=list(PEERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    budget = Budget(ENOUGH.half_width, 4) if options.quick else ENOUGH
    shapes = [shape for shape in SHAPES if options.shape is None or shape.name in options.shape]
    if options.check:
        _check()
    elif not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks.kernels: no GPU here. `--check` runs without one; `python -m benchmarks.moe_layer --kernels` times the CPU path"
        )
    elif options.peer:
        print(json.dumps(compare_peer(options.peer, make_inputs(shapes[0], torch.device("cuda")), budget)))
    elif options.determinism:
        _determinism(shapes)
    else:
        _measure(shapes, budget, options)


def _check() -> None:
    on_gpu = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("benchmarks.kernels --check: no GPU here; TRITON_INTERPRET=1 lets triton's interpreter check the kernels")
    wrong = False
    for shape, verdicts in check_small(torch.device("cuda" if on_gpu else "cpu")).items():
        for name, verdict in verdicts.items():
            print(f"{shape:>20}  {name:>12}  {verdict or 'right'}")
            wrong |= bool(verdict)
    raise SystemExit(int(wrong))


def _determinism(shapes: Sequence[LayerShape]) -> None:
    wrong = False
    for shape in shapes:
        inputs = make_inputs(shape, torch.device("cuda"))
        differing = differing_runs(ours(inputs), inputs.dy_TD)
        print(f"{shape.name:>14}: {RUNS} runs {'differ in ' + ', '.join(differing) if differing else 'are the same in every bit'}")
        wrong |= bool(differing)
    raise SystemExit(int(wrong))


def _measure(shapes: Sequence[LayerShape], budget: Budget, options: argparse.Namespace) -> None:
    began = time.monotonic()
    bandwidth, rate = gpu_timing.copy_bandwidth(), gpu_timing.matmul_rate()
    print(f"{torch.cuda.get_device_name()}: copies at {bandwidth / 1e12:.2f} TB/s, bfloat16 products at {rate / 1e12:.0f} TFLOP/s")
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        rows += compare(make_inputs(shape, torch.device("cuda")), budget)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    for module, timed_at in PEERS.items():
        for shape in shapes:
            if shape.name in timed_at:
                rows += peer_rows(module, shape, options.quick, min(PEER_SECONDS, RUN_SECONDS - (time.monotonic() - began)))
    rows += [row(shapes[0], name, [], reason) for name, reason in NOT_RELEASED.items()]
    summary: dict[str, float | Ratio] = dict(summary_of(rows, budget))
    if options.cpu_json:
        summary["cpu_naive_over_ours"] = json.loads(options.cpu_json.read_text(encoding="utf-8"))["summary"]["cpu_naive_over_ours"]
    finish("kernels", rows, {**summary, "copy_tb_per_s": bandwidth / 1e12, "matmul_tflops": rate / 1e12}, options.json)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
