"""Load an adapter with vLLM's own LoRA manager and write what arrives in its buffers, as one product s B A for each weight.

    .venv-peers/vllm/bin/python -I benchmarks/peers/read_vllm.py MODEL ADAPTER OUT.safetensors

vLLM makes its own model of the folder, which says what it expects of an adapter; `WorkerLoRAManager.add_adapter` checks, loads, packs and
copies it. vLLM has no CPU kernel of experts with LoRA, so that two methods of `FusedMoEWithLoRA` that look for kernels are passed over:
`__init__`, of which the plain values are set, and `set_mapping`. No token is computed. This file imports nothing of hecate.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "GLOO_SOCKET_IFNAME": "lo"}

import torch
from safetensors.torch import save_file
from vllm.config import set_current_vllm_config  # type: ignore
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # type: ignore
from vllm.engine.arg_utils import EngineArgs  # type: ignore
from vllm.lora.layers import FusedMoEWithLoRA  # type: ignore
from vllm.lora.layers.base import BaseLayerWithLoRA  # type: ignore
from vllm.lora.request import LoRARequest  # type: ignore
from vllm.lora.worker_manager import WorkerLoRAManager  # type: ignore
from vllm.model_executor.model_loader.utils import initialize_model  # type: ignore


def without_kernel(self: Any, base_layer: Any) -> None:
    BaseLayerWithLoRA.__init__(self)
    self.base_layer, self.moe_config = base_layer, base_layer.moe_config
    self.tp_size, self.tp_rank, self.device = 1, 0, torch.device("cpu")
    self._w13_slices, self.enable_moe_shared_loras = 2, False
    self.n_slices = 3 * self.local_num_experts


def main() -> None:
    model_folder, adapter, out = sys.argv[1:]
    arguments: dict[str, Any] = {"model": model_folder, "skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32"}
    config = EngineArgs(**arguments, enable_lora=True, max_lora_rank=8, max_model_len=32).create_engine_config()
    FusedMoEWithLoRA.__init__, FusedMoEWithLoRA.set_mapping = without_kernel, BaseLayerWithLoRA.set_mapping
    found = {}
    with tempfile.TemporaryDirectory() as meeting, set_current_vllm_config(config):
        init_distributed_environment(1, 0, Path(meeting, "meet").as_uri(), 0, backend="gloo")
        initialize_model_parallel(1)
        model = initialize_model(config)
        manager = WorkerLoRAManager(config, torch.device("cpu"), getattr(model, "embedding_modules", {}))
        manager.create_lora_manager(model, config)
        assert manager.add_adapter(LoRARequest("adapter", 1, adapter))
        for name, module in manager._adapter_manager.modules.items():
            layer = name.rpartition(".layers.")[2].partition(".")[0]
            if isinstance(module, FusedMoEWithLoRA):
                (gate_a, up_a), (gate_b, up_b) = module.w13_lora_a_stacked, module.w13_lora_b_stacked
                down = module.w2_lora_b_stacked[0], module.w2_lora_a_stacked[0]
                for part, (b, a) in {"gate_proj": (gate_b, gate_a), "up_proj": (up_b, up_a), "down_proj": down}.items():
                    found |= {f"{layer}.{part}.{expert}": product for expert, product in enumerate(b[0] @ a[0])}
            elif name.endswith(".qkv_proj"):
                pairs = zip("qkv", module.lora_b_stacked, module.lora_a_stacked, strict=True)
                found |= {f"{layer}.{one}_proj": b[0, 0] @ a[0, 0] for one, b, a in pairs}
            elif name.endswith(".o_proj"):
                found[f"{layer}.o_proj"] = module.lora_b_stacked[0][0, 0] @ module.lora_a_stacked[0][0, 0]
    save_file({name: one.contiguous() for name, one in found.items()}, out)


if __name__ == "__main__":
    main()
