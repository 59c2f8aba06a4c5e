"""The trainings that `same_training` compares, and the tiny models and data that they need.

Every run is a list of settings for `hecate train`, as on its command line, so that both checkouts get the same. This file imports nothing
of either checkout.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks import lost_rank

STEPS = 6
TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '<e>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
SPECIAL = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
SIZES: dict[str, Any] = {
    **SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True, "head_dim": 8},
    "qwen2_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 12},
}
GPT = "{kind: full, hidden: 32, ffn: 48, layers: 2, seq: 32, experts: 4, top_k: 2, query_width: 256, key_value_width: 128}\n"
"""for the Megatron front end: four heads of 64 for queries, two for keys"""
TOPOLOGIES = {
    "slow_devices": "nodes: [{devices: 2, flops: 1e6, memory: 1e9}]\nintra_node: {bandwidth: 1e9, latency: 1e-6}\n",
    "three_slow_devices": "nodes: [{devices: 3, flops: 2e8, memory: 1e9}]\nintra_node: {bandwidth: 1e9, latency: 1e-6}\n",
    "two_slow_nodes": (
        "nodes: [{devices: 2, flops: 1e8, memory: 1e9}, {devices: 2, flops: 1e8, memory: 1e9}]\n"
        "intra_node: {bandwidth: 1e9, latency: 1e-6}\ninter_node: {bandwidth: 1e8, latency: 1e-5}\n"
    ),
    "two_nodes": (
        "nodes: [{devices: 2, flops: 1e9, memory: 1e9}, {devices: 2, flops: 1e9, memory: 1e9}]\n"
        "intra_node: {bandwidth: 1e9, latency: 1e-6}\ninter_node: {bandwidth: 1e7, latency: 1e-5}\n"
    ),
    "unequal": "nodes: [{devices: 3, flops: [1e9, 2e9, 1e9], memory: 1e9}]\nintra_node: {bandwidth: 1e8, latency: 1e-5}\n",
}

Records = list[dict[str, Any]]
"""of metrics.jsonl, with the keys as `same_training.Trained` has them"""


@dataclass(frozen=True)
class Training:
    """A run that both checkouts do."""

    name: str
    settings: tuple[str, ...]
    """KEY=VALUE of `hecate train`; {folder} is that of `make_folder`"""
    quick: bool = False
    """one of the few that tell most"""
    shards: int | None = None
    """files of tensors that its last checkpoint must have"""
    shows: Callable[[Records], bool] | None = None
    """what must have happened, told from its metrics; a run in which it has not is a failed one"""
    resumes_at: int | None = None
    """a step: the run is taken back to its checkpoint once it is through, and goes on from there"""
    loses_rank_at: int | None = None
    """a backward pass, counted from 1, in which its rank 1 is killed"""


def some_expert_is_idle(records: Records) -> bool:
    return any(0 in load for record in records if record["kind"] == "step" for load in record["loads"].values())


def experts_move(records: Records) -> bool:
    return any(record["kind"] == "reshard" and record["experts"] > 0 for record in records)


def plans_are_calibrated(records: Records) -> bool:
    return any(record["calibrations"] > 0 for record in records if record["kind"] == "step")


FULL = ("moe.family=full", "moe.upcycle_noise=0.1", "learning_rate=3e-3")
LORA = ("moe.family=moe_lora", "moe.num_experts=null", "moe.top_k=null")
MEGATRON = (
    "model.front_end=megatron",
    "model.name_or_path={folder}/gpt.yaml",
    "model.tokenizer={folder}/llama",
    "data.train={folder}/text.train.jsonl",
    "data.eval={folder}/text.eval.jsonl",
    "data.seq_len=32",
    "moe.family=full",
    "moe.num_experts=null",
    "moe.top_k=null",
)

RUNS = (
    # LoRA experts over a dense model's FFN
    Training(
        "mixlora-static_ep",
        ("nproc=2", "fssdp.policy=static_ep", "moe.num_experts=[3,5]", "eval.on_start=true", "eval.generate=true"),
        quick=True,
        shards=2,
    ),
    Training(
        "mixlora-hecate-f64",
        ("nproc=3", "model.dtype=float64", "fssdp.policy=hecate_paper", "gradient_checkpointing=true", "topology={folder}/unequal.yaml"),
        shards=3,
    ),
    Training(
        "mixlora-auto-exact",
        (
            "nproc=2",
            "fssdp.policy=auto",
            "fssdp.plan=exact",
            "fssdp.rematerialize=true",
            "fssdp.prefetch=2",
            "topology={folder}/slow_devices.yaml",
        ),
        shards=2,
    ),
    Training(
        "mixlora-one-rank",
        ("nproc=1", "fssdp.policy=full", "moe.num_experts=16", "moe.top_k=1", "micro_batch_size=1", "data.packing=false"),
        shards=1,
        shows=some_expert_is_idle,
    ),
    Training("mixlora-groups", ("nproc=4", "fssdp.shard_size=2", "fssdp.policy=full", "micro_batch_size=1"), shards=2),
    Training(
        "mixlora-two-nodes-f64",
        (
            "nproc=4",
            "model.dtype=float64",
            "fssdp.policy=hecate_paper",
            "moe.num_experts=8",
            "topology={folder}/two_nodes.yaml",
            "fssdp.rematerialize=true",
        ),
        shards=4,
    ),
    Training(
        "mixlora-reshard",
        ("nproc=2", "fssdp.policy=static_ep", "moe.num_experts=3", "fssdp.reshard_interval=2", "topology={folder}/slow_devices.yaml"),
        quick=True,
        shards=2,
        shows=experts_move,
    ),
    Training(
        "mixlora-resumed",
        (
            "nproc=4",
            "fssdp.policy=hecate_paper",
            "moe.num_experts=8",
            "save_steps=2",
            "fssdp.load_window=3",
            "fssdp.memory_slots=2",  # so that each step's plan depends on the loads of those before it
            "topology={folder}/two_slow_nodes.yaml",
        ),
        shards=4,
        resumes_at=2,
    ),
    Training(
        "mixlora-lost-rank",
        (
            "nproc=3",
            "fssdp.redundancy=1",
            "fssdp.policy=hecate_paper",
            "moe.num_experts=6",
            "fssdp.memory_slots=2",
            "topology={folder}/three_slow_devices.yaml",
        ),
        quick=True,
        shards=2,
        loses_rank_at=6,
    ),
    # whole FFNs as experts
    Training(
        "full-static_ep",
        (*FULL, "nproc=2", "fssdp.policy=static_ep", "model.train_non_experts=true", "weight_decay=0.1"),
        shards=2,
    ),
    Training(
        "full-hecate-calibrated-f64",
        (
            *FULL,
            "nproc=3",
            "model.dtype=float64",
            "fssdp.policy=hecate_paper",
            "fssdp.plan=calibrated",
            "fssdp.rematerialize=true",
            "topology={folder}/unequal.yaml",
        ),
        quick=True,
        shards=3,
        shows=plans_are_calibrated,
    ),
    Training(
        "full-two-nodes",
        (
            *FULL,
            "nproc=4",
            "fssdp.policy=full",
            "moe.num_experts=8",
            "gradient_checkpointing=true",
            "micro_batch_size=1",
            "topology={folder}/two_nodes.yaml",
        ),
        shards=4,
    ),
    # LoRA on the experts of an MoE model
    Training(
        "moe_lora-auto",
        (
            *LORA,
            "model.name_or_path={folder}/qwen3_moe",
            "nproc=2",
            "fssdp.policy=auto",
            "model.shard_non_experts=true",
            "moe.train_router=true",
        ),
        quick=True,
        shards=2,
    ),
    Training(
        "moe_lora-calibrated-f64",
        (
            *LORA,
            "model.name_or_path={folder}/mixtral",
            "nproc=3",
            "model.dtype=float64",
            "fssdp.policy=hecate_paper",
            "fssdp.plan=calibrated",
            "fssdp.memory_slots=1",
            "topology={folder}/unequal.yaml",
        ),
        shards=3,
        shows=plans_are_calibrated,
    ),
    Training(
        "moe_lora-exact-groups",
        (
            *LORA,
            "model.name_or_path={folder}/qwen2_moe",
            "nproc=4",
            "fssdp.shard_size=2",
            "fssdp.policy=llep",
            "fssdp.plan=exact",
            "gradient_checkpointing=true",
            "micro_batch_size=1",
        ),
        shards=2,
    ),
    # a GPT of megatron-core, trained from scratch
    Training("megatron", (*MEGATRON, "nproc=2", "fssdp.policy=auto"), shards=2),
    Training(
        "megatron-tensor-parallel-f64",
        (*MEGATRON, "nproc=4", "model.tensor_parallel=2", "model.dtype=float64", "fssdp.policy=hecate_paper", "fssdp.rematerialize=true"),
        shards=4,
    ),
    Training("megatron-own-layers", (*MEGATRON, "nproc=2", "fssdp.policy=megatron_ep"), shards=2),
)


def description() -> str:
    """A digest of all that this file and `lost_rank.py` say: of the runs and of what `make_folder` makes for them."""
    files = (Path(__file__), Path(lost_rank.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def make_folder(folder: Path) -> None:
    """Fill the empty `folder` with the models, data, topologies and the configuration, config.yaml, of all runs."""
    tokenizer = byte_tokenizer()
    for number, (kind, sizes) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **sizes}))
        model.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    (folder / "hooks").mkdir()
    shutil.copy(lost_rank.__file__, folder / "hooks" / "sitecustomize.py")
    (folder / "gpt.yaml").write_text(GPT, encoding="utf-8")
    for name, text in TOPOLOGIES.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    for split, numbers in (("train", range(120)), ("eval", range(200, 206))):
        _write_lines(folder / f"up.{split}.jsonl", (_turns(f"w{n % 13}x{n}", f"W{n % 13}X{n}") for n in numbers))
        _write_lines(folder / f"echo.{split}.jsonl", (_turns(f"v{n % 7}", f"v{n % 7}") for n in numbers))
        _write_lines(
            folder / f"text.{split}.jsonl", ({"text": f"In the beginning there were {n} sheep and {n * n} wolves."} for n in numbers)
        )
    (folder / "description").write_text(description(), encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(_config(folder)), encoding="utf-8")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 0..255), then <s> 256, <e> 257, the end of a sequence; a chat template of those."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<e>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", chat_template=TEMPLATE)


def _config(folder: Path) -> dict[str, Any]:
    return {
        "model": {"name_or_path": f"{folder}/llama", "dtype": "float32"},
        "data": {
            "train": [{"path": f"{folder}/up.train.jsonl", "weight": 2.0}, {"path": f"{folder}/echo.train.jsonl"}],
            "eval": [f"{folder}/up.eval.jsonl"],
            "seq_len": 64,
        },
        "output_dir": f"{folder}/runs/unset",
        "max_steps": STEPS,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.2,
        "lora": {"r": 4, "alpha": 8.0, "dropout": 0.1},
        "moe": {"num_experts": 4, "top_k": 2, "router_aux_loss_coef": 0.01},
        "eval": {"max_new_tokens": 4, "batch_size": 4},
    }


def _turns(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _write_lines(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def environment_of(training: Training, hooks: Path, marker: Path) -> dict[str, str]:
    """What the processes of a run get beside the environment at hand; empty but for a run that loses a rank.

    Args:
        hooks: a folder in which `lost_rank.py` stands as `sitecustomize.py`.
    """
    if training.loses_rank_at is None:
        return {}
    return {"PYTHONPATH": str(hooks), lost_rank.AT: str(training.loses_rank_at), lost_rank.MARKER: str(marker)}
