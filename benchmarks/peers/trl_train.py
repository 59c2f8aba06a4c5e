"""A rank of TRL's side of `benchmarks.beside_trl`: SFTTrainer over a PEFT adapter, DistributedDataParallel on gloo. Run by TRL's python.

It answers as `benchmarks.handover.take_steps` does: a step lasts from a line of the standard input to the end of the optimizer's step, so
that reading the batch, the pass, the exchange of gradients and the optimizer are in it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class _Turns(TrainerCallback):
    """Waits for a line before each step, and answers with the step's processor seconds; the first one's are those since the process has
    begun. The training stops where the input ends."""

    def __init__(self) -> None:
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._wait(control)
        self._started = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        print(f"took {time.process_time() - self._started!r}", flush=True)
        self._wait(control)

    def _wait(self, control: Any) -> None:
        control.should_training_stop = not sys.stdin.readline()
        self._started = time.process_time()


def main() -> None:
    folder, setting = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(setting["model"], dtype=torch.float32, attn_implementation="sdpa")
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=setting["length"],
        per_device_train_batch_size=setting["rows"],
        learning_rate=setting["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=100_000,
        bf16=False,
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
        # Both sides keep activations: recomputing them, which is TRL's default, would cost it a third of a step.
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=load_dataset("json", data_files=str(folder / "train.jsonl"), split="train", cache_dir=str(folder / "cache")),
        processing_class=AutoTokenizer.from_pretrained(setting["model"]),
        callbacks=[_Turns()],
    )
    trainer.train()
    if trainer.args.process_index == 0:
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        (folder / "trl.json").write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    main()
