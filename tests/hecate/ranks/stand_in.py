"""A stand-in for NCCL: gloo on the CPU, whose groups say that they are NCCL's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


class _Options:
    """`ProcessGroupNCCL.Options`."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.urgent, self.config = is_high_priority_stream, mock.Mock(max_ctas=None)

    def given(self) -> tuple[bool, int | None]:
        return self.urgent, self.config.max_ctas


class HangingEvent:
    """`torch.cuda.Event`."""

    ends = True
    """whether what it was recorded behind ends"""

    def record(self, stream: object) -> None:
        pass

    def query(self) -> bool:
        return self.ends


@contextmanager
def gloo_as_nccl() -> Iterator[dict[str, list[Any]]]:
    """In this process groups say that they are NCCL's, until the end of the block. Gives what they were made with and used for."""
    made: dict[str, list[Any]] = {"default": [], "groups": [], "used": [], "exchanging": [], "aborted": []}
    init, new_group, reduce, exchange = dist.init_process_group, dist.new_group, dist.all_reduce, dist.all_to_all_single
    abort = distributed_c10d._abort_process_group

    def init_process_group(name: str, device_id: Any, pg_options: Any, **named: Any) -> None:
        made["default"].append((name, device_id, pg_options.given()))
        init("gloo", **named)

    def split_group(split_ranks: list[list[int]], timeout: Any, pg_options: Any) -> Any:
        made["groups"].append((split_ranks, pg_options.given()))
        groups = [new_group(ranks, timeout=timeout) for ranks in split_ranks]
        return next(group for group, ranks in zip(groups, split_ranks, strict=True) if dist.get_rank() in ranks)

    def all_reduce(tensor: torch.Tensor, **named: Any) -> Any:
        made["used"].append(named.get("group"))
        return reduce(tensor, **named)

    def all_to_all_single(*tensors: torch.Tensor, **named: Any) -> Any:
        made["exchanging"].append(named.get("group"))
        return exchange(*tensors, **named)

    def abort_all(group: Any = None) -> None:
        made["aborted"].append(group)
        abort(group)

    cuda = mock.patch.multiple(torch.cuda, Event=HangingEvent, current_stream=lambda device: None)
    names = {
        "init_process_group": init_process_group,
        "split_group": split_group,
        "all_reduce": all_reduce,
        "all_to_all_single": all_to_all_single,
        "get_backend": lambda _=None: "nccl",
    }
    groups = mock.patch.multiple(dist, **names)
    options = mock.patch.object(dist, "ProcessGroupNCCL", mock.Mock(Options=_Options), create=True)
    chosen = mock.patch("hecate.ranks.ranks.chosen_backend", return_value="nccl")
    with cuda, groups, options, chosen, mock.patch.object(distributed_c10d, "_abort_process_group", abort_all):
        yield made
