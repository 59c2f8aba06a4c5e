"""Mixtures over a dense model's FFNs: what a run with `moe.family: mixlora` leaves, and what the `mixlora` and `moe-peft` libraries load.

A run leaves adapter_model.safetensors, which neither library reads. `hecate export --to mixlora` writes the same tensors to
adapter_model.bin, beside the same adapter_config.json. Both libraries apply dropout in inference, too, and fail for a dropout of 0, so that
their key says 1e-9 (`MixLoraDescription.to_json`).
"""

from __future__ import annotations

import io
from dataclasses import asdict, replace
from pathlib import Path

import torch

from hecate.adapters.adapter_format import AdapterFormat
from hecate.adapters.card import Loading, adapter_card, how_trained
from hecate.adapters.description import Adapter, Description
from hecate.adapters.folder import OLD_WEIGHTS, described_template, write_adapter_folder
from hecate.adapters.mixlora.description import PEFT_TYPE, MixLoraDescription, load_mixlora, other_than_mixtrals
from hecate.adapters.mixlora.names import MATRICES, attention_tensor_name, expert_tensor_name, router_part_name
from hecate.adapters.model_tensors import TensorNames, router_parts
from hecate.adapters.places import Place
from hecate.config import Config, named_model
from hecate.errors import UserError
from hecate.io.durable import write_durable
from hecate.model.base import BaseModel
from hecate.model.files.load import base_of, read_config
from hecate.model.gated_ffn import decoder_layers
from hecate.model.moe_model import MoeModel
from hecate.parallel.values.units import Unit

_HF_ACTIVATION = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
BASES = ("llama", "mistral", "qwen2", "gemma", "gemma2", "phi", "phi3")
"""transformers' types of the models that the libraries know"""
_BY_LIBRARY = Loading(
    "mixlora",
    ("lora", "mixlora", "mixture-of-experts"),
    "With the `mixlora` library; hecate's tests compare the logits of version 0.2.3:\n\n"
    "    from mixlora import MixLoraModelForCausalLM\n"
    "    model, config = MixLoraModelForCausalLM.from_pretrained(FOLDER)\n\nWith hecate:\n\n    hecate generate FOLDER 'What is FSSDP?'",
)


class MixLora(AdapterFormat):
    """The `mixlora` format."""

    name = "mixlora"
    what = MixLoraDescription.what
    peft_type = PEFT_TYPE
    holds = (MixLoraDescription,)

    def read(self, folder: Path) -> Adapter:
        return Adapter(folder, *load_mixlora(folder))

    def describe(self, config: Config, base: BaseModel) -> MixLoraDescription:
        """Raises UserError: a target module is not one of the format's seven."""
        num_layers = len(decoder_layers(base.model)[1])
        experts = config.moe.num_experts
        return MixLoraDescription(
            base_model_name_or_path=named_model(config.model.name_or_path),
            r=config.lora.rank,
            alpha=config.lora.stored_alpha,
            dropout=float(config.lora.dropout),
            target_modules=config.lora.target_modules,
            num_layers=num_layers,
            num_experts=experts if isinstance(experts, int) else config.moe.experts_per_layer(num_layers),
            top_k=min(config.moe.experts_per_token, *(count for count in config.moe.experts_per_layer(num_layers) if count)),
            act_fn=_HF_ACTIVATION[base.ffns[0].shape.activation],
            use_rslora=config.lora.use_rslora,
            extra={
                "router": asdict(config.moe.router),
                "router_aux_loss_coef": config.moe.router_aux_loss_coef,
                "model_dtype": config.model.dtype,
                "training": how_trained(config),
                **described_template(base.chat_template),
            },
        )

    def names(self, _base: BaseModel, _moe: MoeModel) -> TensorNames:
        def pair(unit: Unit, projection: str, expert: int) -> Place:
            name_a, name_b = (expert_tensor_name(unit.layer, projection, expert, matrix) for matrix in MATRICES)
            return Place(name_a, name_b)

        def plain(layer: int, module: str) -> tuple[str, str]:
            name_a, name_b = (attention_tensor_name(layer, module.rpartition(".")[2], matrix) for matrix in MATRICES)
            return name_a, name_b

        return TensorNames(pair, plain, lambda unit, part: router_part_name(unit.layer, part))

    def as_trained(self, description: Description, moe: MoeModel) -> Description:
        """With the names of what routers have beside their weight, one number per expert each."""
        for router in moe.router_modules.values():
            kept = dict(router.named_buffers())
            vectors = [*kept, *(part for part in router_parts(router) if part != "weight" and part not in kept)]
            if vectors:
                return replace(description, extra={**description.extra, "router_buffers": vectors})
        return description

    def export(self, adapter: Adapter, out: Path) -> list[str]:
        config = adapter.description
        assert isinstance(config, MixLoraDescription)
        model_type = read_config(base_of(adapter.folder, config.base_model_name_or_path)).model_type
        if reason := not_for_libraries(config, model_type):
            raise UserError(f"the libraries cannot hold it: {reason}")
        buffer = io.BytesIO()
        torch.save({name: tensor.float().contiguous() for name, tensor in adapter.tensors.items()}, buffer)

        def write_weights(staging: Path) -> MixLoraDescription:
            write_durable(staging / OLD_WEIGHTS, [buffer.getvalue()])
            return config

        write_adapter_folder(out, write_weights, adapter_card(config.to_json(), _BY_LIBRARY))
        return ["for the mixlora and moe-peft libraries"]


FORMAT = MixLora()


def not_for_libraries(config: MixLoraDescription, model_type: str) -> str:
    """Return why the libraries cannot hold an adapter; empty: they can."""
    if len(set(config.experts_per_layer)) > 1:
        return "its layers differ in their number of experts, and the libraries know one number for all"
    if different := other_than_mixtrals(config):
        return f"its routers choose otherwise than the libraries' own ({different})"
    if model_type not in BASES:
        return f"its base model is a {model_type}, and the libraries know {', '.join(BASES)}"
    return ""
