"""Compile kernels for GPUs that this machine does not have, and read the registers, memory and instructions of the machine code.

    with compiling_for(90):
        code = machine_code(launch_of_meta_tensors)

The launch is exactly the one that a wrapper makes. Triton's own compiler produces the cubin, and the tools in Triton's wheel read it.
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
    "LDL": "loads of local memory: reloads of spilled registers",
    "STL": "stores to local memory: spills",
    "ATOM": "atomics with a result, except exchanges",
    "RED": "atomics without a result; a kernel with either kind may sum in any order",
}
"""the instructions that are counted, by the beginning of their names"""
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
MAX_SHARED = {80: 163 << 10, 90: 227 << 10}
"""the bytes of shared memory that one program may have, by sm number (CUDA C++ Programming Guide, technical specifications)"""


class _AbsentGpu:
    """The part of a GPU driver that Triton calls before it compiles. A device's number is its sm number, so that caches differ."""

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
    """A context in which `Launch.compiled` compiles for this kind of GPU, and launches of meta tensors get its configurations."""
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
    """Compile a launch inside `compiling_for` and read the machine code.

    Raises the errors of Triton for a kernel that it cannot compile.
    """
    compiled = launch.compiled()
    return read_cubin(compiled.asm["cubin"], compiled.metadata.shared)


@dataclass(frozen=True)
class MachineCode:
    registers: int
    """the registers of each thread"""
    stack: int
    """the bytes of local memory of each thread, for spilled registers and for arrays that do not fit into registers"""
    shared: int
    """the bytes of shared memory of each program, dynamic ones included"""
    instructions: Mapping[str, int]
    """how often each of KINDS occurs in the code; those that do not occur are left out"""

    @property
    def spills(self) -> bool:
        return self.stack > 0 or "LDL" in self.instructions or "STL" in self.instructions


def read_cubin(cubin: bytes, dynamic_shared: int) -> MachineCode:
    """Return the registers, stack, shared memory and instructions of the only kernel in a cubin.

    `dynamic_shared` is the number of bytes of dynamic shared memory of its launch.
    """
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
    """Return how often each of KINDS occurs in the output of nvdisasm."""
    counts = collections.Counter(_kind(name) for name in _INSTRUCTION.findall(code))
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def _kind(instruction: str) -> str:
    """Return the kind of an instruction, such as ATOM for "ATOMS.ADD".

    LDGSTS is not an LDG, REDUX is not a RED, and an atomic exchange, which publishes descriptors, is not a sum.
    """
    name, _, how = instruction.partition(".")
    if name in ("ATOM", "ATOMG", "ATOMS"):
        return "exchange" if "EXCH" in how else "ATOM"
    return "RED" if name in ("RED", "REDG", "REDS") else name


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
