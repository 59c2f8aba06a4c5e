"""Kernels compiled for GPUs that are not here: exactly what a wrapper would launch, down to the cubin, by triton's own compiler.

with compiling_for(90):
    code = machine_code(launch_of_meta_tensors)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hecate.kernels.kernel_launch import Launch
from hecate.kernels.launch_config import meta_tensors_are_on
from hecate.kernels.machine_code import MachineCode, read_cubin

SMS = (80, 90)
"""A100, H100 and H200"""


class _AbsentGpu:
    """What triton asks of a driver before it compiles. A device's number is its sm number, so that triton keeps their kernels apart."""

    def __init__(self, sm: int) -> None:
        self._sm = sm

    def get_current_device(self) -> int:
        return self._sm

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._sm, 32)


@contextlib.contextmanager
def compiling_for(sm: int) -> Iterator[None]:
    """Inside, `Launch.compiled` compiles for this kind of GPU, and launches of meta tensors get its configurations."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError(
            "TRITON_INTERPRET=1: kernels are interpreted in this process and cannot be compiled; unset it before importing any"
        )
    before: Any = driver._active
    driver.set_active(_AbsentGpu(sm))
    try:
        with meta_tensors_are_on(sm):
            yield
    finally:
        driver._active = before


def machine_code(launch: Launch) -> MachineCode:
    """Compile a launch under `compiling_for` and read what came out.

    Raises whatever triton does of a kernel that it cannot compile.
    """
    compiled = launch.compiled()
    return read_cubin(compiled.asm["cubin"], compiled.metadata.shared)
