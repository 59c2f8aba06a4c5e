"""A backend for torch.distributed that takes mock tensors only, as NCCL takes GPU tensors only, and moves their bytes by gloo.

As under NCCL, a collective's future is complete when the call returns, so what is to follow it runs inline. (Under NCCL the work is then
queued; here it is done.) Messages between two ranks are under way until they are waited for.

A collective whose peer is lost raises nothing, as under NCCL: its result is garbage, and from then on the host waits in every read of the
device (`wait_while_stuck`) until another thread aborts the groups. One that waits for a living peer waits until the abort. What is called
after the abort raises.
"""

from __future__ import annotations

import ctypes
import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tests.mock_cuda.install import Event, device

NAME, MOCK_GLOO = "mock_nccl", "mock_gloo"
GARBAGE = 0x7F
"""every byte of the result of a collective that has not ended"""
URGENT: dict[str, bool] = {}
"""name of each group that was made in this process -> whether its stream has a high priority"""
DEVICE_IDS: list[torch.device | None] = []
"""`device_id` of each `init_process_group`"""
_stuck: set[MockNccl] = set()
"""groups whose device hangs in a collective"""
_POLL_SECONDS = 0.0005


def wait_while_stuck(kind: str = "", what: str = "") -> None:
    """What the host does when it reads the device: nothing, unless a collective hangs. For `device.observe`."""
    while _stuck:
        time.sleep(_POLL_SECONDS)


class Options:
    """`ProcessGroupNCCL.Options`."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.is_high_priority_stream = is_high_priority_stream
        self.config = SimpleNamespace(max_ctas=None)


class OfNccl:
    """`ProcessGroupNCCL`, as far as its options go."""

    Options = Options


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

    takes_cpu = False
    """whether collectives take tensors of the CPU, too"""

    def __init__(self, given: Any, options: Options | None) -> None:
        super().__init__(given.group_rank, given.group_size)
        URGENT[given.group_id] = options is not None and options.is_high_priority_stream
        self._gloo = dist.ProcessGroupGloo(given.store, given.group_rank, given.group_size, given.timeout)
        self._aborted = threading.Event()

    def getBackendName(self) -> str:
        return NAME

    @property
    def group_name(self) -> str:
        """Which torch would ask of the group's backend, but this group has none beside itself."""
        name: str = distributed_c10d._world.pg_names[self]
        return name

    def abort(self) -> None:
        """As NCCL's: nothing is sent or received by this group afterwards, and the device goes on with garbage.

        It waits for the whole device, and so for kernels of other groups that hang.
        """
        # Destroyed, gloo would wait for the collectives under way.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._gloo))
        self._aborted.set()
        _stuck.discard(self)
        wait_while_stuck()

    def ends(self, work: dist.Work) -> bool:
        """Wait until a collective has ended, its peer is lost, or the group is aborted; True: it has ended."""
        while not work.is_completed():
            if self._aborted.wait(_POLL_SECONDS):
                return False
        try:
            work.wait()
        except RuntimeError:
            if self.takes_cpu:
                raise  # gloo says so
            _stuck.add(self)
            if self._aborted.is_set():
                _stuck.discard(self)
            return False
        return True

    def refuse_if_aborted(self) -> None:
        if self._aborted.is_set():
            raise dist.DistBackendError("mock nccl: communicator was aborted")

    def barrier(self, *arguments: Any) -> dist.Work:
        self.refuse_if_aborted()
        self.ends(self._gloo.barrier())
        return Done(None)

    def send(self, tensors: Any, *arguments: Any) -> dist.Work:
        self.refuse_if_aborted()
        return Message(self._gloo.send(self._of_message(tensors, "send"), *arguments), tensors)

    def recv(self, tensors: Any, *arguments: Any) -> dist.Work:
        self.refuse_if_aborted()
        return Message(self._gloo.recv(self._of_message(tensors, "recv"), *arguments), tensors)

    def _of_message(self, tensors: list[torch.Tensor], operation: str) -> Any:
        return _on_host(tensors, operation, cpu=False)


class MockGloo(MockNccl):
    """gloo of a torch for CUDA: it has collectives for tensors of both devices, and messages for those of the CPU."""

    takes_cpu = True

    def getBackendName(self) -> str:
        return MOCK_GLOO

    def _of_message(self, tensors: list[torch.Tensor], operation: str) -> Any:
        if any(tensor.is_cuda for tensor in tensors):
            raise RuntimeError(f"mock gloo: {operation} of a GPU tensor: bad address")
        return tensors


