"""Make what most examples train: a random model of two layers, and two tasks of short words. Nothing is downloaded.

    python -m examples.tiny_inputs data/examples/sweep --model llama

In the folder are then the model, in `model`, and `up.train.jsonl`, `up.eval.jsonl`, `echo.train.jsonl` and `echo.eval.jsonl`: `up` asks
for a word in capitals, and `echo` for the word itself. What is trained learns the form of the answers, not the tasks: the frozen model
knows nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from testing.byte_tokenizer import build_byte_tokenizer
from testing.tiny_run import write_samples

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 16},
}


def save_model(kind: str, folder: Path) -> None:
    """Write a model with random weights, and a tokenizer of single bytes."""
    torch.manual_seed(0)
    tokenizer = build_byte_tokenizer()
    ends = {"vocab_size": len(tokenizer), "eos_token_id": 257, "bos_token_id": 256, "pad_token_id": 257, "tie_word_embeddings": True}
    config = AutoConfig.for_model(kind, **SIZES, **MODELS[kind], **ends)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--model", choices=MODELS, required=True)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    save_model(given.model, given.folder / "model")
    for task, answer in (("up", str.upper), ("echo", str)):
        for split, numbers in (("train", range(400)), ("eval", range(1000, 1040))):
            write_samples(given.folder / f"{task}.{split}.jsonl", [f"w{number % 13}x{number}" for number in numbers], answer)


if __name__ == "__main__":
    main()
