"""Base models from local folders, GGUF files, or a GGUF file inside an installed Python package."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hecate.config.files.paths import find_model
from hecate.errors import UserError
from hecate.io.foreign_errors import reading
from hecate.model.files.base_folder import refuse_endless_values, refuse_what_is_loaded_unseen, refuse_whole_numbers
from hecate.model.layers.norms import fuse_norms
from hecate.ranks.processor import computes_bfloat16


@dataclass(frozen=True)
class ModelSource:
    """A folder, and the GGUF file in it if that is what is to be read."""

    folder: Path
    gguf_file: str | None

    def arguments(self) -> dict[str, Any]:
        """The arguments for transformers' `from_pretrained`: it reads local files only, and runs no code of the model's own.

        Without `trust_remote_code`, transformers asks on standard input whether to run that code.
        """
        common: dict[str, Any] = {"pretrained_model_name_or_path": str(self.folder), "local_files_only": True, "trust_remote_code": False}
        return common if self.gguf_file is None else {**common, "gguf_file": self.gguf_file}


def resolve_model(name_or_path: str) -> ModelSource:
    """Find the files that `model.name_or_path` means, without loading them. Raises UserError if there are none."""
    path = find_model(name_or_path)
    return ModelSource(path, None) if path.is_dir() else ModelSource(path.parent, path.name)


def base_of(trained: Path, name_or_path: str) -> ModelSource:
    """Find the base model of something trained. Raises UserError: it is not where the trained folder says."""
    try:
        return resolve_model(name_or_path)
    except UserError as error:
        raise UserError(
            f"{trained}: its base model is not found: {str(error).splitlines()[0]}\n"
            "  say where it is now: --model PATH, or of hecate eval model.name_or_path=PATH"
        ) from error


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the hardware computes in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if computes_bfloat16() else torch.float32


def load_model(source: ModelSource, dtype: torch.dtype, device: torch.device, num_hidden_layers: int | None = None) -> nn.Module:
    """The causal language model, frozen, on `device`. `num_hidden_layers` keeps the first layers only.

    Raises:
        UserError: transformers cannot read it, it is no causal language model, or it has fewer layers.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(source, num_hidden_layers)
    require_text_model(config, source)
    arguments = source.arguments() | {"config": config}
    if source.gguf_file is not None:
        arguments |= _gguf_dequantized()
    return _loaded(AutoModelForCausalLM, arguments, source, dtype, device)


def read_config(source: ModelSource, num_hidden_layers: int | None = None) -> Any:
    """The model's configuration as transformers has it. `num_hidden_layers` keeps the first layers only.

    Raises:
        UserError: transformers cannot read it, or it has fewer layers.
    """
    from transformers import AutoConfig

    _quiet_transformers()
    if source.gguf_file is None:
        refuse_what_is_loaded_unseen(source.folder)
    with reading(source.folder, "transformers cannot read its configuration"):
        config = AutoConfig.from_pretrained(**source.arguments())
    refuse_endless_values(config.to_dict(), source.folder)
    # What a file wishes may be a package of kernels that transformers would fetch. How attention is computed is `model.attention`.
    config._attn_implementation = config._experts_implementation = None
    if num_hidden_layers is not None:
        text = config.get_text_config()  # of a model of text alone: itself
        if num_hidden_layers > text.num_hidden_layers:
            raise UserError(f"model.num_hidden_layers: {num_hidden_layers}, but the model has only {text.num_hidden_layers}")
        text.num_hidden_layers = num_hidden_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:num_hidden_layers]
    return config


