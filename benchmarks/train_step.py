"""Compare the whole trainer with moe-peft 2.0.2: training steps of MixLoRA on the same small Llama and batch, one rank, one thread.

Each side runs in a process of its own. They hand the machine over to each other after each step (`benchmarks.handover`), and a sample is
one step. Ours has the allocator settings that `hecate train` gives its ranks. The frozen model alone, forward and backward to its
embeddings, takes turns with both, because no trainer of adapters can be faster.
Memory is the growth of resident memory from the imported libraries to the peak of training: model, adapters, moments, activations.
moe-peft recomputes activations by default, so both sides are measured with and without recomputing.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.handover import Worker, take_steps
from benchmarks.peers.venv import peer_python
from benchmarks.ratios import Budget, Ratio, of_times, speedup, until_narrow
from benchmarks.report import arguments, finish
from hecate.launch.local_launcher import RANK_SETTINGS

MODEL = {"hidden": 256, "ffn": 704, "layers": 6, "heads": 4, "vocab": 4096}
BATCH, LENGTH = 4, 256
RANK, ALPHA, EXPERTS, TOP_K, AUX_COEF, LEARNING_RATE = 16, 32, 8, 2, 0.001, 1e-3
SIDES = {
    "moe-peft": (False, False),
    "hecate": (True, False),
    "moe-peft, recomputed": (False, True),
    "hecate, recomputed": (True, True),
}
"""name -> whether it is ours, and whether it recomputes activations; in the order of a round, with what is compared side by side"""
FROZEN = "frozen model"
COMPARED = {
    0.05: {
        "tokens_per_s_over_moe_peft_dropout": ("hecate", "moe-peft"),
        "tokens_per_s_over_moe_peft_recompute": ("hecate, recomputed", "moe-peft, recomputed"),
        # The defaults of both: its trainer always recomputes, ours only on request.
        "tokens_per_s_over_moe_peft_as_shipped": ("hecate", "moe-peft, recomputed"),
    },
    # The fastest setting of both: without recomputing and without dropout, which MoE-PEFT cannot have at 0.
    1e-9: {"tokens_per_s_over_moe_peft": ("hecate", "moe-peft")},
}
"""by dropout: the summary's keys, ours and theirs"""
WARM_UP = 2
"""steps of each side that are not counted"""
ENOUGH = Budget(half_width=0.02, rounds=60)
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


def ours(folder: Path, out: Path, dropout: float, checkpoint: bool) -> None:
    """Run our side, in a process of its own, for as many steps as are asked for."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401 - so that libraries do not count as memory of the training
    from safetensors.torch import load_file

    from hecate.data.batches import Batch
    from hecate.engine.step_plans import EngineConfig
    from hecate.model.causal_head import LanguageModelHead
    from hecate.model.files.load import ModelSource, load_model
    from hecate.model.gated_ffn import find_gated_ffns
    from hecate.model.insert import InsertionPlan, insert_experts
    from hecate.model.layers.checkpointing import checkpoint_activations
    from hecate.optim.adamw import AdamW
    from hecate.optim.optimizer import ExpertOptimizer, LearningRate, Trainables
    from hecate.parallel.cluster.topology import local_topology
    from hecate.parallel.plan.compile_loops import compile_all
    from hecate.parallel.planners import POLICIES
    from hecate.parallel.values.expert_kinds import MIXLORA, LoraShape
    from hecate.ranks.ranks import join_ranks
    from hecate.train.steps.step import StepBatches, StepRules, train_step

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
        losses: list[float] = []

        def step() -> float:
            number = len(losses)
            token = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) + number * BATCH * LENGTH
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
                StepBatches(number=number, micro_batches=[batch], num_labels=BATCH * (LENGTH - 1)),
                StepRules(aux_coef=AUX_COEF, max_grad_norm=None),
            )
            seconds = time.perf_counter() - start
            losses.append(result.loss)
            return seconds

        take_steps(step)
        trainable = sum(p.numel() for p in [*owned.values(), *moe.replicated_parameters().values()])
        found = {"loss": losses, "train_growth_bytes": _peak() - start_bytes, "trainable_parameters": trainable}
    out.write_text(json.dumps(found), encoding="utf-8")


def frozen(folder: Path) -> None:
    """Pass through the frozen model, in a process of its own, as often as is asked for."""
    import torch
    from safetensors.torch import load_file

    from hecate.model.causal_head import LanguageModelHead
    from hecate.model.files.load import ModelSource, load_model

    torch.set_num_threads(1)
    ids = load_file(folder / "batch.safetensors")["input_ids"]
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:]
    position = torch.arange(LENGTH).expand(BATCH, LENGTH)
    model = load_model(ModelSource(folder, None), torch.float32, torch.device("cpu")).eval()
    head = LanguageModelHead(model)
    take_steps(lambda: _base_step(model, head, ids, targets, position))


def _base_step(model: Any, head: Any, ids: Any, targets: Any, position: Any) -> float:
    """Return the seconds of a forward and backward pass through the frozen model."""
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


def our_worker(folder: Path, out: Path, dropout: float, checkpoint: bool) -> Worker:
    command = [sys.executable, "-m", "benchmarks.train_step", "--ours", folder, out, dropout, int(checkpoint)]
    return Worker([str(word) for word in command], RANK_SETTINGS)


def frozen_worker(folder: Path) -> Worker:
    return Worker([sys.executable, "-m", "benchmarks.train_step", "--frozen", str(folder)], RANK_SETTINGS)


def peer_worker(python: Path, folder: Path, out: Path, dropout: float, checkpoint: bool) -> Worker:
    script = Path(__file__).parent / "peers" / "moe_peft_train.py"
    given = {
        "--model": folder, "--batch": folder / "batch.safetensors", "--most-steps": WARM_UP + ENOUGH.rounds, "--threads": 1, "--r": RANK,
        "--alpha": ALPHA, "--experts": EXPERTS, "--top-k": TOP_K, "--aux-coef": AUX_COEF, "--lr": LEARNING_RATE, "--dropout": dropout,
        "--gradient-checkpoint": "recompute" if checkpoint else "none", "--out": out,
    }  # fmt: skip
    return Worker([str(python), "-I", str(script), *(str(word) for pair in given.items() for word in pair)], {})


def train(python: Path, folder: Path, dropout: float, budget: Budget) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Train both sides with and without recomputing, all in turn: the seconds of their steps, and what they say at the end."""
    out = {name: folder / f"{name}.json" for name in SIDES}
    with ExitStack() as stack:
        workers = {FROZEN: stack.enter_context(frozen_worker(folder))}
        for name, (is_ours, recompute) in SIDES.items():
            worker = (
                our_worker(folder, out[name], dropout, recompute) if is_ours else peer_worker(python, folder, out[name], dropout, recompute)
            )
            workers[name] = stack.enter_context(worker)
        for worker in workers.values():
            for _ in range(WARM_UP):
                worker.step()
        seconds = until_narrow(lambda side: workers[side].step(), list(workers), list(COMPARED[dropout].values()), budget)
    said = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in out.items()}
    for mine, peer in (("hecate", "moe-peft"), ("hecate, recomputed", "moe-peft, recomputed")):
        _check(said[mine], said[peer])
    return seconds, said


