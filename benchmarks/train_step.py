"""Compare the whole trainer with moe-peft 2.0.2: training steps of MixLoRA on the same small Llama and batch, one rank, one thread.

Each side runs in processes of its own, alternating, and a sample is one step. Ours has the allocator settings that `hecate train` gives
its ranks. The frozen model alone, forward and backward to its embeddings, is timed as well, because no trainer of adapters can be faster.
Memory is the growth of resident memory from the imported libraries to the peak of training: model, adapters, moments, activations.
moe-peft recomputes activations by default, so both sides are measured with and without recomputing.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.venv import peer_python
from benchmarks.report import arguments, finish
from hecate.launch.local_launcher import ALLOCATOR_SETTINGS

MODEL = {"hidden": 256, "ffn": 704, "layers": 6, "heads": 4, "vocab": 4096}
BATCH, LENGTH = 4, 256
RANK, ALPHA, EXPERTS, TOP_K, AUX_COEF, LEARNING_RATE = 16, 32, 8, 2, 0.001, 1e-3
DROPOUTS = (1e-9, 0.05)
PEER = ("moe-peft", ["torch", "transformers>=4.44,<4.47", "accelerate", "datasets", "evaluate"], ["moe-peft==2.0.2"])


def make_inputs(folder: Path) -> None:
    """Write a random Llama and one batch without padding to disk, for both sides."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=MODEL["hidden"],
        intermediate_size=MODEL["ffn"],
        num_hidden_layers=MODEL["layers"],
        num_attention_heads=MODEL["heads"],
        num_key_value_heads=MODEL["heads"],
        vocab_size=MODEL["vocab"],
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written["rope_theta"] = 10000.0  # transformers 4 does not read the key that transformers 5 writes
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    ids = torch.randint(0, MODEL["vocab"], (BATCH, LENGTH))
    save_file({"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}, folder / "batch.safetensors")


def ours(folder: Path, out: Path, steps: int, warmup: int, dropout: float, checkpoint: bool) -> None:
    """Run our side, in a process of its own."""
    import time

    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401 - so that libraries do not count as memory of the training
    from safetensors.torch import load_file

    from hecate.data.batches import Batch
    from hecate.engine.step_plans import EngineConfig
    from hecate.model.causal_head import LanguageModelHead
    from hecate.model.checkpointing import checkpoint_activations
    from hecate.model.gated_ffn import find_gated_ffns
    from hecate.model.insert import InsertionPlan, insert_experts
    from hecate.model.load import ModelSource, load_model
    from hecate.optim.adamw import AdamW
    from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables
    from hecate.parallel.compile_loops import compile_all
    from hecate.parallel.expert_kinds import MIXLORA, LoraShape
    from hecate.parallel.planners import POLICIES
    from hecate.parallel.topology import local_topology
    from hecate.ranks.ranks import join_ranks
    from hecate.train.step import StepRules, train_step

    torch.set_num_threads(1)
    ids = load_file(folder / "batch.safetensors")["input_ids"]
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:]
    position = torch.arange(LENGTH).expand(BATCH, LENGTH)
    with join_ranks() as ranks:
        torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports what the first optimizer of a process imports
        compile_all()  # imports what the first machine code of a process imports
        start_bytes = _resident()
        model = load_model(ModelSource(folder, None), torch.float32, ranks.device).eval()
        head = LanguageModelHead(model)
        _reset_peak()
        plan = InsertionPlan(
            kind=MIXLORA,
            experts_per_layer=(EXPERTS,) * MODEL["layers"],
            top_k=TOP_K,
            lora=LoraShape(RANK, ALPHA / RANK, dropout if dropout > 1e-6 else 0.0),
            target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            seed=0,
        )
        moe = insert_experts(
            model, find_gated_ffns(model), plan, EngineConfig(POLICIES["hecate_paper"], local_topology(1, cuda=False)), ranks.groups
        )
        if checkpoint:
            checkpoint_activations(moe)
        owned = {f"{unit}.{expert}": p for (unit, expert), p in moe.engine.shards.named_parameters().items()}
        optimizer = ExpertOptimizer(
            Trainables(owned, moe.replicated_parameters()),
            AdamW(weight_decay=0.01),
            LearningRate(LEARNING_RATE),
            torch.device("cpu"),
        )
        seconds, losses = [], []
        for step in range(steps + warmup):
            token = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) + step * BATCH * LENGTH
            batch = Batch(
                input_ids=ids,
                targets=targets,
                position_ids=position,
                segment_ids=torch.ones_like(ids),
                token_ids=token,
                task=torch.zeros_like(ids),
            )
            start = time.perf_counter()
            result = train_step(
                moe,
                head,
                optimizer,
                [batch],
                num_labels=BATCH * (LENGTH - 1),
                step=step,
                rules=StepRules(aux_coef=AUX_COEF, max_grad_norm=None),
            )
            if step >= warmup:
                seconds.append(time.perf_counter() - start)
            losses.append(result.loss)
        peak_bytes = _peak()
        base = load_model(ModelSource(folder, None), torch.float32, ranks.device).eval()
        base_head = LanguageModelHead(base)
        base_seconds = [_base_step(base, base_head, ids, targets, position) for _ in range(steps + warmup)][warmup:]
        trainable = sum(p.numel() for p in [*owned.values(), *moe.replicated_parameters().values()])
    out.write_text(
        json.dumps(
            {
                "step_seconds": seconds,
                "base_seconds": base_seconds,
                "loss": losses,
                "train_growth_bytes": peak_bytes - start_bytes,
                "trainable_parameters": trainable,
            }
        ),
        encoding="utf-8",
    )


