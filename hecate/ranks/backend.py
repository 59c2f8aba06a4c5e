"""Which backend of torch.distributed carries a process's collectives, and what NCCL needs besides: options, a first use, one abort for all.

Whether a group is NCCL's is asked of the group (`is_nccl`), never of the device: gloo can carry the tensors of a GPU, too.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from hecate.errors import UserError
from hecate.parallel.comm.aborts import note_abort
from hecate.ranks.launcher_files import COLLECTIVES_VARIABLE, may_share_gpus

_FIRST_USE_LIMIT = timedelta(minutes=2)
"""The longest that the first collective of a group may take, whose ranks have all connected."""
_RECORDED = "128"
"""The number of gloo's collectives that torch keeps in its record, for `hecate.elastic.mismatch_watch`; torch's 2,000 take long to read."""
_POLL_SECONDS = 0.002
_LEAVE_SECONDS, _DONE_KEY = 5.0, "ranks-done"
ABORTING = threading.RLock()
"""A lock that a thread holds while it aborts groups. Leaving groups takes it, too, so that none are made anew during an abort."""


def chosen_backend() -> str:
    """The backend for this process: nccl with a GPU and gloo without, unless HECATE_COLLECTIVES says gloo.

    Raises:
        UserError: HECATE_COLLECTIVES says nccl without a GPU, or anything else.
    """
    asked, cuda = os.environ.get(COLLECTIVES_VARIABLE, ""), torch.cuda.is_available()
    if asked not in ("", "gloo", "nccl"):
        raise UserError(f"{COLLECTIVES_VARIABLE}={asked}: must be gloo or nccl, or not set, which means nccl with a GPU and gloo without")
    if asked == "nccl" and not cuda:
        raise UserError(f"{COLLECTIVES_VARIABLE}=nccl: this process has no GPU, and NCCL needs one; set gloo, or nothing")
    return asked or ("nccl" if cuda else "gloo")


def own_device(backend: str) -> torch.device:
    """The device of this process: the GPU of its LOCAL_RANK, which others may share (`may_share_gpus`), or the CPU without GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", number % torch.cuda.device_count() if may_share_gpus(backend) else number)


def is_nccl(group: dist.ProcessGroup | None = None) -> bool:
    """Whether NCCL carries the collectives of a group, which must not be aborted; None: of the default group."""
    return str(dist.get_backend(group)) == "nccl"


def first_group_options(backend: str, device: torch.device, options: Any) -> dict[str, Any]:
    """Arguments of `init_process_group`. With NCCL the communicators are made at once, not by the first collective of a training step.

    Args:
        options: of `chunk_options` or `plain_options`.
    """
    if backend != "nccl":
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _RECORDED)
        return {}
    # Experts and tokens travel on two communicators at once, and their kernels must begin in the same order on all devices. The hosts call
    # them in the same order, and since 2.26 NCCL keeps that order on the device if it is told to.
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    return {"device_id": device, "pg_options": options}


def chunk_options(backend: str, max_ctas: int | None) -> Any:
    """Options of the group of expert chunks, whose kernels a GPU starts before those of other streams; None: the backend has none.

    Args:
        max_ctas: `fssdp.max_ctas`; None: no limit but NCCL's own.
    """
    if backend != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    if max_ctas is not None:
        options.config.max_ctas = max_ctas
    return options


def plain_options(backend: str) -> Any:
    """Options of every other group; None: the backend has none. A group split from the one of expert chunks would take that one's."""
    return dist.ProcessGroupNCCL.Options() if backend == "nccl" else None


def use_once(groups: Sequence[dist.ProcessGroup], exchanging: Sequence[dist.ProcessGroup], device: torch.device) -> None:
    """Run a tiny collective of each kind that each group has in steps, so that no later one sets up connections in the midst of a step.

    Every rank must call it, with its groups in the same order.

    Args:
        exchanging: those of the groups that have all-to-alls in each step. For these NCCL connects every pair of ranks, which takes
            gigabytes of a GPU's memory; the other groups are spared that.

    Raises:
        DistBackendError: a collective has not ended within two minutes. The groups are unusable then.
    """
    for number, group in enumerate(groups):
        size = dist.get_world_size(group)
        ones = torch.ones(size, dtype=torch.int32, device=device)
        from_each = torch.zeros_like(ones) if group in exchanging else ones.clone()
        if group in exchanging:
            dist.all_to_all_single(from_each, ones, group=group)
        dist.all_reduce(ones, group=group)
        if not _ends(device, _FIRST_USE_LIMIT) or torch.cat([from_each, ones]).tolist() != [1] * size + [size] * size:
            raise dist.DistBackendError(
                f"rank {dist.get_rank()}: the first collectives of its process group {number} of {len(groups)}, with {size} ranks, failed\n"
                f"  or have not ended within {_FIRST_USE_LIMIT.seconds} s\n"
                "  another rank was lost, or NCCL cannot reach one: NCCL_DEBUG=INFO shows which connections it makes"
            )


def forget_groups() -> None:
    """Leave all groups of this process, whatever state they are in. Does nothing where there are none.

    Those of NCCL are aborted, because destroying a group whose peers are lost would wait for them.
    """
    if not dist.is_initialized():
        # Ranks meet under the number of their group, and one that failed to connect has taken a number on this rank alone.
        distributed_c10d._world.group_count = 0
        return
    if is_nccl():
        abort_nccl()
    else:
        dist.destroy_process_group()


def abort_nccl() -> None:
    """Abort all NCCL groups of this process at once, each in a thread of its own.

    The abort of one communicator can wait for the whole device, and so for the kernel of another one that hangs, too. NCCL has a bracket
    for several aborts, but it belongs to a thread, and torch, which opens it, aborts each group in a new one (pytorch#119797, nccl#1013).
    """
    with ABORTING:
        if dist.is_initialized():
            groups = list(distributed_c10d._world.pg_names)
            # Noted before the abort, which lets a waiting read return: what that has read is worthless.
            note_abort(groups)
            threads = [threading.Thread(target=group.abort, name="abort", daemon=True) for group in groups]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            distributed_c10d._abort_process_group()  # torch forgets the groups; their communicators are aborted already


def wait_for_all(store: dist.Store, world_size: int, device: torch.device) -> None:
    """Wait until the devices of all ranks are done with all collectives, or five seconds have passed. Every rank must call it.

    The ranks ask the store and not each other: a rank whose collective has ended does not know that it has ended elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    store.add(_DONE_KEY, 1)
    deadline = time.monotonic() + _LEAVE_SECONDS
    while store.add(_DONE_KEY, 0) < world_size and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _ends(device: torch.device, limit: timedelta) -> bool:
    """Whether a GPU ends within the limit what its current stream was given. It polls an event, because a read would wait for ever."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    deadline = time.monotonic() + limit.total_seconds()
    while not event.query():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
