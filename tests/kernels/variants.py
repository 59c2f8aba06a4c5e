"""Which variants of its kernels Triton compiles for some batches: `python -m tests.kernels.variants` prints them, by layer and batch.

Triton compiles a kernel anew for other types and constants, and for integers that are 1, or divisible by 16, where others were not. Nothing
is compiled here: Triton is only asked for the key under which it looks for the machine code of a launch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import torch
from triton.runtime.jit import compute_cache_key

from hecate.kernels.common.kernel_launch import Launch
from tests.kernels.ahead_of_time import compiling_for
from tests.kernels.layer_cases import CASES, LayerCase

BATCHES = {
    "as planned": (8192, 8),
    "odd": (8191, 7),
    "one token": (1, 8),
    "sixteen": (16, 16),
    "one expert": (24, 1),
    "many experts": (4100, 130),
}
"""tokens of this rank, and experts in its slots"""
LAYERS = {
    "mixlora": replace(CASES["7B, dropout"], pair_dtype=torch.float32),
    "moe_lora": replace(CASES["fine-grained, dropout"], pair_dtype=torch.float32),
    "full": CASES["full experts, float32 masters"],
    "linear": CASES["linear"],
}


def key(launch: Launch) -> str:
    """The kernel, and a hash of what its machine code is found by."""
    kernel = launch.kernel
    *_, binder = kernel.device_caches[90]
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "debug": False}
    _, specialization, given = binder(**launch.args, **launch.constants, **options)
    return f"{kernel.__name__} {hashlib.sha256(compute_cache_key({}, specialization, given).encode()).hexdigest()[:12]}"


def keys(case: LayerCase) -> list[str]:
    """Of all launches of a layer, in their order."""
    return [key(launch) for launch in case.launches()]


def main() -> None:
    found: dict[str, Any] = {}
    with compiling_for(90):
        for name, case in LAYERS.items():
            found[name] = {batch: keys(replace(case, tokens=tokens, experts=experts)) for batch, (tokens, experts) in BATCHES.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
