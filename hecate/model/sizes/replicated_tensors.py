"""The trained tensors outside the experts, by shape: what an optimizer keeps of them depends on it."""

from __future__ import annotations

from collections import Counter

from hecate.config.sections import OPTIMIZERS
from hecate.experts.pairs.source_table import trains_a
from hecate.model.sizes.run_shape import RunShape, linears_with_adapters
from hecate.parallel.values.optimizer_state import ParameterSpec, owner_bytes


def replicated_bytes_of(run: RunShape) -> float:
    """Return the bytes of the trained parameters outside the experts on each rank, with what the optimizer keeps of them."""
    state, parts = OPTIMIZERS[run.config.optim].STATE, ParameterSpec((run.parts_parameters,))
    tensors = replicated_tensors(run) + Counter([parts])  # where there are parts, each number is stepped by itself
    return sum(number * owner_bytes(state, one, run.master_bytes) for one, number in tensors.items())


def replicated_tensors(run: RunShape) -> Counter[ParameterSpec]:
    """Return how many tensors of each shape and kind every rank trains alike; parts of tensors (`RunShape.parts_parameters`) are none.

    Those of routers that decide by users, and learned biases, are counted as vectors, as are a whole model's norms.
    """
    config, rank, found = run.config, run.config.lora.rank, Counter[ParameterSpec]()
    for group in run.groups if config.moe.trains_routers and run.user_width is None else ():
        found[ParameterSpec((group.experts, group.inputs), "routers")] += group.number
    for layer, experts in zip(run.base.layers, config.moe.experts_per_layer(len(run.base.layers)), strict=True):
        for inputs, outputs in linears_with_adapters(layer, config, experts):
            found.update([ParameterSpec((outputs, rank)), *[ParameterSpec((rank, inputs))] * trains_a(config.lora.shape)])
        if run.trains_non_experts and run.tensor_parallel == 1:
            found.update(ParameterSpec((outputs, inputs)) for _, outputs, inputs in layer.linears)
    left = run.replicated_parameters - sum(number * one.numel for one, number in found.items())
    hidden = run.base.layers[0].hidden
    for shape, kind in (((run.base.vocabulary, hidden), "embeddings"), ((hidden,), "norms"), ((1,), "norms")):
        number, left = divmod(left, ParameterSpec(shape).numel)
        found[ParameterSpec(shape, kind)] += number
    return +found
