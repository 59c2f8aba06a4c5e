"""Kernels compiled for GPUs that this machine does not have: exactly what a wrapper would launch, down to the cubin, and what that costs.

with compiling_for(90):
    code = machine_code(launch_of_meta_tensors)

Triton's own compiler makes the cubin; the tools in Triton's wheel read it. No GPU is needed.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hecate.kernels.common.kernel_launch import Launch
from hecate.kernels.common.launch_config import meta_tensors_are_on

SMS = (80, 90)
"""A100, H100 and H200"""
KINDS = {
    "HGMMA": "warpgroup matrix products (sm_90)",
    "HMMA": "warp matrix products of 16-bit elements or tf32",
    "IMMA": "integer matrix products",
    "UTMALDG": "loads by the tensor memory accelerator (sm_90)",
    "UTMASTG": "stores by it",
    "LDGSTS": "asynchronous copies into shared memory",
    "LDG": "other loads of global memory",
    "STG": "stores to global memory",
    "LDL": "loads of local memory: what was spilled comes back",
    "STL": "stores to local memory: spills",
    "ATOM": "atomics with a result, but for exchanges",
    "RED": "atomics without: a kernel with either may sum in any order",
}
"""Instructions that are counted, by the beginning of their names."""
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
MAX_SHARED = {80: 163 << 10, 90: 227 << 10}
"""bytes of shared memory that one program may have, by sm number (CUDA C++ Programming Guide, technical specifications)"""


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


@dataclass(frozen=True)
class MachineCode:
    registers: int
    """of each thread"""
    stack: int
    """bytes of local memory of each thread: spilled registers, and arrays that could not be kept in registers"""
    shared: int
    """bytes of each program, the dynamic ones included"""
    instructions: Mapping[str, int]
    """how often each of KINDS stands in the code; none of them: left out"""

    @property
    def spills(self) -> bool:
        return self.stack > 0 or "LDL" in self.instructions or "STL" in self.instructions


def read_cubin(cubin: bytes, dynamic_shared: int) -> MachineCode:
    """Registers, stack, shared memory and instructions of a cubin's one kernel; `dynamic_shared`: bytes that its launch asks for."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        code = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
    found = _USAGE.search(usage)
    if found is None:
        raise RuntimeError(f"cuobjdump --dump-resource-usage said nothing of registers: {usage[-500:]}")
    registers, stack, shared, local = map(int, found.groups())
    return MachineCode(registers, stack + local, shared + dynamic_shared, count_instructions(code))


def count_instructions(code: str) -> dict[str, int]:
    """How often each of KINDS stands in what nvdisasm printed."""
    counts = collections.Counter(_kind(name) for name in _INSTRUCTION.findall(code))
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def _kind(instruction: str) -> str:
    """The kind of "ATOMS.ADD" is ATOM; LDGSTS is no LDG, REDUX no RED, and an exchange, by which descriptors are published, no sum."""
    name, _, how = instruction.partition(".")
    if name in ("ATOM", "ATOMG", "ATOMS"):
        return "exchange" if "EXCH" in how else "ATOM"
    return "RED" if name in ("RED", "REDG", "REDS") else name


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
