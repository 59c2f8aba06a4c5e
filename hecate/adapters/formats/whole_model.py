"""Whole models in transformers' layout: what a run with `moe.family: full` and `hecate export` leave, and any other, opened as they are."""

from __future__ import annotations

from pathlib import Path

import torch

from hecate.adapters.adapter_format import AdapterFormat
from hecate.adapters.folder import CONFIG
from hecate.engine.engine import Engine
from hecate.engine.step_plans import EngineConfig
from hecate.errors import UserError
from hecate.model.base import BaseChoice, BaseModel
from hecate.model.causal_head import LanguageModelHead
from hecate.model.files.gguf_files import one_gguf_reader
from hecate.model.files.load import ModelSource, load_model, load_tokenizer, pick_dtype, read_config
from hecate.model.files.memory_check import require_room
from hecate.model.layers.attention import AUTO, AttentionChoice, pick_way
from hecate.model.moe_model import MoeModel
from hecate.parallel.cluster.topology import local_topology
from hecate.parallel.planners import POLICIES
from hecate.ranks.ranks import Ranks


class WholeModel(AdapterFormat):
    """A model that needs no base."""

    name = "model"
    what = "a whole model"
    instead = "give the folder of an adapter, or of a run that has left one"

    def recognises(self, folder: Path) -> bool:
        return is_model_folder(folder)

    def adapters_in(self, folder: Path) -> list[Path]:
        raise self.refusal(folder, "be read as an adapter")

    def open_for_answers(self, folder: Path, ranks: Ranks, choice: BaseChoice) -> tuple[BaseModel, MoeModel]:
        """See `load_model_folder`."""
        return load_model_folder(folder, ranks, choice.dtype, choice.attention)


FORMAT = WholeModel()


def is_model_folder(folder: Path) -> bool:
    """Return whether `folder` holds a whole model and not an adapter."""
    return (folder / "config.json").is_file() and not (folder / CONFIG).exists()


def load_model_folder(folder: Path, ranks: Ranks, dtype: str, attention: AttentionChoice = AUTO) -> tuple[BaseModel, MoeModel]:
    """Load the folder as a plain transformers model. The returned MoeModel has no experts, because transformers computes them.

    Args:
        dtype: the type to load the weights in; auto: the type they were saved in.

    Raises:
        UserError: the model cannot be read, or memory is too small for it.
    """
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: has no *.safetensors; is it the model folder of a finished run?")
    return load_plain_model(ModelSource(folder, None), ranks, dtype, attention)


def load_plain_model(
    source: ModelSource, ranks: Ranks, dtype: str, attention: AttentionChoice = AUTO, num_hidden_layers: int | None = None
) -> tuple[BaseModel, MoeModel]:
    """Load a model to which nothing is added, as `load_model_folder` does; with `num_hidden_layers` its first layers only."""
    saved = getattr(read_config(source), "dtype", None)
    held = saved if dtype == "auto" and isinstance(saved, torch.dtype) else pick_dtype(dtype, ranks.device)
    if source.gguf_file is None and num_hidden_layers is None:
        require_room(source.folder, held, ranks.device)
    with one_gguf_reader(source.gguf_file):
        model = load_model(source, held, ranks.device, num_hidden_layers).eval()
        tokenizer = load_tokenizer(source)
    topology = local_topology(ranks.world_size, cuda=ranks.device.type == "cuda")
    engine = Engine({}, EngineConfig(POLICIES["full"], topology), ranks.groups)
    vocab_size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    base = BaseModel(model, LanguageModelHead(model, pick_way(attention, model)), tokenizer, vocab_size)
    return base, MoeModel(model, engine, {}, {})
