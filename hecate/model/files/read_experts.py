"""Reads the weights of one expert straight from their byte ranges into a flat chunk.

Files are read with `pread` and not mapped, because pages of a mapped file count as memory of the process as long as the file is mapped.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from hecate.errors import UserError
from hecate.model.files.stored_experts import LayerExperts, StoredPart

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The types of stored weights, by the name that safetensors has for each."""
_BLOCK = 1 << 22
"""The number of elements that are converted, or copied to another device, at a time."""


def read_expert(layer: LayerExperts, expert: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[3 · hidden · ffn]: gate, up and down of an expert, on the device. Takes little memory beside the result.

    Raises:
        UserError: a file cannot be read.
    """
    chunk = torch.empty(layer.expert_numel, dtype=dtype, device=device)
    start = 0
    for part in layer.parts[expert]:
        _read_into(chunk[start : start + part.numel], part)
        start += part.numel
    return chunk


def _read_into(out: Tensor, part: StoredPart) -> None:
    stored = DTYPES[part.entry.dtype]
    try:
        opened = os.open(part.entry.file, os.O_RDONLY)
        try:
            if out.dtype == stored and out.device.type == "cpu":
                _fill(out, opened, part.offset)
                return
            block = torch.empty(min(_BLOCK, part.numel), dtype=stored)
            for first in range(0, part.numel, _BLOCK):
                piece = block[: min(_BLOCK, part.numel - first)]
                _fill(piece, opened, part.offset + first * stored.itemsize)
                out[first : first + len(piece)].copy_(piece)
        finally:
            os.close(opened)
    except OSError as error:
        raise UserError(f"{part.entry.file}: cannot be read: {error.strerror or error}") from error


def _fill(out: Tensor, opened: int, offset: int) -> None:
    room = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while len(room):
        count = os.preadv(opened, [room], offset)
        if count == 0:
            raise OSError("the file ends too early")
        room, offset = room[count:], offset + count