def _check(mine: dict[str, Any], peer: dict[str, Any]) -> None:
    """Check that both sides train as many parameters and start at the same loss, that of the base model, because B is zero."""
    assert mine["trainable_parameters"] == peer["trainable_parameters"], (mine["trainable_parameters"], peer["trainable_parameters"])
    assert abs(mine["loss"][0] - peer["loss"][0]) < 1e-3, (mine["loss"][0], peer["loss"][0])
    assert mine["loss"][-1] < mine["loss"][0]
    assert peer["loss"][-1] < peer["loss"][0]


def main() -> None:
    if sys.argv[1:2] == ["--ours"]:
        folder, out, dropout, recompute = sys.argv[2:]
        ours(Path(folder), Path(out), float(dropout), recompute == "1")
        return
    if sys.argv[1:2] == ["--frozen"]:
        frozen(Path(sys.argv[2]))
        return
    options = arguments(__doc__ or "").parse_args()
    python = peer_python(*PEER)
    budget = Budget(ENOUGH.half_width, 4) if options.quick else ENOUGH
    rows: list[dict[str, Any]] = []
    summary: dict[str, float | Ratio] = {}
    growth: dict[tuple[str, float], float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        for dropout, compared in COMPARED.items():
            seconds, said = train(python, folder, dropout, budget)
            for side in SIDES:
                growth[side, dropout] = said[side]["train_growth_bytes"] / 1e6
                rows.append(
                    {
                        "side": side,
                        "dropout": dropout,
                        "tokens_per_s": BATCH * LENGTH / statistics.median(seconds[side]),
                        "growth_mb": growth[side, dropout],
                        "first_loss": said[side]["loss"][0],
                        "over_frozen_model": of_times(seconds[side], seconds[FROZEN], budget).value,
                        "step_seconds": seconds[side],
                    }
                )
            summary |= {key: speedup(seconds[mine], seconds[peer], budget) for key, (mine, peer) in compared.items()}
    finish("train_step", rows, {**summary, **memory_ratios(growth)}, options.json)


def memory_ratios(growth: dict[tuple[str, float], float]) -> dict[str, float]:
    """
    Args:
        growth: of each side and dropout.
    """
    drop, plain = COMPARED
    return {
        "peak_memory_over_moe_peft_as_shipped": growth["hecate", drop] / growth["moe-peft, recomputed", drop],
        "peak_memory_over_moe_peft": growth["hecate", plain] / growth["moe-peft", plain],
        "peak_memory_over_moe_peft_recompute": growth["hecate, recomputed", plain] / growth["moe-peft, recomputed", plain],
    }


if __name__ == "__main__":
    main()
