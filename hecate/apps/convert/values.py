"""Their values of settings as hecate's. Each function answers some keys of `meanings.CONVERTED`: (key, value, their file) -> KeyAnswer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hecate.apps.convert.answer import KeyAnswer, Theirs, cannot, carry, default, left, off, to_check
from hecate.config.files.presets import chat_templates
from hecate.config.schema import LEAVES
from hecate.errors import UserError
from hecate.io.plain_files import read_plain
from hecate.io.strict_json import parse_json

Convert = Callable[[str, Any, Theirs], KeyAnswer]
OPTIMIZERS = {
    "adamw": "adamw adamw_torch adamw_torch_fused adamw_hf adamw_torch_npu_fused adamw_apex_fused adamw_anyprecision paged_adamw "
    "paged_adamw_32bit",
    "adamw_8bit": "adamw_8bit adamw_bnb_8bit adamw_torch_8bit adamw_torch_4bit paged_adamw_8bit",
    "lion": "lion lion_32bit lion_pytorch paged_lion_32bit lion_8bit paged_lion_8bit",
    "adafactor": "adafactor",
    "muon": "muon",
}
"""hecate's optimizers, and what others call them"""
_MORE_BITS = ", whose moments have more bits"
OTHERWISE = {"adamw_torch_4bit": _MORE_BITS, "lion_8bit": _MORE_BITS, "paged_lion_8bit": _MORE_BITS}
"""those that hecate computes in another way, and how"""
CHANGE_IT = "change it where that does not fit"
_STEPS = {"eval_steps": 50, "save_steps": 500, "logging_steps": 10}
"""how many steps stand for a share of an epoch, whose number of steps is known only once data are packed"""
_OF_EXPERTS = {"w1": ["gate_proj"], "w3": ["up_proj"], "w2": ["down_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""names of experts' projections in some models, and in PEFT's target_parameters, as hecate calls them"""
_MOE_NAMES = re.compile(r"moe|mixtral|\d+x\d+b|-a\d+(\.\d+)?b|gpt-oss|deepseek-v[23]|glm-4\.\d|llama-4", re.IGNORECASE)


def number(value: Any) -> Any:
    """A number that YAML 1.1 reads as text, such as 1e-4, as one."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def holds_out(theirs: Theirs) -> bool:
    """Whether hecate will have held-out data: files, or a share of the training data where it knows that key."""
    split = theirs.trainer == "TRL" and theirs.get("dataset_name") and theirs.get("eval_strategy", "evaluation_strategy")
    share = "data.eval_share" in LEAVES and theirs.get("val_set_size", "val_size")
    return bool(split or share or theirs.get("test_datasets", "eval_dataset"))


def has_experts(theirs: Theirs) -> bool:
    """Whether the base model has experts: its config.json says it, or else its name."""
    name = str(theirs.get("base_model", "model_name_or_path"))
    try:
        sizes = parse_json(read_plain(Path(name) / "config.json"))
    except (OSError, UserError):
        return bool(_MOE_NAMES.search(name))
    return isinstance(sizes, dict) and any(sizes.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))


def method(name: str, value: Any, theirs: Theirs) -> KeyAnswer:
    """What is trained, and by what."""
    if name == "stage":
        fits = value in ("sft", "pt", None)
        return left("answers or plain text, as the records are") if fits else cannot("hecate does not learn by preferences or rewards")
    if "load_in" in name or name == "quantization_bit":
        many = f"hecate trains over a base in bfloat16 or float32, which takes more memory: --drop {name} does so"
        return default("the base is not quantised") if off(value) else cannot(many)
    if value is not True and str(value) not in ("lora", "qlora"):
        full = "hecate trains adapters and experts, no dense model as it is: write LoRA in their file, or train with moe.family=full"
        return cannot(full if off(value) or value == "full" else f"hecate has no {value}; LoRA is nearest")
    if not has_experts(theirs):
        return carry({"adapter": "lora"}, "plain LoRA")
    config = theirs.get("model_config")
    balanced = theirs.get("router_aux_loss_coef") or (isinstance(config, dict) and config.get("output_router_logits"))
    return carry({"moe.family": "moe_lora"} | ({} if balanced else {"moe.router_aux_loss_coef": 0.0}), "the base has experts")


def targets(name: str, value: Any, theirs: Theirs) -> KeyAnswer:
    """The modules that get LoRA."""
    every = "lora.target_modules: all seven linears of a decoder layer"
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if name == "lora_target_linear":
        return default("lora.target_modules says which" if off(value) else every)
    if theirs.get("lora_target_linear") or names in (["all"], ["all-linear"]):
        return default(every)
    parameters = theirs.get("lora_target_parameters") or []
    if off(value):
        peft = {"lora.target_modules": ["q_proj", "v_proj"]}  # what PEFT takes for Llama, Mistral, Qwen and Gemma
        return (
            default("none")
            if parameters or name.endswith("parameters")
            else cannot("name them")
            if theirs.trainer == "axolotl"
            else carry(peft)
        )
    names = [*names, *(theirs.get("lora_target_modules") or [] if name.endswith("parameters") else parameters)]
    last = [str(one).rpartition(".")[2] for one in names]
    if any(not re.fullmatch(r"\w+", one) for one in last):
        return cannot("patterns are not supported: give the last parts of the modules' names, as a list")
    experts = has_experts(theirs)
    modules = list(dict.fromkeys(module for one in last for module in (_OF_EXPERTS.get(one, [one]) if experts else [one])))
    if experts and not {"gate_proj", "up_proj", "down_proj"} & set(modules):
        return cannot(f"hecate trains LoRA at a model's experts: name gate_proj, up_proj and down_proj, too, or --drop {name} for all")
    return carry({"lora.target_modules": modules})


def steps(name: str, value: Any, theirs: Theirs) -> KeyAnswer:
    """How long the run is, and when it saves, evaluates, records and stops."""
    worth, most = number(value), theirs.values.get("max_steps") or 0
    limited = most > 0
    if name == "max_steps":
        return carry({name: value}) if limited else default("the epochs say it")
    if "epochs" in name:
        return left("max_steps says how long, as it does there") if limited else carry({"num_train_epochs": worth})
    if name == "warmup_steps":
        if off(worth):
            return default("none, or warmup_ratio says it")
        return carry({"warmup_ratio": worth}, "a share of the steps") if 0 < worth < 1 else carry({name: int(worth)})
    key = name.replace("evaluation", "eval").replace("_strategy", "_steps").replace("evals_per_epoch", "eval_steps")
    key = key.replace("saves_per_epoch", "save_steps")
    if off(value) or value == "steps" or (key == "eval_steps" and not holds_out(theirs)):
        return default(f"{key} says when") if value == "steps" else left("only at the end" if off(value) else "nothing is held out")
    if value == "best":
        return left("metric_for_best_model, or early_stopping_patience, has the best model saved")
    if name.endswith("_per_epoch") or value == "epoch":
        return some_steps(key)
    if theirs.get(name.replace("_steps", "_strategy")) in ("epoch", "no"):
        return left("their strategy does not ask for it")
    if isinstance(worth, float) and worth < 1:
        return carry({key: math.ceil(worth * most)}) if limited else some_steps(key)
    return carry({key: int(worth)}) if isinstance(worth, int | float) else cannot(f"write {key}, a number of steps")


def some_steps(key: str) -> KeyAnswer:
    """A number of steps where theirs is a share of an epoch or of the run."""
    unknown = f"how many steps an epoch has is not known before data are packed, and {_STEPS[key]} stands in its place: {CHANGE_IT}"
    return to_check({key: _STEPS[key]}, unknown)


def training(name: str, value: Any, theirs: Theirs) -> KeyAnswer:
    """The optimizer, its schedule, and what else the steps are computed with."""
    match name:
        case "optim" | "optimizer":
            kind = next((kind for kind, words in OPTIMIZERS.items() if str(value) in words.split()), None)
            if kind is None:
                return cannot(f"write optim, one of {', '.join(OPTIMIZERS)}")
            if str(value) in OTHERWISE:
                return carry({"optim": kind}, "its" + OTHERWISE[str(value)].removeprefix(", whose"))
            return default("AdamW") if "optim" not in LEAVES and kind == "adamw" else carry({"optim": kind})
        case "lr_scheduler" | "lr_scheduler_type":
            minimum = value == "cosine" and theirs.get("cosine_min_lr_ratio")
            return carry({"lr_scheduler_type": "cosine_with_min_lr" if minimum else "cosine" if off(value) else value})
        case "lr_scheduler_kwargs":
            return carry({f"{name}.{key}": one for key, one in value.items()}) if isinstance(value, dict) else default("none")
        case "max_grad_norm" | "gradient_clipping":
            return carry({"max_grad_norm": None if value == 0 else 1.0 if value is None else value})
        case "gradient_checkpointing" | "activation_checkpointing" | "disable_gradient_checkpointing":
            on = off(value) if name.startswith("disable") else not off(value)
            return carry({"gradient_checkpointing": on}, "activations stay on the device" if isinstance(value, str) else "")
        case "seed" | "data_seed":
            same = name == "data_seed" and value in (None, theirs.get("seed"))
            return left("seed is that of the data, too") if same or value is None else carry({"seed": value})
        case "val_set_size" | "val_size":
            if (number(value) or 0) >= 1:
                return cannot(f"data.eval_share is a share: write {value} divided by the number of samples")
            return default("nothing is held out") if off(value) else carry({"data.eval_share": number(value)})
        case "train_on_inputs":
            return default("the loss is over answers") if off(value) else cannot("the loss is over answers of chats alone: leave it out")
        case "assistant_only_loss":
            whole = "of chats, TRL's loss is then over the whole conversation, and hecate's over the answers"
            return left(whole) if off(value) else default("the loss is over answers")
        case "shuffle_merged_datasets":
            shuffled = value in (None, True)
            return default("samples are shuffled") if shuffled else cannot("hecate shuffles, by the seed: --drop it to have that")
        case "mix_strategy":
            weights = "give the items of data.train weights, or --drop mix_strategy to train on all records as they are"
            return default("all records") if value in (None, "concat") else cannot(weights)
        case "enable_thinking":
            on = value in (None, True)
            return default("as the chat template") if on else cannot("give data.chat_template=FILE, a template that writes no thoughts")
        case "loss_type":
            return default("nll") if value in (None, "nll", "chunked_nll") else cannot("hecate has no other loss than nll")
    raise AssertionError(name)


def surroundings(name: str, value: Any, theirs: Theirs) -> KeyAnswer:
    """Types, attention, templates, trackers, and what else of the program is set."""
    word = str(value)
    match name:
        case "chat_template" | "chat_template_path" | "chat_template_jinja" | "template":
            if off(value) or word.startswith("tokenizer_default") or word == "jinja":
                return default("the tokenizer's own")
            if "{%" in word or "{{" in word or Path(word).is_file() or word in chat_templates():
                return carry({"data.chat_template": word})
            return left("the tokenizer's own is used, which models of that name have; data.chat_template=FILE takes another")
        case "model_revision":
            return default("the newest") if off(value) or value == "main" else cannot("write a folder with it in their file")
        case "report_to":
            return default("none") if off(value) else carry({name: [value] if isinstance(value, str) else value})
        case "wandb_project" | "use_wandb" | "use_tensorboard" | "use_mlflow" | "mlflow_tracking_uri":
            tool = next(one for one in ("tensorboard", "wandb", "mlflow") if one in name)
            note = f"the environment's {name.upper()} says it" if isinstance(value, str) else ""
            return default("no tracker") if off(value) else carry({"report_to": [tool]}, note)
        case "plugins":
            known = ("Liger", "CutCrossEntropy", "ExpertParallel", "Kernels")
            others = [str(one) for one in value or () if not any(part in str(one) for part in known)]
            return (
                cannot(f"hecate runs no code that a file names: {', '.join(others)}")
                if others
                else left("how it is computed changes nothing")
            )
        case "model_config":
            others = sorted(set(value or ()) - {"output_router_logits"})
            return cannot(f"write {', '.join(others)} into the model's config.json") if others else left("moe.router_aux_loss_coef says it")
    if off(value) or word == "auto":
        return default(f"{'model.dtype' if '16' in name or 'dtype' in name else 'model.attention'}=auto")
    if "attention" in name or "attn" in name:
        return left("model.attention=auto takes the fastest that there is; the results are the same within rounding")
    if "fp16" in (name, word) or "float16" in (name, word):
        return default("model.dtype=auto: float16's small range needs a loss scale; bfloat16, or float32 where there is none")
    return carry({"model.dtype": "float32" if word == "float32" else "bfloat16"})
