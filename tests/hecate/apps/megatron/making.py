"""Make a tiny GPT's sizes, a tokenizer and text on disk, and the configuration of a run with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hecate.config import Config, load_config
from hecate.parallel.cluster.mesh import make_mesh
from hecate.ranks.groups import ExpertGroups, expert_groups, tensor_groups
from hecate.ranks.ranks import Ranks
from testing.byte_tokenizer import build_byte_tokenizer

SHAPE = "{kind: full, hidden: 32, ffn: 48, layers: 2, seq: 32, experts: 4, top_k: 2, query_width: 128, key_value_width: 64}\n"
"""two heads of 64 for queries, one for keys"""
FOUR_HEADS = "{kind: full, hidden: 32, ffn: 48, layers: 2, seq: 32, experts: 4, top_k: 2, query_width: 256, key_value_width: 128}\n"
"""four heads of 64 for queries, two for keys"""
CONFIG = """
model: {{front_end: megatron, name_or_path: {folder}/tiny.yaml, tokenizer: {folder}/tokenizer}}
data: {{train: {folder}/train.jsonl, eval: {folder}/eval.jsonl, seq_len: 32}}
output_dir: {folder}/out
max_steps: 3
micro_batch_size: 2
learning_rate: 1e-2
moe: {{family: full, router_aux_loss_coef: 0.01}}
"""


def require_megatron() -> None:
    """Skip the caller's test, or file, where megatron-core is not installed."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed: it has no wheel for Python 3.14")


def write_parts(folder: Path) -> None:
    require_megatron()
    build_byte_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "tiny.yaml").write_text(SHAPE)
    texts = [f"In the beginning there were {number} sheep and {number * number} wolves." for number in range(40)]
    for name, part in (("train", texts[:-3]), ("eval", texts[-3:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "config.yaml", overrides, claim_output=False)


def ranks_of(rank: int, world: int) -> Ranks:
    """Over the default group. Every rank must call it."""
    group = dist.group.WORLD
    assert group is not None
    return Ranks(rank, world, torch.device("cpu"), ExpertGroups(group, dist.new_group()))


def tensor_ranks_of(rank: int, world: int, tensor: int, shard: int | None = None) -> Ranks:
    """Over the default group, with tensor and sharding groups of so many ranks. Every rank must call it."""
    mesh = make_mesh(world, shard, tensor)
    return Ranks(rank, world, torch.device("cpu"), expert_groups(mesh), tensor=tensor_groups(mesh))
