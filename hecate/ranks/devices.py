"""What ranks say about their devices and machines: read on each rank, and gathered. Plans are made of these values alone."""

from __future__ import annotations

import json
import socket
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from hecate.parallel.cluster.gpu_memory import CONTEXT_BYTES, nccl_bytes
from hecate.parallel.cluster.mesh import Mesh
from hecate.parallel.cluster.topology import nodes_of_hosts
from hecate.parallel.cluster.topology_cards import RankDevice
from hecate.ranks.ranks import Ranks

_STEP = 256 * 2**20
"""The bytes of which a device's memory is told as a multiple: a little more or less must not change the plans of a run that goes on."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def gather_devices(ranks: Ranks) -> list[RankDevice]:
    """Return the device of every rank, by rank. Every rank must call it.

    A GPU's memory is what the rank's tensors can have, and the forecast's estimates of what else the rank has taken already
    (`hecate.parallel.cluster.gpu_memory`), which the forecast is going to subtract. So what other programs have taken is no part of it.
    """
    texts = gather_texts(json.dumps([_node_name(), *_gpu(ranks.device)]), ranks)
    rows = [tuple(json.loads(text)) for text in texts]
    node_of_rank = nodes_of_hosts([node for node, *_ in rows])
    mesh = Mesh(ranks.world_size, dist.get_world_size(ranks.groups.experts), ranks.tp_size)
    taken_D = CONTEXT_BYTES + nccl_bytes(mesh, node_of_rank, sharded_layers=ranks.layers is not None)
    sharing = Counter((node, number) for node, _, number, _, _ in rows)
    memory = [
        (free / sharing[node, number] + own + taken) // _STEP * _STEP
        for (node, _, number, free, own), taken in zip(rows, taken_D.tolist(), strict=True)
    ]
    return [RankDevice(node, card, memory[rank] if card else None) for rank, (node, card, *_) in enumerate(rows)]


def _gpu(device: torch.device) -> tuple[str | None, int, int, int]:
    """(name, number, bytes free, bytes that this process's tensors have or torch keeps for them) of a GPU; (None, 0, 0, 0) of a CPU."""
    if device.type != "cuda":
        return None, 0, 0, 0
    free, _ = torch.cuda.mem_get_info(device)
    return torch.cuda.get_device_properties(device).name, device.index, free, torch.cuda.memory_reserved(device)


def gather_texts(text: str, ranks: Ranks) -> list[str]:
    """Return every rank's text, by rank. Every rank must call it."""
    own = text.encode()
    longest = int(ranks.all_max(len(own)))
    # JSON and names have no zero bytes, so these can fill up the shorter texts.
    rows = ranks.all_gather(torch.tensor(list(own.ljust(longest, b"\0")), dtype=torch.uint8))
    return [bytes(row).rstrip(b"\0").decode() for row in rows.tolist()]


def _node_name() -> str:
    """Return the name of this machine by which NCCL, too, tells nodes: some machines of a cluster may all be called localhost."""
    try:
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}".rstrip()