def outline_of(config: Any, source: ModelSource) -> nn.Module:
    """The model on the meta device: its modules, and no weights.

    Raises:
        UserError: it is no model of text alone, or transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    require_text_model(config, source)
    with reading(source.folder, "transformers cannot build the model"), torch.device("meta"):
        outline: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return outline


def require_text_model(config: Any, source: ModelSource) -> None:
    """Refuse a multimodal model that transformers loads as one, before anything is loaded.

    Raises:
        UserError: the model has a language model in it, beside other parts. (Of some such models transformers loads that alone.)
    """
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if text is config or model_class is None or getattr(model_class, "config_class", None) is type(text):
        return
    raise UserError(
        f"{source.folder}: {config.model_type} is a multimodal model ({model_class.__name__}); only models of text alone are supported\n"
        f"  give its language model by itself: a folder whose config.json has the model_type {text.model_type}, with that model's weights"
    )


def load_without(
    blocks: Sequence[str], model_class: type, config: Any, source: ModelSource, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Load a model with `LeftOut` in the place of the modules named in `blocks`. Their weights are neither read nor allocated.

    Args:
        model_class: of transformers, what `config` belongs to.
    """

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)  # type: ignore[misc]
        for path in blocks:
            self.set_submodule(path, LeftOut())

    # transformers allocates and fills whatever its model has when it has been built: so let it have less.
    smaller = type(model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__})
    model = _loaded(smaller, source.arguments() | {"config": config}, source, dtype, device)
    model.__class__ = model_class
    return model


class LeftOut(nn.Module):
    """A module in the place of experts that are not loaded yet. It adds nothing to any token."""

    def forward(self, x_TD: Tensor, *_: Any) -> Tensor:
        return torch.zeros_like(x_TD)


def _loaded(loader: Any, arguments: dict[str, Any], source: ModelSource, dtype: torch.dtype, device: torch.device) -> nn.Module:
    # Without a device map transformers builds the whole model in the host's memory, on each rank of a machine at the same time. With one,
    # it maps the files, whose pages all ranks share and the kernel may drop, and copies tensor by tensor.
    placed: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    if dtype.itemsize > 4:  # transformers takes one grouped product for the experts of an MoE model, which torch does not have in float64
        placed["experts_implementation"] = "eager"
    if source.gguf_file is None:
        placed["use_safetensors"] = True  # what is digested is what is loaded, and nothing is unpickled
        refuse_whole_numbers(source.folder)
    with reading(source.folder, "transformers cannot load the model"):
        # Kernels from a hub would be downloaded, and be others' code.
        model, info = loader.from_pretrained(**arguments, **placed, dtype=dtype, use_kernels=False, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{source.folder}: the model has no tensor {missing[0]} ({len(missing)} missing); is the download complete?")
    model.generation_config = _end_tokens_alone(model.generation_config)
    model = model.requires_grad_(False).to(device)
    if device.type == "cuda":
        fuse_norms(model, dtype)
    return model


def _end_tokens_alone(recommended: Any) -> Any:
    """The settings of `generate` of a model whose folder recommends some: how a token is chosen is said by hecate's caller.

    With a penalty on repetition, which some models' generation_config.json has, greedy answers were not the most likely ones, and
    depended on the padding of their batch.
    """
    from transformers import GenerationConfig

    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(recommended, name, None) for name in special})


def load_tokenizer(source: ModelSource) -> Any:
    """The model's fast tokenizer. Raises UserError: there is none, or it is a slow one."""
    from transformers import AutoTokenizer

    _quiet_transformers()
    with reading(source.folder, "transformers cannot read the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**source.arguments())
    if not tokenizer.is_fast:
        raise UserError(f"{source.folder}: its tokenizer has no fast version; character offsets are needed to mask the prompt")
    return tokenizer


def save_tokenizer(source: ModelSource, folder: Path, chat_template: str | None = None) -> None:
    """Write the model's tokenizer to `folder`.

    Args:
        chat_template: in place of its own; None: its own.

    Raises:
        UserError: as `load_tokenizer`.
    """
    tokenizer = load_tokenizer(source)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def _gguf_dequantized() -> dict[str, Any]:
    try:
        from transformers import GgufConfig
    except ImportError:  # before transformers 5.2 dequantizing was the only way
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _quiet_transformers() -> None:
    """Keep transformers from printing, and from fetching kernels for layers that ask for them by themselves."""
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
