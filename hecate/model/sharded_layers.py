"""Shards the frozen weights of decoder layers over all ranks with torch's FSDP2, which gathers a layer's weights while the layer runs."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from hecate.model.gated_ffn import decoder_layers
from hecate.model.moe_model import MoeModel


def shard_frozen_layers(moe: MoeModel, group: dist.ProcessGroup) -> None:
    """Leave on each rank its part of every decoder layer's frozen weights.

    What trains stays replicated, and so do the embeddings, the last norm and the output projection, which run outside the layers. After
    this call the ranks must run the same forward and backward passes together.

    Every rank must call it, once all modules are in their places and before activations are checkpointed.

    Args:
        group: of all ranks and used by nothing else, so that gathered weights never queue behind experts or tokens.
    """
    name, layers = decoder_layers(moe.model)
    decoder = moe.model.get_submodule(name.rpartition(".")[0])
    device = next(moe.model.parameters()).device.type
    mesh = DeviceMesh.from_group(group, device)
    trained = {parameter for parameter in moe.model.parameters() if parameter.requires_grad}
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    outside = {parameter for path, parameter in decoder.named_parameters() if not path.startswith(f"{name.rpartition('.')[2]}.")}
    fully_shard(decoder, mesh=mesh, ignored_params=trained | outside)
