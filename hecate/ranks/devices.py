"""What ranks say about their devices and machines: read on each rank, and gathered. Plans are made of these values alone."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import torch

from hecate.parallel.cluster.topology_cards import RankDevice
from hecate.ranks.ranks import Ranks

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def gather_devices(ranks: Ranks) -> list[RankDevice]:
    """Return the device of every rank, by rank. Every rank must call it."""
    own = device_of(ranks.device)
    texts = gather_texts(json.dumps([own.node, own.card, own.memory]), ranks)
    return [RankDevice(*json.loads(text)) for text in texts]


def device_of(device: torch.device) -> RankDevice:
    """Return what a rank of this machine on this device says of itself.

    Nothing is allocated on the device, and it need not be the current one.
    """
    if device.type != "cuda":
        return RankDevice(_node_name())
    properties = torch.cuda.get_device_properties(device)
    return RankDevice(_node_name(), properties.name, float(properties.total_memory))


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
