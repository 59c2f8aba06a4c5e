"""Normalise an adapter with SGLang's own functions and write what they make of it, as one product s B A for each weight.

    .venv-peers/sglang/bin/python -I benchmarks/peers/read_sglang.py MODEL ADAPTER OUT.safetensors

SGLang's `LoRAConfig` and `LoRAAdapter` read the configuration, give weights to layers, rename and stack them. `get_target_module_name` must
know each of them, as its memory pool asks. Buffers and kernels need a GPU: they are left out. This file imports nothing of hecate.
"""

import os
import re
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

from safetensors.torch import load_file, save_file
from sglang.srt.configs.load_config import LoadConfig  # type: ignore
from sglang.srt.lora.lora import LoRAAdapter  # type: ignore
from sglang.srt.lora.lora_config import LoRAConfig  # type: ignore
from sglang.srt.lora.utils import _KNOWN_LORA_TARGET_MODULES, get_normalized_target_modules, get_target_module_name  # type: ignore
from transformers import AutoConfig

# What its memory pool takes for a tensor of an expert.
EXPERT = re.compile(r"experts\.(\d+)\.")


def main() -> None:
    model, adapter, out = sys.argv[1:]
    config = LoRAConfig(adapter)
    targets = get_normalized_target_modules(config.target_modules)
    if unknown := targets - _KNOWN_LORA_TARGET_MODULES:
        raise SystemExit(f"SGLang supports no LoRA of the modules {sorted(unknown)}")
    base = AutoConfig.from_pretrained(model)
    loaded = LoRAAdapter("adapter", config, base, LoadConfig(), None)
    loaded.initialize_weights_from_tensors(load_file(f"{adapter}/adapter_model.safetensors"))
    found = {}
    for layer, weights in enumerate(loaded.layers):
        for name, b in weights.weights.items():
            if ".lora_B." not in name:
                continue
            a, b = weights.weights[name.replace(".lora_B.", ".lora_A.")], loaded.scaling * b
            target, expert = get_target_module_name(name, targets), EXPERT.search(name)
            end = f".{expert[1]}" if expert else ""
            if target == "gate_up_proj":
                parts = ["gate_proj", "up_proj"]
                halves = zip(parts, b.chunk(2), a.chunk(2), strict=True)
                found |= {f"{layer}.{part}{end}": half_b @ half_a for part, half_b, half_a in halves}
            elif target == "qkv_proj":
                width = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
                heads, kv = base.num_attention_heads * width, base.num_key_value_heads * width
                thirds = zip("qkv", b.split([heads, kv, kv]), a.chunk(3), strict=True)
                found |= {f"{layer}.{one}_proj": third_b @ third_a for one, third_b, third_a in thirds}
            else:
                found[f"{layer}.{target}{end}"] = b @ a
    save_file({name: one.contiguous() for name, one in found.items()}, out)


if __name__ == "__main__":
    main()
