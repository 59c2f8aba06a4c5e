"""Small checkpoints with known contents for the tests beside this file."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hecate.checkpoint import read_manifest
from hecate.checkpoint.manifest import COMMIT, MANIFEST, commit_line
from hecate.checkpoint.save import checkpoint_folder, commit, staging_folder, write_shard
from hecate.checkpoint.shard import read_tensors
from hecate.checkpoint.write_thread import WriteThread
from hecate.io.strict_json import dump_json, parse_json

META = {"config": "abc", "data": {"position": 12, "rng": [1, 2.5, None, True]}, "loads": [[1, 0], [3, 4]]}


def shards_of(value: float, world_size: int = 2) -> list[dict[str, Tensor]]:
    """Per rank: two tensors whose elements all tell `value` and the rank."""
    return [
        {
            f"expert.{rank}.master": torch.full((3, 5), value + rank),
            f"expert.{rank}.step": torch.full((), int(value), dtype=torch.int64),
        }
        for rank in range(world_size)
    ]


def save(
    root: Path, step: int, shards: list[dict[str, Tensor]], nonce: str = "a", meta: dict[str, Any] = META, *, in_threads: bool = False
) -> Path:
    staging, final = staging_folder(root, step, nonce), checkpoint_folder(root, step)
    for rank, tensors in enumerate(shards):
        write = partial(write_shard, staging, rank, len(shards), tensors)
        if in_threads:
            WriteThread(write).wait()
        else:
            write()
    commit(staging, final, meta, len(shards))
    return final


def load(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder, read_manifest(folder))


def holds(folder: Path, shards: list[dict[str, Tensor]]) -> bool:
    """Whether the checkpoint's tensors are those of `shards`: all of them, bit for bit, and no other."""
    found = load(folder)
    wanted = {name: tensor for shard in shards for name, tensor in shard.items()}
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def flip_last_bit(file: Path) -> None:
    """Damage the last tensor of a file of tensors, and nothing that its size or its header tells."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def rewrite_manifest(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Give the folder the manifest that `change` makes of its JSON value (in place, or returned), and its COMMIT."""
    value = parse_json((folder / MANIFEST).read_bytes())
    changed = change(value)
    data = changed if isinstance(changed, bytes) else dump_json(value if changed is None else changed)
    (folder / MANIFEST).write_bytes(data)
    (folder / COMMIT).write_bytes(commit_line(data))
