"""Compare the memory that `hecate plan` predicts with the most bytes of tensors that real trainings hold.

Each case trains a few steps on one rank or two, of a random model in which tensors of tokens and of weights weigh about the same, and whose
rows hold several samples and some padding. What is compared is the fullest rank's largest phase. One prediction knows nothing of the
training: experts' loads are those of the workload that `hecate plan` takes by default. The other has the loads of the training's steps
(`hecate plan --trace`). `benchmarks.memory_rank` says what is measured.
What a plan for GPUs says of the CUDA context and of the allocator's rounding is in neither figure.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import arguments, finish
from hecate.apps.foresee.dry_run import forecast
from hecate.apps.foresee.planned_memory import WORKLOAD
from hecate.config import Config, load_config, to_yaml
from hecate.launch.local_launcher import launch_local
from hecate.model.sizes.memory import BESIDE_TENSORS, PHASES
from hecate.model.sizes.run_shape import run_shape
from hecate.parallel.values.traces import Trace, load_trace
from testing.byte_tokenizer import build_byte_tokenizer

RANK_PROGRAM = "benchmarks.memory_rank"
GOAL = 0.05
"""the largest relative error of a plan"""
_SIZES: dict[str, int] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}
_EXPERTS = {"num_experts": 16, "num_local_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
_FFN = "lora.target_modules=[gate_proj,up_proj,down_proj]"
_LINEAR = ("moe.unit=linear", "moe.router_aux_loss_coef=0")


@dataclass(frozen=True)
class Case:
    """A training."""

    name: str
    ranks: int
    dtype: str
    overrides: tuple[str, ...] = ()
    """{folder} stands for the case's folder"""
    model: str = "llama"
    """the model_type of its config.json"""


CASES = (
    Case("mixlora, auto", 2, "float32"),
    Case("mixlora, full, 2 micro-steps", 2, "bfloat16", ("fssdp.policy=full", "gradient_accumulation_steps=2")),
    Case("mixlora, llava_mole's router, one rank", 1, "float32", (
        "moe.num_experts=3", "moe.top_k=1", "moe.router.bias=learned", "moe.router.weights=one", "moe.router.balance=sample",
        "moe.router_aux_loss_coef=0.01",
    )),
    Case("mixlora, fixed_a, llep, dropout", 2, "bfloat16", ("lora.pairs=fixed_a", "fssdp.policy=llep", "lora.dropout=0.05")),
    Case("mixlora, static_ep", 2, "bfloat16", ("fssdp.policy=static_ep",)),
    Case("mixlora, nola, one rank", 1, "float32", ("lora.pairs=nola", "lora.nola.bases=64", _FFN)),
    Case("mixlora, allora's rule", 2, "bfloat16", (
        "lora.gradient_rule=row_norm", "lora.eta=2.0", "lora.alpha=null", "gradient_accumulation_steps=2",
    )),
    Case("mixlora, two adapters at once", 2, "float32", (
        "data.train=[{{path: {folder}/train.jsonl, name: a}}, {{path: {folder}/train.jsonl, name: b}}]", "moe.router.input=given",
        "moe.num_experts=2", "moe.top_k=1", "moe.router_aux_loss_coef=0", _FFN,
    )),
    Case("linears: mola, hecate_paper", 2, "float32", (
        *_LINEAR, "moe.allocation=[2,4,6,8]", "moe.num_experts=null", "fssdp.policy=hecate_paper",
    )),
    Case("linears: smora, one rank", 1, "bfloat16", (
        *_LINEAR, "lora.r=1", "moe.num_experts=64", "moe.top_k=8", "moe.router.score=sigmoid", "moe.router.bias=balancing",
        "moe.router.bias_in_weights=true", "moe.router.bias_rate=1e-3",
    )),
    Case("linears: mos, 2 micro-steps", 2, "float32", (
        *_LINEAR, "moe.num_experts=1", "moe.top_k=1", "lora.r=4", "lora.pairs=shards", "lora.shards.equivalent_rank=2",
        "lora.shards.per_vector=4", "lora.shards.private_rank=1", "gradient_accumulation_steps=2",
    )),
    Case("linears: reclora, one rank", 1, "float32", (
        *_LINEAR, "lora.target_modules=[q_proj,v_proj]", "moe.num_experts=8", "moe.top_k=null", "moe.router.input=user",
        "moe.router.temperature=5", "data.features={folder}/users.npz",
    )),
    Case("moe_lora, static_ep, recomputed", 2, "bfloat16", (
        "moe.family=moe_lora", "fssdp.policy=static_ep", "gradient_checkpointing=true", "moe.train_router=false",
    ), "qwen3_moe"),
    Case("moe_lora, auto, 4 slots", 2, "float32", ("moe.family=moe_lora", "fssdp.memory_slots=4"), "qwen3_moe"),
    Case("full, auto, rematerialized", 2, "float32", ("moe.family=full", "moe.num_experts=4", "fssdp.rematerialize=true")),
    Case("full, recomputed, one rank", 1, "bfloat16", ("moe.family=full", "moe.num_experts=4", "gradient_checkpointing=true")),
)  # fmt: skip
QUICK = ("mixlora, auto", "full, recomputed, one rank")


