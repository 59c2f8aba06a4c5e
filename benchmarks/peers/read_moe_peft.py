"""Load an adapter with MoE-PEFT, and save one that MoE-PEFT itself has made. Write its logits with each.

    .venv-peers/moe-peft-reads/bin/python -I benchmarks/peers/read_moe_peft.py MODEL ADAPTER OUT.safetensors

Beside OUT, the folder `saved` holds the second adapter, as MoE-PEFT's trainer saves it. This file imports nothing of hecate.
"""

import os
import sys
from pathlib import Path

os.environ |= {"MOE_PEFT_EXECUTOR_TYPE": "CPU", "HF_HUB_OFFLINE": "1"}

import torch
from moe_peft import LLMBatchConfig, LLMModel, LLMModelInput, TrainConfig, adapter_factory  # type: ignore
from moe_peft.trainer import save_adapter_weight  # type: ignore
from safetensors.torch import save_file

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MADE = "saved"


def main() -> None:
    folder, adapter, out = sys.argv[1:]
    model = LLMModel.from_pretrained(folder, device="cpu", attn_impl="eager", load_dtype=torch.float32)
    model.load_adapter(adapter, "loaded")
    logits = {"loaded": logits_of(model, "loaded")}
    config = adapter_factory(
        "MIXLORA",
        MADE,
        r=3,
        lora_alpha=6,
        lora_dropout=1e-9,
        target_modules=LINEARS,
        routing_strategy="mixlora",
        num_experts=3,
        top_k=2,
        act_fn="silu",
    )
    model.init_adapter(config)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.get_adapter_weight_dict(MADE).items():
            if name.endswith("lora_B.weight"):  # as training would: they begin as zeros
                tensor.normal_(0, 0.3, generator=random)
    logits[MADE] = logits_of(model, MADE)
    training = TrainConfig(MADE, num_epochs=1, batch_size=1, micro_batch_size=1, learning_rate=1e-3)
    training.prepare(model.get_adapter_weight_dict(MADE))  # it sets the task, which the file names
    save_adapter_weight(model, training, str(Path(out).parent))
    save_file(logits, out)


def logits_of(model: LLMModel, adapter: str) -> torch.Tensor:
    ids = torch.arange(40, 70)[None]
    inputs = LLMModelInput(
        batch_configs_=[LLMBatchConfig(adapter, 0, 1)], batch_tokens_=ids.tolist(), batch_masks_=[[1] * ids.shape[1]], inference_mode_=True
    )
    with torch.no_grad():
        return model.forward(inputs)[0].logits.float().contiguous()


if __name__ == "__main__":
    main()
