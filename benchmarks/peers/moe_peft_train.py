"""Run MoE-PEFT's side of `benchmarks.train_step`: MixLoRA steps on one fixed batch, in MoE-PEFT's own virtual environment.

    .venv-peers/moe-peft/bin/python -I benchmarks/peers/moe_peft_train.py --model FOLDER --batch FILE.safetensors --out FILE.json

It takes a step for each line of its standard input, and answers with its seconds (`benchmarks.handover`). Each step is one iteration of
`moe_peft.trainer.train`'s loop, through its own functions. Only its dispatcher (tokens as Python lists) is left out, which makes it faster.
This file imports nothing of hecate, whose requirements conflict with this environment's.
"""

import argparse
import json
import os
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Both are read while the libraries are imported. The peer runs on the CPU even where a GPU is present, and never asks a hub.
os.environ["MOE_PEFT_EXECUTOR_TYPE"] = "CPU"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from moe_peft import LLMBatchConfig, LLMModel, LLMModelInput, TrainConfig, adapter_factory, executor  # type: ignore
from moe_peft.trainer import _compute_loss  # type: ignore
from safetensors.torch import load_file

ADAPTER = "bench"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    executor.manual_seed(0)
    _import_the_rest()
    memory = {"start": _status("VmRSS")}
    batch = load_file(args.batch)
    if not bool(batch["attention_mask"].all()):
        raise SystemExit(f"{args.batch}: padding. MoE-PEFT routes padding tokens, so only full rows compare")

    model = LLMModel.from_pretrained(str(args.model), device="cpu", attn_impl="eager", load_dtype=torch.float32)
    _check_rope(args.model, model.config_.rope_theta_)
    memory["loaded"], memory["load_peak"] = _status("VmRSS"), _status("VmHWM")
    model.init_adapter(_adapter_config(args))
    weights = model.get_adapter_weight_dict(ADAPTER)
    trainer = TrainConfig(ADAPTER, num_epochs=1, batch_size=1, micro_batch_size=1, learning_rate=args.lr)
    trainer.prepare(weights)
    trainer.prepare_lr_scheduler(args.most_steps)
    memory["ready"] = _status("VmRSS")

    _forget_peak()
    losses, aux_losses, seconds = [], [], []
    for _ in sys.stdin:
        began = time.perf_counter()
        loss, aux = _step(model, trainer, batch, args.gradient_checkpoint)
        seconds.append(time.perf_counter() - began)
        losses.append(loss)
        aux_losses.append(aux)
        print(f"took {seconds[-1]!r}", flush=True)
    memory["train_peak"] = _status("VmHWM")
    memory["ru_maxrss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    result = {
        "provider": "moe-peft",
        "versions": {name: version(name) for name in ("moe-peft", "transformers", "torch")},
        "settings": {
            **{name: value for name, value in vars(args).items() if not isinstance(value, Path)},
            "dtype": "float32",
            "attention": model.config_.attn_implementation_,
            "optimizer": trainer.optimizer_type,
            "weight_decay": trainer.weight_decay,
            "max_grad_norm": None,
        },
        "trainable_parameters": sum(tensor.numel() for tensor in weights.values() if tensor.requires_grad),
        "tokens_per_step": batch["input_ids"].numel(),
        "step_seconds": seconds,
        "loss": losses,
        "aux_loss": aux_losses,
        "memory_bytes": memory,
        "train_growth_bytes": memory["train_peak"] - memory["start"],
    }
    args.out.write_text(json.dumps(result, indent=1))


def _import_the_rest() -> None:
    """Take an optimizer step without parameters: the first one makes torch import 70 MB, which should not count as the model's."""
    nothing = torch.nn.Parameter(torch.zeros(1))
    nothing.sum().backward()
    torch.optim.AdamW([nothing]).step()


def _check_rope(folder: Path, theta_read: float) -> None:
    """Refuse a configuration with `rope_parameters` only: transformers 5 writes it, and this environment's transformers ignores it."""
    rope = json.loads((folder / "config.json").read_text()).get("rope_parameters")
    if rope and (rope.get("rope_type", "default") != "default" or rope["rope_theta"] != theta_read):
        raise SystemExit(f"{folder}/config.json: {rope} is read as theta {theta_read}. Add the keys rope_theta and rope_scaling")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Llama folder: config.json and safetensors")
    parser.add_argument("--batch", type=Path, required=True, help="input_ids, labels (-100: none), attention_mask, each [B, S]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--most-steps", type=int, default=1000, help="for its learning rate schedule")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--aux-coef", type=float, default=0.001)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.05, help="MoE-PEFT refuses 0.0; 1e-9 drops nothing, at the same cost")
    parser.add_argument(
        "--gradient-checkpoint",
        choices=["recompute", "none"],
        default="recompute",
        help="recompute is what its trainer always does, a decoder layer at a time; none is its faster setting",
    )
    return parser.parse_args()


def _adapter_config(args: argparse.Namespace) -> Any:
    return adapter_factory(
        "MIXLORA",
        ADAPTER,
        r=args.r,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules=LINEARS,
        routing_strategy="mixlora",
        num_experts=args.experts,
        top_k=args.top_k,
        router_aux_loss_coef=args.aux_coef,
    )


def _step(model: Any, trainer: Any, batch: dict[str, torch.Tensor], gradient_checkpoint: str) -> tuple[float, float]:
    """One optimizer step as `moe_peft.trainer.train` takes it (no clipping); returns the loss and the scaled aux loss."""
    # The forward pass empties its input, so each step needs a new one.
    inputs = LLMModelInput(
        batch_configs_=[LLMBatchConfig(ADAPTER, 0, len(batch["input_ids"]))],
        batch_tokens_=batch["input_ids"],
        batch_labels_=batch["labels"],
        batch_masks_=batch["attention_mask"],
        gradient_checkpoint_=gradient_checkpoint,
        efficient_operator_=True,
    )
    outputs = model.forward(inputs)
    _compute_loss({ADAPTER: trainer}, outputs).backward()
    trainer.step()
    return outputs[0].loss.item(), outputs[0].aux_loss.item()


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status. Unlike ru_maxrss, VmHWM does not begin at the peak of the process that started us."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _forget_peak() -> None:
    """Set VmHWM back to VmRSS, so that the peak of loading does not hide that of training."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