def main() -> None:
    options = arguments(__doc__ or "")
    options.add_argument("--only", help="a part of the names of cases")
    given = options.parse_args()
    rows = []
    for case in CASES:
        if (given.quick and case.name not in QUICK) or (given.only and given.only not in case.name):
            continue
        with tempfile.TemporaryDirectory(prefix="hecate-") as folder:
            rows.append(compare(case, Path(folder)))
        print(f"{case.name}: {rows[-1]['error']:+.1%}, with its loads {rows[-1]['error_with_loads']:+.1%}", file=sys.stderr, flush=True)
    summary: dict[str, Any] = {"goal": GOAL}
    for of in ("", "_with_loads"):
        errors = np.abs([row["error" + of] for row in rows])
        summary |= {f"worst_error{of}": float(errors.max()), f"cases_over_the_goal{of}": int((errors > GOAL).sum())}
    finish("memory_plan", rows, summary, given.json)


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Train the case in the empty `folder`, and return what was planned and measured of its fullest rank.

    Raises:
        SystemExit: the training failed.
    """
    path = write_case(case, folder)
    config = load_config(path, claim_output=False)
    planned_D = planned_bytes(config, case.ranks, WORKLOAD)
    if launch_local(RANK_PROGRAM, [f"{folder}/measured", str(path)], case.ranks):
        sys.exit(f"{case.name}: the training failed")
    files = [Path(f"{folder}/measured.{rank}") for rank in range(case.ranks)]
    measured = [json.loads(file.read_text(encoding="utf-8"))["peak_bytes"] for file in files]
    with_loads_D = planned_bytes(config, case.ranks, load_trace(folder / "measured.loads"))
    return {
        "case": case.name,
        "ranks": case.ranks,
        "dtype": case.dtype,
        "planned_mb": float(planned_D.max()) / 1e6,
        "measured_mb": max(measured) / 1e6,
        "error": float(planned_D.max()) / max(measured) - 1,
        "error_with_loads": float(with_loads_D.max()) / max(measured) - 1,
        "planned_bytes": planned_D.tolist(),
        "planned_bytes_with_loads": with_loads_D.tolist(),
        "measured_bytes": measured,
        "overrides": list(case.overrides),
    }


def planned_bytes(config: Config, ranks: int, loads: str | Trace) -> np.ndarray:
    """float64 [ranks]: what tensors are planned to take in each rank's largest phase."""
    one = forecast(run_shape(config, None, ranks), loads).policies[0]
    in_phases = [part.bytes_PD for part in one.memory if part.name not in BESIDE_TENSORS]
    assert all(len(part_PD) == len(PHASES) for part_PD in in_phases)
    return np.asarray(sum(in_phases)).max(0)


def write_case(case: Case, folder: Path) -> Path:
    """Write a random model, data and a configuration; returns the configuration's path."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = _SIZES | (_EXPERTS if case.model != "llama" else {})
    special = {"eos_token_id": 257, "bos_token_id": 256, "pad_token_id": 257}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(case.model, **sizes, **special)).save_pretrained(folder / "model")
    build_byte_tokenizer().save_pretrained(folder / "model")
    np.savez(folder / "users.npz", ids=np.array(["u"]), features=np.ones((1, 64), dtype=np.float32))
    lines = [json.dumps({"text": f"{number} " + "some words " * (1 + number * 7 % 40), "user": "u"}) + "\n" for number in range(1000)]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    path = folder / "config.yaml"
    settings: Sequence[str] = (
        f"model: {{name_or_path: {folder}/model, dtype: {case.dtype}}}",
        f"data: {{train: {folder}/train.jsonl, seq_len: 512, cache: null, on_bad_sample: truncate}}",
        f"output_dir: {folder}/run",
        "max_steps: 10",
        "micro_batch_size: 2",
        "lora: {r: 8, alpha: 16.0, dropout: 0.0}",
    )
    path.write_text("\n".join(settings) + "\n", encoding="utf-8")
    overrides = [override.format(folder=folder) for override in case.overrides]
    path.write_text(to_yaml(load_config(path, overrides, claim_output=False)), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
