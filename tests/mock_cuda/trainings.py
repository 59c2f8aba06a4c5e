"""The trainings that mock GPUs and the CPU both do: their settings, and the folder with the models and data that they need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch

from hecate.config.schema import MEGATRON_EP, FssdpConfig
from testing.byte_tokenizer import build_byte_tokenizer
from testing.tiny_run import make_workshop, save_random_llama
from tests.plain_moe_lora import save_tiny

STEPS = 4
QUIET = {
    "model.dtype": "float64",
    "eval.on_start": "false",
    "eval.generate": "false",
    "data.eval": "[]",
    "max_steps": str(STEPS),
    "kernels": "torch",
    "lora.dropout": "0.1",
}
"""what every training has that does not say otherwise; from float64's rounding AdamW makes no difference that can be seen"""
TWO_NODES = (
    "nodes: [{devices: 2, flops: 1e9, memory: 1e9}, {devices: 2, flops: 1e9, memory: 1e9}]\n"
    "intra_node: {bandwidth: 1e9, latency: 1e-6}\ninter_node: {bandwidth: 1e7, latency: 1e-5}\n"
)
ONE_NODE = "nodes: [{devices: 4, flops: 1e9, memory: 1e9}]\nintra_node: {bandwidth: 1e6, latency: 1e-9}\n"
SLOW_DEVICES = "nodes: [{devices: 2, flops: 1e6, memory: 1e9}]\nintra_node: {bandwidth: 1e9, latency: 1e-6}\n"

Settings = tuple[str, ...]
"""KEY=VALUE; {folder} stands for the workshop's folder"""
POLICIES = tuple(name for name in get_type_hints(FssdpConfig)["policy"].__args__ if name != MEGATRON_EP)
FULL = ("moe.family=full", "moe.upcycle_noise=0.1")
MOE_LORA = ("moe.family=moe_lora", "model.name_or_path={folder}/moe", "moe.num_experts=null", "moe.top_k=null")
SMALL = ("micro_batch_size=1", "data.seq_len=40", "gradient_accumulation_steps=1", "model.dtype=float32")
BF16 = ("model.dtype=bfloat16",)
WIDE_HEADS = ("model.name_or_path={folder}/wide",)
"""heads of 16 elements, which flex attention needs"""
EVALUATED = ("eval.on_start=true", "eval.generate=true", "data.eval=[{folder}/up.eval.jsonl]")
STATIC, EVERYWHERE, HECATE = ("fssdp.policy=static_ep",), ("fssdp.policy=full",), ("fssdp.policy=hecate_paper",)
BALANCING = ("moe.router.score=sigmoid", "moe.router.bias=balancing", "moe.router.bias_rate=0.01", "moe.router_aux_loss_coef=0")
SAMPLES = ("moe.router.bias=learned", "moe.router.weights=one", "moe.router.balance=sample", "moe.top_k=1")
GIVEN = (
    *("moe.router.input=given", "moe.num_experts=2", "moe.top_k=1", "moe.router_aux_loss_coef=0"),
    "lora.target_modules=[gate_proj,up_proj,down_proj]",
    *("eval.generate=true", "data.eval=[{{path: {folder}/echo.eval.jsonl, name: echo.train}}]"),
)
LINEAR = ("moe.unit=linear", "moe.num_experts=3", "moe.top_k=2", "lora.target_modules=[q_proj,v_proj,down_proj]")
ROW_NORM = ("lora.gradient_rule=row_norm", "lora.eta=2", "lora.alpha=null", "lora.dropout=0")
FIXED_A, NOLA = ("lora.pairs=fixed_a",), ("lora.pairs=nola", "lora.nola.bases=6")
SHARDS = ("lora.pairs=shards", "lora.r=4", "lora.alpha=8")
USERS = (
    *("moe.router.input=user", "moe.top_k=null", "moe.router_aux_loss_coef=0", "eval.on_start=true"),
    *("data.train=[{folder}/users.train.jsonl]", "data.eval=[{folder}/users.eval.jsonl]", "data.features={folder}/users.npz"),
)
EXACT, CALIBRATED = ("fssdp.plan=exact",), ("fssdp.plan=calibrated",)
FREED = ("fssdp.rematerialize=true", "gradient_checkpointing=true", "fssdp.prefetch=2")
SHARDED = ("model.shard_non_experts=true", "moe.train_router=true")
OVER_LEADERS = ("topology={folder}/two_nodes.yaml", "micro_batch_size=1")
IN_SLICES = ("topology={folder}/one_node.yaml", "micro_batch_size=1", "moe.num_experts=1", "moe.top_k=1")

