"""What Megatron's sharded layers take for granted of its own initialisation, which makes process groups itself and asks for CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from hecate.apps.megatron.without_cuda import answer_for_cuda

_COLLECTIVES = {"dist_all_gather_func": "all_gather_single", "dist_reduce_scatter_func": "reduce_scatter_single"}
"""as Megatron calls them, and torch's newest names, for the older ones warn at each call"""


def prepare_sharded_layers() -> None:
    """Make Megatron's tensor and sequence parallel layers run in this process. Does nothing a second time."""
    answer_for_cuda()
    state: Any = import_module("megatron.core.parallel_state")
    if state._GLOBAL_MEMORY_BUFFER is None:
        state._set_global_memory_buffer()
    random: Any = import_module("megatron.core.tensor_parallel.random")
    random.get_cuda_rng_tracker().fork = _fork
    call_newest_collectives()
    layers: Any = import_module("megatron.core.tensor_parallel.layers")
    # It would advise a single connection to the GPU, but experts travel beside these layers.
    layers.linear_with_grad_accumulation_and_async_allreduce.warned = True


def replace_groups(model: nn.Module, pairs: Sequence[tuple[dist.ProcessGroup, dist.ProcessGroup]]) -> None:
    """Put the second group of each pair in the place of the first, wherever a module of Megatron's has noted it."""
    holders: list[Any] = list(model.modules())
    holders += {id(one): one for module in holders for one in vars(module).values() if isinstance(one, ProcessGroupCollection)}.values()
    for holder in holders:
        for name, value in list(vars(holder).items()):
            for before, after in pairs:
                if value is before:
                    setattr(holder, name, after)


def call_newest_collectives() -> None:
    """Have Megatron's layers call them by the names under which torch does not warn."""
    for module in ("layers", "mappings"):
        for theirs, name in _COLLECTIVES.items():
            if hasattr(dist, name):
                setattr(import_module(f"megatron.core.tensor_parallel.{module}"), theirs, getattr(dist, name))


def _fork(*_: Any) -> AbstractContextManager[None]:
    """Replaces Megatron's fork of a random state for each rank. Nothing is drawn from it: weights begin on the CPU, and dropout is 0."""
    return nullcontext()
