"""Adapters in the `mixlora` format: the folder that a run leaves, and that other programs write and read."""

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
