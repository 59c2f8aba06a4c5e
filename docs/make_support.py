"""Write docs/use/support.md, which says what goes together: `python docs/make_support.py`.

Nothing in it is asserted by hand: models are made, tiny and with random weights, hecate looks for places for experts in them, and computes
their logits; settings are put together, and hecate's rules accept or refuse them. A slow test holds the page to what this program writes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hecate.config.schema import DataSource

PAGE = Path(__file__).parent / "use" / "support.md"
DENSE = """llama mistral qwen2 qwen3 gemma gemma2 gemma3_text smollm3 olmo olmo2 granite cohere cohere2 stablelm seed_oss ernie4_5
exaone4 phi3 glm4 phi starcoder2 gpt2 gpt_neox falcon"""
WITH_EXPERTS = """mixtral qwen2_moe qwen3_moe olmoe granitemoe minimax deepseek_v2 deepseek_v3 glm4_moe ernie4_5_moe gpt_oss phimoe
llama4_text qwen3_next"""
MODELS = (*DENSE.split(), *WITH_EXPERTS.split())
"""the names that transformers gives them, `model_type` in config.json"""
SMALL = {
    "hidden_size": 64,
    "n_embd": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
    "pad_token_id": None,
    "logits_scaling": 8.0,
}
Settings = dict[str, Any]
KINDS: dict[str, Settings] = {
    "MixLoRA experts (mixlora)": {"moe.family": "mixlora", "moe.unit": "ffn"},
    "experts over linears (mixlora, moe.unit: linear)": {"moe.family": "mixlora", "moe.unit": "linear"},
    "LoRA on a model's experts (moe_lora)": {"moe.family": "moe_lora", "moe.unit": "ffn"},
    "full experts (full)": {"moe.family": "full", "moe.unit": "ffn"},
    "full, built by Megatron": {"moe.family": "full", "moe.unit": "ffn", "model.front_end": "megatron", "model.name_or_path": "gpt-moe-s"},
}
NO_AUX_LOSS: Settings = {"moe.router_aux_loss_coef": 0.0}
TOGETHER: dict[str, Settings] = {
    "lora.pairs: fixed_a": {"lora.pairs": "fixed_a"},
    "lora.pairs: nola": {"lora.pairs": "nola"},
    "lora.pairs: shards": {"lora.pairs": "shards", "lora.r": 4},
    "lora.r: a list": {"lora.r": (8, 4), "moe.num_experts": 2},
    "lora.gradient_rule: row_norm": {"lora.gradient_rule": "row_norm", "lora.eta": 2.0, "lora.dropout": 0.0},
    "moe.router.score: sigmoid": {"moe.router.score": "sigmoid"},
    "moe.router.bias: balancing": {"moe.router.bias": "balancing", **NO_AUX_LOSS},
    "moe.router.input: user": {"moe.router.input": "user", "data.features": "users.npz", **NO_AUX_LOSS},
    "moe.router.input: given": {"moe.router.input": "given", "moe.top_k": 1, "moe.num_experts": 2, **NO_AUX_LOSS},
    "moe.allocation": {"moe.allocation": (2, 4)},
    "moe.train_router": {"moe.train_router": True},
    "fssdp.plan: exact": {"fssdp.plan": "exact"},
    "fssdp.plan: replay": {"fssdp.plan": "replay"},
    "fssdp.rematerialize": {"fssdp.rematerialize": True},
    "fssdp.redundancy: 1": {"fssdp.redundancy": 1},
    "fssdp.shard_size: 2": {"fssdp.shard_size": 2},
    "model.shard_non_experts": {"model.shard_non_experts": True},
    "model.train_non_experts": {"model.train_non_experts": True, "model.dtype": "float32"},
    "model.tensor_parallel: 2": {"model.tensor_parallel": 2},
    "kernels: triton": {"kernels": "triton"},
    "eval.generate": {"eval.generate": True, "data.eval": (DataSource(path=__file__, name="held_out"),)},
}
YES = "yes"


def tiny(model_type: str) -> Any:
    """A model of two layers with random weights, or of as many as it takes to see both kinds of layers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type)
    config.num_hidden_layers = 2
    for name, value in SMALL.items():
        settable = not isinstance(getattr(type(config), name, None), property)
        if settable and (getattr(config, name, None) is not None or name == "hidden_size"):
            setattr(config, name, value)
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name)[:2])
    return AutoModelForCausalLM.from_config(config)


def dense_only(find: Callable[[Any], Sequence[Any]]) -> Callable[[Any], Sequence[Any]]:
    """`find`, for models without experts of their own."""
    from hecate.model.files.stored_experts import refuse_experts
    from hecate.parallel.values.expert_kinds import KINDS as EXPERT_KINDS

    def find_in_dense(model: Any) -> Sequence[Any]:
        refuse_experts(model.state_dict(), Path("the model"), EXPERT_KINDS["mixlora"])
        return find(model)

    return find_in_dense


