"""Write what a finished run has trained, and read adapters: the `mixlora` and PEFT adapter formats and whole Mixtral models."""

from hecate.adapters.folder import load_adapter, save_adapter
from hecate.adapters.mixlora.config import AdapterConfig
from hecate.adapters.mixlora.names import attention_tensor_name, expert_tensor_name, router_tensor_name
from hecate.adapters.mixlora.tensors import expected_shapes

__all__ = [
    "AdapterConfig",
    "attention_tensor_name",
    "expected_shapes",
    "expert_tensor_name",
    "load_adapter",
    "router_tensor_name",
    "save_adapter",
]
