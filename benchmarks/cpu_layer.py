"""Time one MixLoRA layer on one core, forward and backward, against a naive loop over experts (`benchmarks.moe_layer --kernels`).

Both run with the allocator settings that hecate's launcher gives ranks. Without them, allocating memory takes a third of the time.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.kernel_cases import TOLERANCE, Layer, LayerShape, errors, expected, make_inputs
from benchmarks.ratios import Budget, Ratio, least, speedup, until_narrow
from hecate.kernels.mixlora.reference import mixlora_ffn_reference
from hecate.kernels.mixlora.torch_path import mixlora_ffn

SHAPE = LayerShape("cpu", hidden=512, ffn=1024, rank=8, experts=8, k=2, tokens=4096)
DTYPES = (torch.float32, torch.bfloat16)


def rows(budget: Budget) -> list[dict[str, Any]]:
    """Time the naive layer and ours in turn in each type, after the check. Raises RuntimeError if one is wrong."""
    assert torch.get_num_threads() == 1, torch.get_num_threads()
    found = []
    for dtype in DTYPES:
        inputs = make_inputs(SHAPE, torch.device("cpu"), dtype)
        operands = (inputs.routed, inputs.base, dict(inputs.loras))
        functions = {"naive": mixlora_ffn_reference, "ours": mixlora_ffn}
        layers = {name: Layer(functools.partial(function, *operands), inputs.leaves()) for name, function in functions.items()}
        wanted = expected(inputs)
        for name, layer in layers.items():
            off = {result: error for result, error in errors(layer.results(inputs.dy_TD), wanted).items() if not error <= TOLERANCE}
            if off:
                raise RuntimeError(f"{name} in {dtype} is wrong, so nothing is timed: {off}")

        def seconds(name: str) -> float:
            start = time.perf_counter()
            layers[name].step(inputs.dy_TD)  # noqa: B023 - called at once
            return time.perf_counter() - start

        times = until_narrow(seconds, list(layers), [("ours", "naive")], budget)
        kind = str(dtype).removeprefix("torch.")
        found += [
            {"dtype": kind, "provider": name, "ms_median": statistics.median(ms), "ms_min": min(ms), "ms_all": ms}
            for name, ms in ((name, [1e3 * one for one in taken]) for name, taken in times.items())
        ]
    return found


def summary_of(rows: Sequence[dict[str, Any]], budget: Budget) -> dict[str, Ratio]:
    """Return how many times as long the naive loop takes, by type, and the smallest of these ratios."""
    samples = {(row["dtype"], row["provider"]): row["ms_all"] for row in rows}
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    ratios = {f"cpu_naive_over_ours_{dtype}": speedup(samples[dtype, "ours"], samples[dtype, "naive"], budget) for dtype in dtypes}
    return {"cpu_naive_over_ours": least(ratios.values()), **ratios}
