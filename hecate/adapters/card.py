"""The model card of a folder that training or `hecate export` leaves: README.md with the header that model hubs read."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hecate.adapters.peft.targets import listed
from hecate.config import Config

CARD = "README.md"


@dataclass(frozen=True)
class Loading:
    """How a folder is loaded."""

    library: str
    """as hubs name it in `library_name`"""
    tags: tuple[str, ...]
    how: str
    """Markdown"""


GENERATE = "    hecate generate FOLDER 'What is FSSDP?'"
_TRANSFORMERS = """    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
"""


def how_trained(config: Config) -> dict[str, Any]:
    """Return what an adapter's description says about its training, as JSON values: under `extra`, by the name `training`."""
    return {
        **({} if config.adapter == "lora" else {"family": config.moe.kind.name}),
        "steps": config.max_steps,
        "micro_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "seed": config.seed,
        "data": [source.name for source in config.data.train],
    }


def adapter_card(config: Mapping[str, Any], loading: Loading) -> bytes:
    """Return the card of an adapter. `config` is its adapter_config.json."""
    facts = {
        "base model": config["base_model_name_or_path"],
        "rank": config["r"],
        "alpha": f"{config['lora_alpha']}{', scaled by alpha / sqrt(r)' if config.get('use_rslora') else ', scaled by alpha / r'}",
        "adapted modules": ", ".join([*listed(config["target_modules"]), *(config.get("target_parameters") or [])]),
        "experts": config.get("number_experts", config.get("num_experts")),
        "experts for each token": config.get("top_k"),
        "trained routers": ", ".join(config.get("modules_to_save") or []) or None,
    }
    extra = config.get("hecate", {}).get("extra", {})
    trained = {name.replace("_", " "): value for name, value in extra.get("training", {}).items()}
    merged = {f"merge: {name.replace('_', ' ')}": value for name, value in extra.get("merged", {}).items()}
    return _card(config["base_model_name_or_path"], loading, {**facts, **trained, **merged})


def full_model_card(config: Config, base: str | None, experts: int) -> bytes:
    """Return the card of a whole model that a run with `moe.family: full` has trained.

    Args:
        base: name of the base model; None: the run began with random weights.
        experts: of each layer.
    """
    facts = {
        "base model": base or "none: trained from random weights",
        "is": "a Mixtral",
        "experts": experts,
        "experts for each token": config.moe.experts_per_token,
        "trained beside experts and routers": "all other weights" if base is None or config.model.train_non_experts else "nothing",
    }
    trained = {name.replace("_", " "): value for name, value in how_trained(config).items()}
    how = f"With transformers, as any Mixtral:\n\n{_TRANSFORMERS}\nWith hecate:\n\n{GENERATE}"
    return model_card(base, how, {**facts, **trained}, ("mixtral", "mixture-of-experts"))


def model_card(base: str | None, how: str, facts: Mapping[str, Any], tags: Sequence[str]) -> bytes:
    """Return the card of a whole model.

    Args:
        base: name of the base model; None: there was none.
        how: how it is loaded, in Markdown.
        facts: what the table shows, by name; None: nothing.
    """
    return _card(base, Loading("transformers", tuple(tags), how), facts)


def _card(base: str | None, loading: Loading, facts: Mapping[str, Any]) -> bytes:
    # Text in a YAML header is written as JSON, which is YAML, too: a path may hold any character.
    of_base = [] if base is None else [f"base_model: {json.dumps(base)}"]
    header = ["---", f"library_name: {loading.library}", *of_base, "tags:"]
    header += [f"- {tag}" for tag in ("hecate", *loading.tags)] + ["---"]
    table = [
        "| what | value |",
        "|---|---|",
        *(f"| {_shown(name)} | {_shown(value)} |" for name, value in facts.items() if value is not None),
    ]
    sections = ["\n".join(header), "# Trained with hecate", "\n".join(table), "## How to load it", loading.how]
    return ("\n\n".join(sections) + "\n").encode()


def _shown(value: Any) -> str:
    """Text as Markdown and HTML show it: it may come from another's adapter, and give neither a link nor a tag."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"([\\`\[\]|])", r"\\\1", html.escape(" ".join(text.splitlines()), quote=False))