ONE_RANK: dict[str, Settings] = {
    "mixlora-reference": ("kernels=reference",),
    "mixlora-bf16": BF16,
    "mixlora-padded": ("data.packing=false", "gradient_checkpointing=true"),
    "mixlora-freed-exact": (*FREED, *EXACT),
    "mixlora-evaluated": EVALUATED,
    "mixlora-flex-evaluated": (*WIDE_HEADS, "model.dtype=float32", *EVALUATED),
    "full-evaluated": (*FULL, *EVALUATED),
    "full-bf16": (*FULL, *BF16),
    "full-all-weights": (*FULL, "model.train_non_experts=true", "fssdp.rematerialize=true"),
    "moe_lora-evaluated": (*MOE_LORA, *EVALUATED, "moe.train_router=true"),
    "moe_lora-bf16-freed": (*MOE_LORA, *BF16, *FREED),
    "moe_lora-sharded": (*MOE_LORA, *SHARDED, "gradient_checkpointing=true"),
}
INTERPRETED: dict[str, Settings] = {
    "mixlora": SMALL,
    "full": (*FULL, *SMALL),
    "moe_lora": (*MOE_LORA, *SMALL),
}
"""one rank, with Triton kernels on the mock GPU; they do not compute in float64"""
OF_POLICIES: dict[str, Settings] = {
    f"policy-{policy}": (f"fssdp.policy={policy}", "moe.num_experts=5", "topology={folder}/slow_devices.yaml") for policy in POLICIES
}
"""two ranks"""
TWO_RANKS: dict[str, Settings] = {
    "mixlora-static": (*STATIC, *EVALUATED),
    "mixlora-full-padded": (*EVERYWHERE, "data.packing=false"),
    "mixlora-bf16": (*BF16, *HECATE),
    "mixlora-exact": (*EXACT, "fssdp.policy=auto"),
    "mixlora-calibrated": (*CALIBRATED, *HECATE),
    "mixlora-freed": FREED,
    "mixlora-freed-static": (*FREED, *STATIC),
    "mixlora-moved": (*STATIC, "fssdp.reshard_interval=2", "topology={folder}/slow_devices.yaml"),
    "mixlora-balancing": (*EVERYWHERE, *BALANCING),
    "mixlora-samples": (*EVERYWHERE, *SAMPLES, "gradient_checkpointing=true"),
    "mixlora-given": (*STATIC, *GIVEN),
    "mixlora-row_norm": (*STATIC, *ROW_NORM),
    "mixlora-shards": (*HECATE, *SHARDS),
    "linear-evaluated": (*STATIC, *LINEAR, *EVALUATED),
    "linear-fixed-row_norm": (*STATIC, *LINEAR, *FIXED_A, *ROW_NORM),
    "linear-nola-freed": (*HECATE, *LINEAR, *NOLA, *FREED),
    "linear-shards": (*EVERYWHERE, *LINEAR, *SHARDS),
    "linear-users": (*STATIC, *LINEAR, *USERS),
    "linear-users-products": (*STATIC, *LINEAR, *USERS, "moe.router.mix=products", "gradient_checkpointing=true"),
    "full-static": (*FULL, *STATIC, *EVALUATED),
    "full-exact": (*FULL, *EXACT, "gradient_checkpointing=true"),
    "full-all-weights": (*FULL, *STATIC, "model.train_non_experts=true"),
    "moe_lora-static": (*MOE_LORA, *STATIC, *EVALUATED),
    "moe_lora-calibrated-freed": (*MOE_LORA, *CALIBRATED, *HECATE, *FREED),
    "moe_lora-sharded": (*MOE_LORA, *SHARDED, *EVERYWHERE, "gradient_checkpointing=true"),
}
SIX_LINEARS = {"layers": 6}
"""of two layers the three that `LINEAR` names"""
WAITS_OF_TWO_RANKS: dict[str, dict[str, Any]] = {
    "mixlora-static": {"tokens_travel": True},
    "mixlora-full-padded": {},
    "mixlora-exact": {"plans_by_micro_step": True},
    "mixlora-freed-static": {"tokens_travel": True, "computes_twice": True},
    "mixlora-balancing": {},
    "mixlora-samples": {"computes_twice": True},
    "mixlora-given": {"tokens_travel": True},
    "mixlora-row_norm": {"tokens_travel": True},
    "linear-evaluated": {**SIX_LINEARS, "tokens_travel": True},
    # Ranks that are few in all, without dropout, are multiplied densely, and mixed factors are one pair: the host cuts no products.
    "linear-fixed-row_norm": {**SIX_LINEARS, "tokens_travel": True, "torch_path": False},
    "linear-users": {**SIX_LINEARS, "torch_path": False},
    "linear-shards": SIX_LINEARS,
    "linear-users-products": {**SIX_LINEARS, "tokens_travel": True, "computes_twice": True},
    "full-static": {"tokens_travel": True},
    "full-exact": {"plans_by_micro_step": True, "computes_twice": True},
    "full-all-weights": {"tokens_travel": True},
    "moe_lora-static": {"tokens_travel": True},
    "moe_lora-calibrated-freed": {"tokens_travel": True, "plans_by_micro_step": True, "computes_twice": True},
    "moe_lora-sharded": {"computes_twice": True},
}
"""training -> what `expected_waits` is to know of it"""
THREE_RANKS: dict[str, Settings] = {
    "mixlora-unequal-layers": (*HECATE, "moe.num_experts=[4,5]", "micro_batch_size=1"),
    "mixlora-backups": (*STATIC, "fssdp.redundancy=1", "micro_batch_size=1"),
    "full-calibrated": (*FULL, *CALIBRATED, *HECATE, "micro_batch_size=1"),
    "moe_lora-exact": (*MOE_LORA, *EXACT, *STATIC, "micro_batch_size=1"),
}
FOUR_RANKS: dict[str, Settings] = {
    "mixlora-groups": ("fssdp.shard_size=2", "micro_batch_size=1"),
    "mixlora-backups": ("fssdp.redundancy=1", *STATIC, "micro_batch_size=1"),
    "mixlora-leaders": (*OVER_LEADERS, *EVERYWHERE),
    "mixlora-slices": (*IN_SLICES, *EVERYWHERE),
    "full-leaders-freed": (*FULL, *OVER_LEADERS, *EVERYWHERE, *FREED),
    "full-slices": (*FULL, *IN_SLICES, *EVERYWHERE),
    "moe_lora-slices": (*MOE_LORA, *OVER_LEADERS, *EVERYWHERE),
    "moe_lora-groups-sharded": (*MOE_LORA, *SHARDED, "fssdp.shard_size=2", "micro_batch_size=1"),
}
WAITS_OF_FOUR_RANKS: dict[str, dict[str, Any]] = {
    "mixlora-groups": {"several_groups": True},
    "mixlora-leaders": {},
    "moe_lora-groups-sharded": {"several_groups": True},
}
ROUTES = {"leaders": "two_level", "slices": "sliced"}
"""word in a training's name -> the route that its gathers must have taken"""


