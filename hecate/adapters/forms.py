"""The forms in which `hecate export` writes an adapter: for each, which adapters it can hold, why not others, and how it is written.

| form | holds | who reads it |
|---|---|---|
| mixlora | a mixture over a dense model's FFNs (`moe.family: mixlora`) | the libraries mixlora and moe-peft |
| mixtral | the same, as a whole model | whatever reads Mixtral |
| peft | a LoRA of linears, or of an MoE model's experts | PEFT |
| per-expert | a LoRA of an MoE model's experts | vLLM, SGLang, llama.cpp's converter |
| merged | a LoRA of either sort, as a whole model | whatever reads the base model |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from hecate.adapters.card import Loading, adapter_card
from hecate.adapters.folder import described_template, load_adapter, refuse_existing
from hecate.adapters.linear_format import LinearAdapterConfig, is_linear_adapter, load_linear_adapter
from hecate.adapters.merge import write_merged
from hecate.adapters.mixlora.config import AdapterConfig
from hecate.adapters.mixlora.mixlora_as_mixtral import write_mixtral
from hecate.adapters.mixlora.mixlora_library import not_for_libraries, write_library_folder
from hecate.adapters.peft.lora_folder import load_lora
from hecate.adapters.peft.peft_moe import PeftMoeConfig, is_peft_adapter, peft_config_to_json, save_peft_adapter
from hecate.adapters.peft.per_expert import PLAIN, SPELLINGS, split_experts
from hecate.config import named_model
from hecate.data.chat.templates import template_beside
from hecate.errors import UserError
from hecate.model.files.load import base_of, read_config
from hecate.model.files.stored_model import open_stored

_JOINED_IN_VLLM = ("gpt_oss", "interns1_pro", "qwen3_5", "qwen3_omni_moe", "qwen3_vl_moe")
"""how the model types begin whose experts vLLM has in one tensor"""
_OTHER_NAMES_IN_LLAMA_CPP = "granitemoe"
"""how the model types begin of whose experts llama.cpp's converter looks for Mixtral's names, under a block that has another name there"""
_CHECKED = {
    **dict.fromkeys(("qwen3_moe", "olmoe"), "The loaders of vLLM 0.32.0 and SGLang 0.5.23 and llama.cpp's converter"),
    "mixtral": "The loader of vLLM 0.32.0 and llama.cpp's converter",
}
"""who was seen to read an adapter over a model of a type as meant (`benchmarks.peers.reading`)"""
Description = AdapterConfig | PeftMoeConfig | LinearAdapterConfig


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter as it was read from its folder, whatever form that has."""

    folder: Path
    tensors: Mapping[str, Tensor]
    description: Description

    def on(self, base: str | None) -> ReadAdapter:
        """The same adapter over the base model of another name or path; None: the one that it names."""
        if base is None:
            return self
        return replace(self, description=replace(self.description, base_model_name_or_path=named_model(base)))


@dataclass(frozen=True)
class Form:
    """One form."""

    holds: tuple[type, ...]
    """the descriptions whose adapters it holds"""
    write: Callable[[ReadAdapter, Path], list[str]]
    """a function that writes the new folder and returns what the user should know, line by line; it raises UserError where the form cannot
    hold the adapter, in words that go on after the folder's name"""


WHAT: dict[type, str] = {
    AdapterConfig: "a mixture of experts over a dense model's FFNs, whose router chooses for each token",
    PeftMoeConfig: "a LoRA, without routers of its own",
    LinearAdapterConfig: "a mixture of experts over single linears, whose routers choose for each token or user",
}
"""what an adapter with such a description is"""


def read_any(folder: Path) -> ReadAdapter:
    """Read an adapter folder of any form.

    Raises:
        UserError: naming the file, the key or the tensor that is missing or wrong.
    """
    tensors: Mapping[str, Tensor]
    description: Description
    if is_peft_adapter(folder):
        tensors, description = load_lora(folder)
    elif is_linear_adapter(folder):
        tensors, description = load_linear_adapter(folder)
    else:
        tensors, description = load_adapter(folder)
    extra = {**description.extra, **described_template(template_beside(folder))}
    return ReadAdapter(folder, tensors, replace(description, extra=extra))


def form_named(name: str) -> Form:
    """Return the form that `--to` names. Raises UserError: there is no such form."""
    if name not in FORMS:
        raise UserError(f"--to {name[:100]}: there is no such form\n  forms: {', '.join(FORMS)}")
    return FORMS[name]


def write_form(name: str, adapter: ReadAdapter, out: Path) -> list[str]:
    """Write an adapter in a form to the new folder `out`; what the user should know, line by line.

    Raises:
        UserError: there is no such form, `out` exists, the form cannot hold the adapter, the base model cannot be read, or the disk fails.
    """
    form = form_named(name)
    refuse_existing(out)
    if type(adapter.description) not in form.holds:
        raise UserError(
            f"{adapter.folder}: is {WHAT[type(adapter.description)]}, which the form {name} cannot hold\n  {what_to_give(adapter)}"
        )
    try:
        return form.write(adapter, out)
    except UserError as error:
        where = "" if str(error).startswith(str(adapter.folder)) else f"{adapter.folder}: "
        raise UserError(f"{where}{error}") from error


