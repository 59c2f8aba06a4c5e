"""Make a folder for a run that takes a second: a tiny random Llama with a tokenizer of bytes, two tasks of data, and a configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

STEPS = 6
"""of the run that the configuration describes"""

# This is ChatML as in SmolLM2, without its default system message: "<s>role\ncontent<e>\n".
TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '<e>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


def build_byte_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte (ids 0 to 255), <s> (256), and <e> (257), which ends a sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<e>", special=True)])
    return PreTrainedTokenizerFast(**{"tokenizer_object": tokenizer, "eos_token": "<e>", "chat_template": TEMPLATE} | options)


def make_workshop(folder: Path) -> Path:
    """Fill the empty `folder` and return it. The configuration is its config.yaml."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_random_llama(folder / "model", **sizes)
    for task, answer in (("up", str.upper), ("echo", str)):
        for split, first in (("train", 0), ("eval", 200)):
            words = [f"w{number % 13}x{number}" for number in range(first, first + (120 if split == "train" else 6))]
            write_samples(folder / f"{task}.{split}.jsonl", words, answer)
    (folder / "config.yaml").write_text(
        f"""
model: {{name_or_path: {folder}/model, dtype: float32}}
data:
  train: [{{path: {folder}/up.train.jsonl, weight: 2}}, {folder}/echo.train.jsonl]
  eval: [{folder}/up.eval.jsonl, {folder}/echo.eval.jsonl]
  seq_len: 64
output_dir: {folder}/runs/unset
max_steps: {STEPS}
micro_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1e-2
warmup_ratio: 0.2
lora: {{r: 4, alpha: 8.0}}
moe: {{num_experts: 3, top_k: 2, router_aux_loss_coef: 0.01}}
eval: {{on_start: true, generate: true, max_new_tokens: 4, batch_size: 4}}
""",
        encoding="utf-8",
    )
    return folder


def save_random_llama(folder: Path, **sizes: int) -> None:
    """Write a Llama with random weights and a tokenizer of single bytes to `folder`. `sizes` are arguments of LlamaConfig."""
    tokenizer = build_byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), eos_token_id=257, bos_token_id=256, pad_token_id=257, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_random_moe(folder: Path) -> None:
    """Write a Qwen2-MoE of two layers, with five experts and a shared one in each, random weights and the same tokenizer to `folder`."""
    tokenizer = build_byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 5, "num_experts_per_tok": 2, "initializer_range": 0.2}
    ends = {"eos_token_id": 257, "bos_token_id": 256, "pad_token_id": 257}
    config = Qwen2MoeConfig(**sizes, **heads, **ends, vocab_size=len(tokenizer))
    Qwen2MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_samples(path: Path, words: list[str], answer: Callable[[str], str]) -> None:
    """Write a conversation for each word, whose answer is `answer(word)`."""
    turns = [[{"role": "user", "content": word}, {"role": "assistant", "content": answer(word)}] for word in words]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns), encoding="utf-8")
