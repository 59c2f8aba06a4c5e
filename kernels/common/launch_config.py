"""Choose each kernel's launch configuration: from the file tuned on this kind of device, or from a table by rank, element size and device.

Triton's own `@autotune` measures on the first call, differently on each rank, and cannot run without a GPU. A table is the same
everywhere and can be compiled ahead of time. `python -m benchmarks.tune_kernels` writes `kernels/tuned/DEVICE.json` on a GPU.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hecate.kernels.common.low_rank import MAX_RANK

TUNED = Path(__file__).resolve().parents[1] / "tuned"
NARROW = 64
"""results up to this width, the largest usual rank of a low-rank pair, are tuned separately from wide ones"""
INTERPRETER = 0
"""the value used for the sm number when kernels are interpreted on the CPU"""


@dataclass(frozen=True)
class LaunchConfig:
    blocks: Mapping[str, int]
    """the kernel's block sizes, by `tl.constexpr` parameter"""
    num_warps: int = 4
    num_stages: int = 2


# Compared as objects, so that a table of rules can be a key.
@dataclass(frozen=True, eq=False)
class Rule:
    """A configuration and the cases that it is for."""

    config: LaunchConfig
    min_sm: int = 80
    max_rank: int = MAX_RANK
    """the largest rank, padded for tl.dot; the rank of kernels without LoRA is 0"""
    itemsizes: tuple[int, ...] = (2, 4)
    """the bytes of an element of the activations"""

    def serves(self, rank: int, itemsize: int, sm: int) -> bool:
        return sm >= self.min_sm and rank <= self.max_rank and itemsize in self.itemsizes


Key = tuple[str, int, int]
"""a kernel, its padded rank, and the bytes of an element"""


@dataclass(frozen=True)
class Tuned:
    """The configurations tuned on one kind of device, by kernel and by (rank, itemsize)."""

    configs: Mapping[str, Mapping[tuple[int, int], LaunchConfig]] = field(default_factory=dict)


def choose(name: str, rules: tuple[Rule, ...], *, rank: int, itemsize: int, device: torch.device) -> LaunchConfig:
    """Return the configuration of kernel `name` on a device: the tuned one if there is one, else that of the first matching rule.

    Args:
        rank: the rank padded by `padded_rank`; 0 for kernels without LoRA.
        itemsize: the bytes of an element of the activations.
    """
    if _trial is not None:
        config = _trial.config(name, rules, rank, itemsize, sm_of(device))
        if config is not None:
            return config
    if device.type == "cuda":
        return _on_gpu(name, rules, rank, itemsize, device)
    return by_rule(name, rules, rank=rank, itemsize=itemsize, sm=sm_of(device))


@functools.cache
def _on_gpu(name: str, rules: tuple[Rule, ...], rank: int, itemsize: int, device: torch.device) -> LaunchConfig:
    # Each launch asks, and torch takes microseconds to tell the name and the capability of a device.
    tuned = tuned_for(torch.cuda.get_device_name(device)).configs.get(name, {}).get((rank, itemsize))
    return tuned or by_rule(name, rules, rank=rank, itemsize=itemsize, sm=sm_of(device))


def by_rule(name: str, rules: tuple[Rule, ...], *, rank: int, itemsize: int, sm: int) -> LaunchConfig:
    """Return the configuration of the first matching rule. Raises ValueError if none matches."""
    for rule in rules:
        if rule.serves(rank, itemsize, sm):
            return rule.config
    raise ValueError(f"kernel {name}: no launch configuration for rank {rank}, {itemsize}-byte elements, sm_{sm}; add a rule to its table")


@dataclass
class Trial:
    """The configurations that `choose` returns inside `trying`, and a record of the kernels that it was called for."""

    configs: Mapping[Key, LaunchConfig]
    asked: dict[Key, tuple[tuple[Rule, ...], int]] = field(default_factory=dict)
    """the rules and the sm number of each kernel, in the order of the first calls"""

    def config(self, name: str, rules: tuple[Rule, ...], rank: int, itemsize: int, sm: int) -> LaunchConfig | None:
        self.asked.setdefault((name, rank, itemsize), (rules, sm))
        return self.configs.get((name, rank, itemsize))


_trial: Trial | None = None


@contextlib.contextmanager
def trying(configs: Mapping[Key, LaunchConfig]) -> Iterator[Trial]:
    """A context, for a tuner, in which `choose` returns these configurations in all threads (a backward pass has its own thread)."""
    global _trial
    before, _trial = _trial, Trial(configs)
    try:
        yield _trial
    finally:
        _trial = before


_sm_of_meta: contextvars.ContextVar[int] = contextvars.ContextVar("sm_of_meta", default=INTERPRETER)


@contextlib.contextmanager
def meta_tensors_are_on(sm: int) -> Iterator[None]:
    """A context in which launches of meta tensors get the configurations of this kind of GPU."""
    token = _sm_of_meta.set(sm)
    try:
        yield
    finally:
        _sm_of_meta.reset(token)


def sm_of(device: torch.device) -> int:
    """Return a GPU's sm number, such as 90 for an H100. It is INTERPRETER on a CPU; `meta_tensors_are_on` sets that of meta tensors."""
    if device.type == "meta":
        return _sm_of_meta.get()
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def num_blocks(size: int, block: int) -> int:
    """Return how many blocks cover a size. `triton.cdiv` is made for kernels and takes the host microseconds."""
    return -(-size // block)


def padded_rank(rank: int) -> int:
    """Return the rank rounded up to a power of two of at least 16, the smallest size that tensor cores multiply."""
    return max(16, 1 << (rank - 1).bit_length()) if rank > 0 else 0


def tuned_path(device_name: str) -> Path:
    """Return the file of the configurations tuned on a kind of device."""
    return TUNED / f"{re.sub(r'[^A-Za-z0-9]+', '_', device_name).strip('_')}.json"


@functools.cache
def tuned_for(device_name: str) -> Tuned:
    """Return the configurations tuned on this kind of device; none if there is no file."""
    path = tuned_path(device_name)
    return from_json(json.loads(path.read_text())) if path.is_file() else Tuned()


def forget_tuned() -> None:
    """Read the files of tuned configurations anew when the next kernel is launched."""
    tuned_for.cache_clear()
    _on_gpu.cache_clear()


def from_json(data: Mapping[str, Any]) -> Tuned:
    """Return the configurations in a value that `to_json` has made."""
    return Tuned(
        {
            name: {(row["rank"], row["itemsize"]): LaunchConfig(row["blocks"], row["num_warps"], row["num_stages"]) for row in rows}
            for name, rows in data["kernels"].items()
        }
    )


def to_json(tuned: Tuned) -> dict[str, Any]:
    return {
        "kernels": {
            name: [
                {
                    "rank": rank,
                    "itemsize": itemsize,
                    "blocks": dict(config.blocks),
                    "num_warps": config.num_warps,
                    "num_stages": config.num_stages,
                }
                for (rank, itemsize), config in sorted(configs.items())
            ]
            for name, configs in sorted(tuned.configs.items())
        }
    }
