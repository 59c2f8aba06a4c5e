"""The linears of a base model that clients have pairs for, without its weights."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from hecate.apps.federate.vectors import PairSite, VectorShape
from hecate.config import Config
from hecate.experts.pairs.source_table import trains_a
from hecate.io.foreign_errors import reading
from hecate.model.files.load import read_config, resolve_model
from hecate.model.linears import find_linears, target_linears


def vector_shape(config: Config) -> VectorShape:
    """Return what the widest client's vector is.

    Raises:
        UserError: the model's configuration cannot be read, or a target module is none of the model's linears.
    """
    described = read_config(resolve_model(config.model.name_or_path), config.model.num_hidden_layers)
    with reading("model.name_or_path", "no causal language model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described, trust_remote_code=False)
    linears = target_linears(find_linears(model), config.lora.target_modules, type(model).__name__)
    sites = tuple(PairSite(one.path, one.unit.layer, one.unit.place, one.shape.inputs, one.shape.outputs) for one in linears)
    lora = config.lora.shape
    dtype = "float64" if config.model.dtype == "float64" else "float32"
    return VectorShape(sites, lora.rank, lora.scale, trains_a(lora), dtype, config.seed)
