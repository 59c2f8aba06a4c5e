"""Shards the frozen weights of decoder layers over all ranks with torch's FSDP2, which gathers a layer's weights while the layer runs."""

from __future__ import annotations

import gc

import torch.distributed as dist
from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh

from hecate.model.gated_ffn import decoder_layers
from hecate.model.layers.lora import LoraLinear
from hecate.model.moe_model import MoeModel


def shard_frozen_layers(moe: MoeModel, group: dist.ProcessGroup, whole: nn.Module | None = None) -> None:
    """Leave on each rank its part of every decoder layer's frozen weights.

    What trains stays replicated, and so do the embeddings, the last norm and the output projection, which run outside the layers. After
    this call the ranks must run the same forward and backward passes together.

    Every rank must call it, once all modules are in their places and, the first time, before activations are checkpointed. It sends no
    message.

    Args:
        group: of all ranks and used by nothing else, so that gathered weights never queue behind experts or tokens.
        whole: the base model as it was loaded, in the model's type and on any device. It is needed where the layers are sharded already,
            over ranks of which some are lost: its layers then take the place of those. None: the layers are not sharded yet.
    """
    from torch.distributed.fsdp import fully_shard  # half a second, which only this setting needs

    name, layers = decoder_layers(moe.model)
    decoder = moe.model.get_submodule(name.rpartition(".")[0])
    device = next(moe.model.parameters()).device
    mesh = DeviceMesh.from_group(group, device.type)
    trained = {parameter for parameter in moe.model.parameters() if parameter.requires_grad}
    loaded = decoder_layers(whole)[1] if whole is not None else [None] * len(layers)
    if whole is not None:
        _no_longer_sharded(decoder)
    for layer, weights in zip(layers, loaded, strict=True):
        if weights is not None:
            _no_longer_sharded(layer)
            _take_frozen(layer, weights)
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    outside = {parameter for path, parameter in decoder.named_parameters() if not path.startswith(f"{name.rpartition('.')[2]}.")}
    fully_shard(decoder, mesh=mesh, ignored_params=trained | outside)
    if whole is not None:
        # What was sharded refers to itself in circles, so without this its shares of the layers would stay in memory.
        gc.collect()


def _take_frozen(layer: nn.Module, loaded: nn.Module) -> None:
    """Give a layer the frozen weights of the same layer as it was loaded."""
    weights = dict(loaded.named_parameters())
    for path, parameter in list(layer.named_parameters()):
        if not parameter.requires_grad:
            owner, _, name = path.rpartition(".")
            weight = weights[_path_in_base(layer, path)].detach().to(parameter.device)
            layer.get_submodule(owner).register_parameter(name, nn.Parameter(weight, requires_grad=False))


def _path_in_base(layer: nn.Module, path: str) -> str:
    """Where a parameter is in the layer as it was loaded: a linear that has an adapter was in the adapter's place."""
    owner, _, name = path.rpartition(".")
    around, _, _ = owner.rpartition(".")
    return f"{around}.{name}" if around and isinstance(layer.get_submodule(around), LoraLinear) else path


def _no_longer_sharded(module: nn.Module) -> None:
    """Take back what `fully_shard` has made of a module, all but the parameters, so that it can be sharded again.

    torch (2.10 to 2.13) has no call for this, and refuses a module that it knows already.
    """
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(module, FSDPModule), type(module)
    state = module._get_fsdp_state()
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    if (group := state._fsdp_param_group) is not None:
        # Those on the linears and norms would keep the old shares in memory.
        handles += [*group._module_to_pre_save_state_dict_hook_handle.values(), *group._module_to_pre_load_state_dict_hook_handle.values()]
        handles += [parameter._post_load_hook_handle for parameter in group.fsdp_params]
    for handle in handles:
        handle.remove()
    module.__class__ = type(module).__bases__[1]  # FSDPModule and the class that it was
    for key in (STATE_KEY, REGISTRY_KEY):
        del module.__dict__[key]
    del _module_state_mapping[module]