def _collective(name: str, of_gloo: str) -> Any:
    def call(self: MockNccl, *arguments: Any, **options: Any) -> dist.Work:
        self.refuse_if_aborted()
        on_host = [_on_host(value, name, self.takes_cpu) for value in arguments]
        work = getattr(self._gloo, of_gloo)(*on_host, **options)
        if not self.ends(work):
            # gloo may go on writing, so its tensors must live.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object((work, on_host)))
            _spoil(on_host[0])
        return Done(arguments[0])

    return call


def _sum_and_share(self: MockNccl, output: torch.Tensor, given: torch.Tensor, options: Any = None, **_: Any) -> dist.Work:
    """A reduce-scatter. gloo's own one is never complete before someone waits for it, so `MockNccl.ends` cannot ask whether it is."""
    self.refuse_if_aborted()
    assert options is None or options.reduceOp == dist.ReduceOp.SUM, options.reduceOp
    share, total = _on_host(output, "reduce_scatter", self.takes_cpu), _on_host(given, "reduce_scatter", self.takes_cpu).clone()
    if self.ends(self._gloo.allreduce([total])):
        share.copy_(total.view(self.size(), *share.shape)[self.rank()])
    else:
        _spoil(share)
    return Done(output)


for _name in (
    "allreduce",
    "allgather",
    "_allgather_base",
    "alltoall_base",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "gather",
    "scatter",
):
    setattr(MockNccl, _name, _collective(_name, _name))
MockNccl.all_gather_single = _collective("all_gather_single", "_allgather_base")  # type: ignore[attr-defined]
for _name in ("_reduce_scatter_base", "reduce_scatter_single"):
    setattr(MockNccl, _name, _sum_and_share)


def _on_host(value: Any, operation: str, cpu: bool) -> Any:
    if isinstance(value, torch.Tensor):
        if not value.is_cuda:
            if cpu:
                return value
            raise RuntimeError(f"mock nccl: {operation} of a CPU tensor: no backend type associated with device type cpu")
        return device.as_cpu(value.detach())
    if isinstance(value, list):
        return [_on_host(one, operation, cpu) for one in value]
    return value


def _spoil(tensors: Any) -> None:
    for tensor in tensors if isinstance(tensors, list) else [tensors]:
        if isinstance(tensor, list):
            _spoil(tensor)
        else:
            tensor.view(-1).view(torch.uint8).fill_(GARBAGE)


def install_backend() -> None:
    """Have `init_process_group("nccl")` and `("gloo")` make groups of these backends, which have their names."""
    dist.Backend.register_backend(NAME, MockNccl, extended_api=True, devices=["cuda"])
    dist.Backend.register_backend(MOCK_GLOO, MockGloo, extended_api=True, devices=["cpu", "cuda"])
    mocked = {"nccl": NAME, "gloo": MOCK_GLOO}
    names = {mock: name for name, mock in mocked.items()}
    plain_init, plain_name = dist.init_process_group, dist.get_backend

    def init_process_group(backend: str | None = None, *arguments: Any, **options: Any) -> None:
        DEVICE_IDS.append(options.pop("device_id", None))
        plain_init(mocked[backend or "nccl"], *arguments, **options)

    def split_group(split_ranks: list[list[int]], timeout: timedelta, pg_options: Options) -> dist.ProcessGroup:
        if DEVICE_IDS[-1] is None:
            raise RuntimeError("mock nccl: no device associated with the default group, whose communicator may not exist yet")
        groups = [dist.new_group(ranks, timeout=timeout, pg_options=pg_options) for ranks in split_ranks]
        return next(group for group, ranks in zip(groups, split_ranks, strict=True) if dist.get_rank() in ranks)

    def get_backend(group: dist.ProcessGroup | None = None) -> str:
        return names[plain_name(group)]

    torch.cuda.nccl.version = lambda: (2, 27, 5)  # c10d notes it of each collective of a group that is called "nccl"
    for module in (dist, distributed_c10d):
        module.init_process_group = init_process_group  # type: ignore[attr-defined]
        module.split_group = split_group  # type: ignore[attr-defined]
        module.get_backend = get_backend  # type: ignore[attr-defined]
        module.ProcessGroupNCCL = OfNccl  # type: ignore[attr-defined]
    Event.query = lambda _: not _stuck  # type: ignore[method-assign]
