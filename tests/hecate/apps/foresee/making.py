"""Make a tiny model on disk, a configuration for it, and topologies for calculations by hand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hecate.config import Config, load_config
from hecate.parallel.cluster.topology import Topology
from testing.unit_cases import unit_topology

CONFIG = """
model: {{name_or_path: {folder}/model, dtype: {dtype}}}
data: {{train: {folder}/train.jsonl, seq_len: 16}}
output_dir: {folder}/out
max_steps: 1000
lora: {{r: 2, dropout: 0.0}}
moe: {{num_experts: 4, top_k: 2}}
"""


def write_model(folder: Path, model_type: str = "llama", **changes: Any) -> Any:
    """Save a tiny random model and data below `folder`; returns the model."""
    import torch

    from tests.hecate.model.tiny import tiny

    model = tiny(model_type, torch.float32, **changes)
    model.save_pretrained(folder / "model")
    (folder / "train.jsonl").write_text('{"text": "hello"}\n')
    return model


def config_for(folder: Path, *overrides: str, dtype: str = "float32") -> Config:
    """The configuration of a run with the model of `write_model`."""
    path, mine = folder / "config.yaml", folder / f"config-{os.getpid()}.yaml"
    mine.write_text(CONFIG.format(folder=folder, dtype=dtype))
    mine.replace(path)  # several ranks may do this at once
    return load_config(path, overrides, claim_output=False)


def packed_batch(length: int, vocabulary: int, *, first: int = 0, of_user: bool = False) -> Any:
    """A row of two samples and one token of padding, whose tokens are numbered from `first`."""
    import torch

    from hecate.data.batches import Batch

    half = length // 2
    segments = torch.tensor([[1] * half + [2] * (length - half - 1) + [0]])
    place = torch.arange(length)[None]
    is_token = segments > 0
    tokens = torch.where(is_token, place % vocabulary, 0)
    source = torch.where(is_token, 0, -1)
    return Batch(
        tokens,
        torch.where(is_token, tokens, -100),
        torch.where(is_token, torch.where(place < half, place, place - half), 0),
        segments,
        torch.where(is_token, place + first, -1),
        source,
        source if of_user else None,
    )


def num_bytes(tensors: Iterable[Any]) -> int:
    """Of their storages, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@contextmanager
def saved_for_backward() -> Iterator[dict[int, Any]]:
    """Yield the tensors that autograd keeps in the block, by the addresses of their storages."""
    import torch

    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def slow_node(ranks: int = 2) -> Topology:
    """One FLOP, one byte and one byte of memory per second; no latency."""
    return unit_topology((0,) * ranks, memory_bandwidth=1.0)
