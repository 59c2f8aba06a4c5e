"""Check that an adapter has exactly the tensors that it must have, in matching shapes, and list those of a `mixlora` adapter."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hecate.adapters.mixlora.config import CONFIG, AdapterConfig
from hecate.adapters.mixlora.names import (
    ATTENTION_MODULES,
    FFN_MODULES,
    attention_tensor_name,
    expert_tensor_name,
    router_buffer_name,
    router_tensor_name,
)
from hecate.errors import UserError


def expected_shapes(config: AdapterConfig) -> Iterator[tuple[str, tuple[int | str, ...]]]:
    """Yield the name and shape of every tensor of the adapter, layer by layer.

    A size that the configuration does not give is a text, and equal texts mean equal sizes: "hidden" is the same in all layers; "ffn"
    and the inputs and outputs of attention are the same within a layer.
    """
    for layer, num_experts in enumerate(config.experts_per_layer):
        for module in ATTENTION_MODULES:
            if module in config.target_modules:
                inner = f"{module} of layer {layer}"
                out, into = ("hidden", inner) if module == "o_proj" else (inner, "hidden")
                yield attention_tensor_name(layer, module, "A"), (config.r, into)
                yield attention_tensor_name(layer, module, "B"), (out, config.r)
        if num_experts > 0:
            yield router_tensor_name(layer), (num_experts, "hidden")
            for buffer in config.router_buffers:
                yield router_buffer_name(layer, buffer), (num_experts,)
        ffn = f"ffn of layer {layer}"
        for module in FFN_MODULES:
            if module in config.target_modules:
                out, into = ("hidden", ffn) if module == "down_proj" else (ffn, "hidden")
                for expert in range(num_experts):
                    yield expert_tensor_name(layer, module, expert, "A"), (config.r, into)
                    yield expert_tensor_name(layer, module, expert, "B"), (out, config.r)


def checked_tensors(tensors: Mapping[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """Return the adapter's tensors as detached fp32 tensors on the CPU, in the order of `expected_shapes`.

    fp16 and bf16 become fp32 exactly; fp64 is rounded. Raises UserError, naming the tensor, if one is missing, unknown, of the wrong
    shape, not of floating point, or holds NaN or infinity.
    """
    expected: dict[str, tuple[int | str, ...]] = {}
    # The loop stops at the first missing tensor, because a forged configuration may list any number.
    for name, shape in expected_shapes(config):
        if name not in tensors:
            raise UserError(f"tensor {name} is missing; the adapter has {len(tensors)} tensors")
        expected[name] = shape
    for name in tensors:
        if name not in expected:
            raise UserError(f"tensor {name[:200]} does not belong to an adapter of this configuration")
    sizes: dict[str, tuple[int, str]] = {}
    result = {}
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise UserError(f"tensor {name} is {tensor.dtype}, not a dense tensor of floating point")
        if tensor.dim() != len(shape) or 0 in tensor.shape:
            raise UserError(f"tensor {name} has the shape {list(tensor.shape)}, not that of a {'matrix' if len(shape) == 2 else 'vector'}")
        for found, size in zip(tensor.shape, shape, strict=True):
            wanted, source = (size, CONFIG) if isinstance(size, int) else sizes.setdefault(size, (found, name))
            if found != wanted:
                raise UserError(f"tensor {name} has the shape {list(tensor.shape)}; {found} is {wanted} in {source}")
        converted = tensor.detach().to(device="cpu", dtype=torch.float32)
        if not torch.isfinite(converted).all():
            raise UserError(f"tensor {name} holds NaN or infinity in fp32")
        result[name] = converted
    return result


def require_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]], where: Path) -> None:
    """Check that an adapter has exactly the tensors that a model needs.

    Args:
        wanted: the shape of each by its name.
        where: the adapter's folder, for messages.

    Raises:
        UserError: a tensor is missing, superfluous or of another shape.
    """
    if missing := sorted(set(wanted) - set(tensors)):
        raise UserError(f"{where}: has no tensor {missing[0]} ({len(missing)} missing), which the base model needs")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise UserError(f"{where}: the tensor {unknown[0]} ({len(unknown)} such) belongs to no weight that the adapter is for")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise UserError(f"{where}: {name} has shape {tuple(tensors[name].shape)}, but the base model needs {tuple(shape)}")