def make_folder(folder: Path) -> Path:
    """Fill the empty `folder` with models, data, users, topologies and config.yaml; returns it."""
    make_workshop(folder)
    for split in ("train", "eval"):
        samples = map(json.loads, (folder / f"up.{split}.jsonl").read_text(encoding="utf-8").splitlines())
        lines = [json.dumps(sample | {"user": f"u{number % 3}"}) + "\n" for number, sample in enumerate(samples)]
        (folder / f"users.{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    features = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    np.savez(folder / "users.npz", ids=np.array(["u0", "u1", "u2"]), features=features)
    tokenizer = build_byte_tokenizer()
    ends = {"eos_token_id": 257, "bos_token_id": 256, "pad_token_id": 257}
    save_tiny("qwen3_moe", folder / "moe", torch.float32, vocab_size=len(tokenizer), max_position_embeddings=128, **ends)
    tokenizer.save_pretrained(folder / "moe")
    save_random_llama(
        folder / "wide", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    for name, text in (("two_nodes", TWO_NODES), ("one_node", ONE_NODE), ("slow_devices", SLOW_DEVICES)):
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def overrides(settings: Settings, folder: Path) -> list[str]:
    """A training's settings for `load_config`."""
    changed = QUIET | dict(setting.format(folder=folder).split("=", 1) for setting in settings)
    return [f"{key}={value}" for key, value in changed.items()]