def _base_step(model: Any, head: Any, ids: Any, targets: Any, position: Any) -> float:
    """Return the seconds of a forward and backward pass through the frozen model."""
    import time

    hook = model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    start = time.perf_counter()
    hidden_BSD = head.hidden(ids, None, position)
    head.loss_sum(hidden_BSD[targets != -100], targets[targets != -100]).backward()
    seconds = time.perf_counter() - start
    hook.remove()
    return seconds


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def run_ours(folder: Path, steps: int, warmup: int, dropout: float, checkpoint: bool) -> dict[str, Any]:
    out = folder / "ours.json"
    command = [sys.executable, "-m", "benchmarks.train_step", "--ours", str(folder), str(out), str(steps), str(warmup), str(dropout)]
    return _run([*command, str(int(checkpoint))], out, ALLOCATOR_SETTINGS)


def run_peer(python: Path, folder: Path, steps: int, warmup: int, dropout: float, checkpoint: bool) -> dict[str, Any]:
    out = folder / "peer.json"
    script = Path(__file__).parent / "peers" / "moe_peft_train.py"
    given = {
        "--model": folder, "--batch": folder / "batch.safetensors", "--steps": steps, "--warmup": warmup, "--threads": 1, "--r": RANK,
        "--alpha": ALPHA, "--experts": EXPERTS, "--top-k": TOP_K, "--aux-coef": AUX_COEF, "--lr": LEARNING_RATE, "--dropout": dropout,
        "--gradient-checkpoint": "recompute" if checkpoint else "none", "--out": out,
    }  # fmt: skip
    return _run([str(python), "-I", str(script), *(str(word) for pair in given.items() for word in pair)], out, {})


def _run(command: list[str], out: Path, settings: dict[str, str]) -> dict[str, Any]:
    environment = {**os.environ, **settings, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return result


def main() -> None:
    if sys.argv[1:2] == ["--ours"]:
        folder, out, steps, warmup, dropout, checkpoint = sys.argv[2:]
        ours(Path(folder), Path(out), int(steps), int(warmup), float(dropout), checkpoint == "1")
        return
    options = arguments(__doc__ or "").parse_args()
    python = peer_python(*PEER)
    rounds, steps, warmup = (1, 3, 1) if options.quick else (2, 8, 2)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        for dropout in DROPOUTS:
            for checkpoint in (False, True):
                seconds: dict[str, list[float]] = {"hecate": [], "moe-peft": []}
                base_seconds: list[float] = []
                last: dict[str, dict[str, Any]] = {}
                for _ in range(rounds):
                    last["hecate"] = run_ours(folder, steps, warmup, dropout, checkpoint)
                    last["moe-peft"] = run_peer(python, folder, steps, warmup, dropout, checkpoint)
                    base_seconds += last["hecate"]["base_seconds"]
                    for side, result in last.items():
                        seconds[side] += result["step_seconds"]
                _check(last)
                rows += [
                    {
                        "side": side,
                        "dropout": dropout,
                        "recompute": checkpoint,
                        "tokens_per_s": BATCH * LENGTH / statistics.median(seconds[side]),
                        "growth_mb": last[side]["train_growth_bytes"] / 1e6,
                        "first_loss": last[side]["loss"][0],
                        "over_frozen_model": statistics.median(seconds[side]) / statistics.median(base_seconds),
                        "step_seconds": seconds[side],
                    }
                    for side in seconds
                ]
    find = {(row["side"], row["dropout"], row["recompute"]): row for row in rows}
    plain, drop = DROPOUTS
    summary = {
        # The fastest setting of both: without recomputing and without dropout.
        "tokens_per_s_over_moe_peft": find["hecate", plain, False]["tokens_per_s"] / find["moe-peft", plain, False]["tokens_per_s"],
        "tokens_per_s_over_moe_peft_dropout": find["hecate", drop, False]["tokens_per_s"] / find["moe-peft", drop, False]["tokens_per_s"],
        "tokens_per_s_over_moe_peft_recompute": find["hecate", drop, True]["tokens_per_s"] / find["moe-peft", drop, True]["tokens_per_s"],
        # The defaults of both: its trainer always recomputes, ours only on request.
        "tokens_per_s_over_moe_peft_as_shipped": find["hecate", drop, False]["tokens_per_s"] / find["moe-peft", drop, True]["tokens_per_s"],
        "peak_memory_over_moe_peft_as_shipped": find["hecate", drop, False]["growth_mb"] / find["moe-peft", drop, True]["growth_mb"],
        "peak_memory_over_moe_peft": find["hecate", plain, False]["growth_mb"] / find["moe-peft", plain, False]["growth_mb"],
        "peak_memory_over_moe_peft_recompute": find["hecate", plain, True]["growth_mb"] / find["moe-peft", plain, True]["growth_mb"],
    }
    finish("train_step", rows, summary, options.json)


def _check(last: dict[str, dict[str, Any]]) -> None:
    """Check that both sides train as many parameters and start at the same loss, that of the base model, because B is zero."""
    mine, peer = last["hecate"], last["moe-peft"]
    assert mine["trainable_parameters"] == peer["trainable_parameters"], (mine["trainable_parameters"], peer["trainable_parameters"])
    assert abs(mine["loss"][0] - peer["loss"][0]) < 1e-3, (mine["loss"][0], peer["loss"][0])
    assert mine["loss"][-1] < mine["loss"][0]
    assert peer["loss"][-1] < peer["loss"][0]


if __name__ == "__main__":
    main()
