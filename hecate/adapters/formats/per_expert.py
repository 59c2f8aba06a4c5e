"""A LoRA of an MoE model's experts with one pair for each expert, as vLLM, SGLang and llama.cpp's converter read it."""

from __future__ import annotations

from pathlib import Path

from hecate.adapters.adapter_format import AdapterFormat
from hecate.adapters.card import Loading, adapter_card
from hecate.adapters.description import Adapter
from hecate.adapters.folder import save_adapter
from hecate.adapters.peft.description import LoraDescription
from hecate.adapters.peft.per_expert import PLAIN, SPELLINGS, split_experts
from hecate.adapters.peft.reading import with_one_rank
from hecate.errors import UserError
from hecate.model.files.load import base_of, read_config

_JOINED_IN_VLLM = ("gpt_oss", "interns1_pro", "qwen3_5", "qwen3_omni_moe", "qwen3_vl_moe")
"""how the model types begin whose experts vLLM has in one tensor"""
_OTHER_NAMES_IN_LLAMA_CPP = "granitemoe"
"""how the model types begin of whose experts llama.cpp's converter looks for Mixtral's names, under a block that has another name there"""
_CHECKED = {
    **dict.fromkeys(("qwen3_moe", "olmoe"), "The loaders of vLLM 0.32.0 and SGLang 0.5.23 and llama.cpp's converter"),
    "mixtral": "The loader of vLLM 0.32.0 and llama.cpp's converter",
}
"""who was seen to read an adapter over a model of a type as meant (`benchmarks.peers.reading`)"""


class PerExpert(AdapterFormat):
    """One pair for each expert and projection."""

    name = "per-expert"
    what = LoraDescription.what
    holds = (LoraDescription,)

    def export(self, adapter: Adapter, out: Path) -> list[str]:
        config = adapter.description
        assert isinstance(config, LoraDescription)
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
        tensors, described = split_experts(*with_one_rank(adapter.tensors, config), SPELLINGS.get(model_type, PLAIN))
        servers = servers_for(model_type)
        if model_type in _CHECKED:
            checked = f"{_CHECKED[model_type]} read such folders of tiny models as meant."
        else:
            checked = f"No program has been seen to read such a folder over a model of the type {model_type}; the lines say what should."
        how = f"{checked} No server has been run with one on a GPU.\n\n" + "\n".join(f"- {line}" for line in servers)
        loading = Loading("peft", ("lora", "mixture-of-experts"), how)
        save_adapter(out, tensors, described, adapter_card(described.to_json(), loading))
        return servers


FORMAT = PerExpert()


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
