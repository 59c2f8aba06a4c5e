"""Write what a finished run has trained, and read adapters: the `mixlora` and PEFT adapter formats and whole Mixtral models."""

from hecate.adapters.config import AdapterConfig
from hecate.adapters.folder import load_adapter, save_adapter
from hecate.adapters.names import attention_tensor_name, expert_tensor_name, router_tensor_name
from hecate.adapters.tensors import expected_shapes

__all__ = [
    "AdapterConfig",
    "attention_tensor_name",
    "expected_shapes",
    "expert_tensor_name",
    "load_adapter",
    "router_tensor_name",
    "save_adapter",
]
