"""Make a folder with a small run that mostly computes: a random Llama of a few million parameters, and short conversations."""

from __future__ import annotations

import json
from pathlib import Path

from testing.tiny_run import save_random_llama


def make_folder(folder: Path, *, hidden: int = 256, ffn: int = 688, layers: int = 4, seq_len: int = 128) -> Path:
    """Fill the empty `folder` and return the path of its configuration. A step has six sequences for each rank.

    Args:
        hidden, ffn: the model's sizes; attention heads have 32 numbers.
        seq_len: tokens of a sequence, in which samples are packed.
    """
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64}
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, **heads}
    save_random_llama(folder / "model", **sizes)
    turns = [
        [{"role": "user", "content": f"w{n % 13}x{n}" * 4}, {"role": "assistant", "content": f"W{n % 13}X{n}" * 4}] for n in range(600)
    ]
    lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in turns)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    path = folder / "config.yaml"
    path.write_text(
        f"model: {{name_or_path: {folder}/model, dtype: float32}}\n"
        f"data: {{train: {folder}/train.jsonl, seq_len: {seq_len}}}\n"
        f"output_dir: {folder}/runs/unset\n"
        "max_steps: 100000\nmicro_batch_size: 6\nlora: {r: 8, alpha: 16.0}\nmoe: {num_experts: 8, top_k: 2}\n",
        encoding="utf-8",
    )
    return path
