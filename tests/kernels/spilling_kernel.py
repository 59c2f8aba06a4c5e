"""Compiles one kernel in few registers and in enough, for sm_80 and sm_90, and prints what it costs as JSON.

python -m tests.kernels.spilling_kernel
"""

from __future__ import annotations

import dataclasses
import json

import torch
import triton
import triton.language as tl

from hecate.kernels.common.kernel_launch import Launch
from tests.kernels.ahead_of_time import SMS, compiling_for, machine_code


@triton.jit
def _powers(p_x, p_out, N: tl.constexpr):
    offsets = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(p_x + offsets).to(tl.float32)
    power = x
    for _ in range(10):
        power = tl.dot(x, power) + tl.trans(x)
    tl.store(p_out + offsets, power)


def main() -> None:
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    found = {}
    for sm in SMS:
        with compiling_for(sm):
            for num_warps in (1, 4):
                code = machine_code(Launch(_powers, (1,), {"p_x": x, "p_out": x}, {"N": 64}, num_warps=num_warps))
                found[f"sm_{sm}, {num_warps} warps"] = {"spills": code.spills, **dataclasses.asdict(code)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