def found(find: Callable[[Any], Sequence[Any]], model: Any) -> str:
    """Whether there are places for experts in the model, or the reason why there are none."""
    from hecate.errors import UserError

    try:
        return YES if find(model) else "has none"
    except UserError as error:
        first, *others = str(error).splitlines()
        why = [line.strip().removeprefix("why: ") for line in others if line.strip().startswith("why: ")]
        return (why or [re.sub(r"^unsupported architecture: \w+, |^the model: |, but moe.family.*|layers\.\d+\.|model\.", "", first)])[0]


def model_rows() -> list[list[str]]:
    from hecate.model.gated_ffn import find_gated_ffns
    from hecate.model.linears import find_linears
    from hecate.model.moe_blocks import find_moe_blocks

    finders = (dense_only(find_gated_ffns), dense_only(find_linears), find_moe_blocks)
    rows = []
    for model_type in MODELS:
        model = tiny(model_type)
        answers = [found(find, model) for find in finders]
        rows.append([f"`{model_type}`", *answers_with_logits(answers, model)])
    return rows


def answers_with_logits(answers: Sequence[str], model: Any) -> list[str]:
    """The answers, with the reason for a no in the place of each yes where hecate computes other logits than the model."""
    from hecate.errors import UserError
    from hecate.model.causal_head import LanguageModelHead
    from hecate.model.layers.attention import AUTO, pick_way

    if YES in answers:
        try:
            LanguageModelHead(model, pick_way(AUTO, model))
        except UserError as error:
            return [str(error).splitlines()[0] if answer == YES else answer for answer in answers]
    return list(answers)


def setting_rows() -> list[list[str]]:
    return [[f"`{name}`", *(allowed(kind, settings) for kind in KINDS.values())] for name, settings in TOGETHER.items()]


def allowed(kind: Settings, settings: Settings) -> str:
    """Whether hecate's rules accept the settings with this kind, or the first that is wrong."""
    from hecate.config.rules.keys import check_values
    from hecate.config.schema import LEAVES

    defaults = {key: leaf.default for key, leaf in LEAVES.items() if not leaf.required}

    def problems(values: Settings) -> list[tuple[str, str]]:
        said: list[tuple[str, str]] = []
        check_values({**defaults, **values}, lambda key, what, _: said.append((key, what)), claim_output=False)
        return said

    before = problems(kind)
    new = [(key, what) for key, what in problems({**kind, **settings}) if (key, what) not in before and not what.startswith("no such file")]
    return YES if not new else re.sub(r", (?:but the family is|got) [^,]*$", "", f"{new[0][0]} {new[0][1]}")


def not_supported() -> list[list[str]]:
    from hecate.apps.convert.meanings import HINTS

    rows = {}
    for name, answer in sorted(HINTS.items()):
        if answer.startswith("not supported: "):
            rows.setdefault(answer.removeprefix("not supported: ").removesuffix("; leave it out"), []).append(f"`{name}`")
    return [[what, ", ".join(names)] for what, names in rows.items()]


def together(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The rows, those with equal answers as one that names all of them."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, *answers in rows:
        names.setdefault(tuple(answers), []).append(name)
    return [[", ".join(of), *answers] for answers, of in names.items()]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def numbered(rows: Sequence[Sequence[str]]) -> tuple[list[list[str]], list[str]]:
    """The rows with numbers in the place of what is longer than a word or two, and those texts in the order of their numbers."""
    reasons: list[str] = []

    def cell(text: str) -> str:
        if len(text) < 12:
            return text
        if text not in reasons:
            reasons.append(text)
        return f"no ({reasons.index(text) + 1})"

    return [[row[0], *map(cell, row[1:])] for row in rows], reasons


def page() -> str:
    """The page's text."""
    models, why_not = numbered(model_rows())
    settings, refusals = numbered(setting_rows())
    lines = [
        "# Which models and settings go together, and what is not supported?",
        "",
        "These tables say it. `python docs/make_support.py` writes them: it makes each model, tiny and with random weights, hecate",
        "looks for places for experts in it and computes its logits; and it puts settings together, which hecate's rules accept or refuse.",
        "",
        "## Models",
        "",
        "Any other model of transformers with the same kinds of layers works, too: models are known by what they compute.",
        "",
        *table(
            ["`model_type`", "experts over its FFNs", "experts over its linears", "LoRA on its own experts, or all of them"],
            together(models),
        ),
        "",
        *(f"{number}. {reason}" for number, reason in enumerate(why_not, 1)),
        "",
        "## Settings",
        "",
        *table(["setting", *KINDS], together(settings)),
        "",
        *(f"{number}. {reason}" for number, reason in enumerate(refusals, 1)),
        "",
        "## Not supported",
        "",
        *table(["what", "keys of other trainers"], not_supported()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    PAGE.write_text(page(), encoding="utf-8")
