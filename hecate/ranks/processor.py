"""Whether this processor has instructions of its own for bfloat16, as far as torch may use them, and how ranks set up oneDNN for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ONEDNN_SETTINGS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "4096"}
"""oneDNN computes torch's products of bfloat16. It makes a kernel for each shape of the operands, which takes longer than a small product,
and by itself keeps 1,024. Experts get another number of tokens in each step, so that training has more shapes than that. 4,096 kernels take
some 60 MB. oneDNN reads the variable before its first product."""
CPUINFO = Path("/proc/cpuinfo")
_BOUNDS = {"ATEN_CPU_CAPABILITY": ("avx512",), "ONEDNN_MAX_CPU_ISA": ("bf16", "fp16", "amx", "avx10", "all", "default")}
"""For each variable that bounds the instructions of torch, the words of a bound that leaves torch those for bfloat16."""


def computes_bfloat16(cpuinfo: Path = CPUINFO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether products of bfloat16 are computed as such, and not emulated in float32.

    The processor must have AVX512_BF16 or AMX, and no variable of `environment` may keep torch from it, so that a process which is bounded
    to the instructions of a lesser processor trains as it would train there.
    """
    try:
        flags = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return False
    given = {name: environment.get(name, "").lower() for name in _BOUNDS}
    bounded = any(bound and not any(word in bound for word in _BOUNDS[name]) for name, bound in given.items())
    return not bounded and ("avx512_bf16" in flags or "amx_tile" in flags)