def what_to_give(adapter: ReadAdapter) -> str:
    """Return what `hecate export` is to be given so that it writes this adapter, or why there is no such thing."""
    description = adapter.description
    if others := [name for name, form in FORMS.items() if type(description) in form.holds]:
        return f"give --to {' or '.join(others)}"
    assert isinstance(description, LinearAdapterConfig)
    if description.router.by_user:
        return "for each user it is another LoRA: give --user ID and --features FILE.npz, and that of the user is written for PEFT"
    return "which of its pairs are at work depends on the token, so that no LoRA equals it; hecate generate and hecate eval compute it"


def servers_for(model_type: str) -> list[str]:
    """Return who takes the form per-expert of an adapter over a model of this type, and how, line by line."""
    lines = []
    if model_type.startswith(_JOINED_IN_VLLM):
        lines.append("not vLLM, which has this model's experts in one tensor: --to peft")
    else:
        lines.append("vLLM: --enable-lora --lora-modules NAME=FOLDER --max-lora-rank RANK")
    if model_type not in SPELLINGS:  # whose experts' weights have other names than SGLang looks for
        lines.append("SGLang: --lora-paths NAME=FOLDER")
    if model_type.startswith(_OTHER_NAMES_IN_LLAMA_CPP):
        lines.append("not llama.cpp, whose converter looks for other names of this model's experts: --to merged")
    else:
        lines.append("llama.cpp: convert_lora_to_gguf.py --base BASE FOLDER; Ollama takes the result as ADAPTER")
    lines.append("not PEFT, which has a form of its own: --to peft")
    return lines


def _to_mixlora(adapter: ReadAdapter, out: Path) -> list[str]:
    config = adapter.description
    assert isinstance(config, AdapterConfig)
    model_type = read_config(base_of(adapter.folder, config.base_model_name_or_path)).model_type
    if reason := not_for_libraries(config, model_type):
        raise UserError(f"the libraries cannot hold it: {reason}")
    write_library_folder(out, adapter.tensors, config)
    return ["for the mixlora and moe-peft libraries"]


def _to_mixtral(adapter: ReadAdapter, out: Path) -> list[str]:
    assert isinstance(adapter.description, AdapterConfig)
    base = open_stored(base_of(adapter.folder, adapter.description.base_model_name_or_path))
    return write_mixtral(out, base, adapter.tensors, adapter.description)


def _to_peft(adapter: ReadAdapter, out: Path) -> list[str]:
    assert isinstance(adapter.description, PeftMoeConfig)
    save_peft_adapter(out, adapter.tensors, adapter.description)
    return ["for PEFT"]


def _to_per_expert(adapter: ReadAdapter, out: Path) -> list[str]:
    config = adapter.description
    assert isinstance(config, PeftMoeConfig)
    if not config.target_parameters:
        raise UserError(
            "adapts linears and no experts, so that it has no pairs of experts\n  give --to peft, which servers read for linears"
        )
    if config.modules_to_save:
        raise UserError(
            f"has trained routers ({', '.join(config.modules_to_save)}), which no server takes beside an adapter\n"
            "  give --to merged, which holds them, or train with moe.train_router=false"
        )
    model_type = read_config(base_of(adapter.folder, config.base_model_name_or_path)).model_type
    tensors, described = split_experts(adapter.tensors, config, SPELLINGS.get(model_type, PLAIN))
    servers = servers_for(model_type)
    if model_type in _CHECKED:
        checked = f"{_CHECKED[model_type]} read such folders of tiny models as meant."
    else:
        checked = f"No program has been seen to read such a folder over a model of the type {model_type}; the lines say what should."
    how = f"{checked} No server has been run with one on a GPU.\n\n" + "\n".join(f"- {line}" for line in servers)
    loading = Loading("peft", ("lora", "mixture-of-experts"), how)
    save_peft_adapter(out, tensors, described, adapter_card(peft_config_to_json(described), loading))
    return servers


def _to_merged(adapter: ReadAdapter, out: Path) -> list[str]:
    assert isinstance(adapter.description, PeftMoeConfig)
    base = open_stored(base_of(adapter.folder, adapter.description.base_model_name_or_path))
    return write_merged(out, base, adapter.tensors, adapter.description)


FORMS: dict[str, Form] = {
    "mixlora": Form((AdapterConfig,), _to_mixlora),
    "mixtral": Form((AdapterConfig,), _to_mixtral),
    "peft": Form((PeftMoeConfig,), _to_peft),
    "per-expert": Form((PeftMoeConfig,), _to_per_expert),
    "merged": Form((PeftMoeConfig,), _to_merged),
}
"""by the name that `--to` gives"""
