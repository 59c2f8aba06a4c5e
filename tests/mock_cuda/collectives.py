"""A backend for torch.distributed that takes mock tensors only, as NCCL takes GPU tensors only, and moves their bytes by gloo.

As under NCCL, a collective's future is complete when the call returns, so what is to follow it runs inline. (Under NCCL the work is then
queued; here it is done.) Messages between two ranks are under way until they are waited for.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tests.mock_cuda.install import device

NAME = "mock_nccl"


class Done(dist.Work):
    """A collective that is over."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._future.set_result(result)

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        return self._future


class Message(dist.Work):
    """A message between two ranks, which keeps its tensors until it is waited for."""

    def __init__(self, work: dist.Work, kept: Any) -> None:
        super().__init__()
        self._work: dist.Work | None = work
        self._kept = kept

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self._work is not None:  # gloo's messages can be waited for once only
            self._work.wait()
            self._work = self._kept = None
        return True

    def is_completed(self) -> bool:
        return self._work is None or self._work.is_completed()


class MockNccl(dist.ProcessGroup):
    """One process group; see the module."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return NAME

    @property
    def group_name(self) -> str:
        """Which torch would ask of the group's backend, but this group has none beside itself."""
        name: str = distributed_c10d._world.pg_names[self]
        return name

    def abort(self) -> None:
        """As NCCL's: nothing is sent or received by this group afterwards."""

    def barrier(self, *arguments: Any) -> dist.Work:
        self._gloo.barrier().wait()
        return Done(None)

    def send(self, tensors: Any, *arguments: Any) -> dist.Work:
        return Message(self._gloo.send(_on_host(tensors, "send"), *arguments), tensors)

    def recv(self, tensors: Any, *arguments: Any) -> dist.Work:
        return Message(self._gloo.recv(_on_host(tensors, "recv"), *arguments), tensors)


def _collective(name: str, of_gloo: str) -> Any:
    def call(self: MockNccl, *arguments: Any, **options: Any) -> dist.Work:
        on_host = [_on_host(value, name) for value in arguments]
        getattr(self._gloo, of_gloo)(*on_host, **options).wait()
        return Done(arguments[0])

    return call


for _name in (
    "allreduce",
    "allgather",
    "_allgather_base",
    "alltoall_base",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "gather",
    "scatter",
):
    setattr(MockNccl, _name, _collective(_name, _name))
for _name, _of_gloo in (("all_gather_single", "_allgather_base"), ("reduce_scatter_single", "_reduce_scatter_base")):
    setattr(MockNccl, _name, _collective(_name, _of_gloo))


def _on_host(value: Any, operation: str) -> Any:
    if isinstance(value, torch.Tensor):
        if not value.is_cuda:
            raise RuntimeError(f"mock nccl: {operation} of a CPU tensor: no backend type associated with device type cpu")
        return device.as_cpu(value.detach())
    if isinstance(value, list):
        return [_on_host(one, operation) for one in value]
    return value


def install_backend() -> None:
    """Have `init_process_group("nccl")` make groups of this backend, which are called "nccl"."""
    dist.Backend.register_backend(NAME, MockNccl, devices=["cuda"])
    torch.cuda.nccl.version = lambda: (2, 0, 0)  # asked for by torch's own log of some collectives
    plain_init, plain_name = dist.init_process_group, dist.get_backend

    def init_process_group(backend: str | None = None, *arguments: Any, **options: Any) -> None:
        options.pop("device_id", None)
        plain_init(NAME if backend in (None, "nccl") else backend, *arguments, **options)

    def get_backend(group: dist.ProcessGroup | None = None) -> str:
        return "nccl" if plain_name(group) == NAME else plain_name(group)

    torch.cuda.nccl.version = lambda: (2, 27, 5)  # c10d notes it of each collective of a group that is called "nccl"
    for module in (dist, distributed_c10d):
        module.init_process_group = init_process_group  # type: ignore[attr-defined]
        module.get_backend = get_backend  # type: ignore[attr-defined]
