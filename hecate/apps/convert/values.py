"""Their values of single settings as hecate's: lengths, schedules, optimizers, when to save, types, templates, trackers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hecate.apps.convert.answer import Answer, Theirs, carry, left, off, refused
from hecate.config.files.presets import chat_templates
from hecate.config.schema import LEAVES

_OPTIMIZERS = {
    "adamw": "adamw adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused paged_adamw paged_adamw_32bit",
    "adamw_8bit": "adamw_8bit adamw_bnb_8bit adamw_torch_8bit paged_adamw_8bit",
    "adafactor": "adafactor",
    "lion": "lion lion_32bit lion_pytorch",
    "muon": "muon",
}
_ATTENTION = {"flash": "flash_attention flash_attention_2 flash_attention_3 fa2 fa3 flash_attn flash", "flex": "flex_attention flex"}
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
_STEPS = "the steps of an epoch are known once data are packed: hecate train prints them, and {key}=N can be added then"
TEMPLATE = "write data.chat_template=FILE, a Jinja file, or leave it out: the tokenizer's own is used"


def named(groups: dict[str, str], value: Any) -> str | None:
    """The group that a word is in."""
    return next((name for name, words in groups.items() if str(value).lower() in words.split()), None)


def length(name: str, value: Any, theirs: Theirs) -> Answer:
    steps = theirs.values.get("max_steps")
    given = isinstance(steps, int) and steps > 0
    if name == "max_steps":
        return carry({"max_steps": steps}) if given else Answer("the default already", "the epochs say it")
    return left("max_steps says how long, as it does there") if given else carry({"num_train_epochs": _number(value)})


def warmup(name: str, value: Any, theirs: Theirs) -> Answer:
    number = _number(value)
    if off(number):
        return Answer("the default already", "none, or warmup_ratio says it")
    return carry({"warmup_ratio": number}, "a share of the steps") if 0 < number < 1 else carry({"warmup_steps": number})


def steps_or_share(name: str, value: Any, theirs: Theirs) -> Answer:
    number, steps = _number(value), theirs.values.get("max_steps")
    if off(number) or theirs.values.get(name.replace("_steps", "_strategy"), "steps") != "steps":
        return left("their strategy does not ask for it")
    if name == "eval_steps" and not holds_out(theirs):
        return left("nothing is held out")
    if isinstance(number, float) and number < 1:
        if not (isinstance(steps, int) and steps > 0):
            return left(_STEPS.format(key=name))
        number = math.ceil(number * steps)
    return carry({name: int(number) if number == int(number) else number})


def per_epoch(name: str, value: Any, theirs: Theirs) -> Answer:
    return left(_STEPS.format(key="eval_steps" if name == "evals_per_epoch" else "save_steps"))


def strategy(name: str, value: Any, theirs: Theirs) -> Answer:
    key = name.replace("evaluation", "eval").replace("_strategy", "_steps")
    word = str(value)
    if off(value) or word == "steps":
        return Answer("the default already", f"{key} says when") if word == "steps" else left("once, at the end")
    return left(_STEPS.format(key=key)) if word in ("epoch", "best") else refused(f"write {key}=N, a number of steps")


def holds_out(theirs: Theirs) -> bool:
    """Whether hecate will have held-out data: files, or a share of the training data where it knows that key."""
    split = theirs.trainer == "TRL" and not off(theirs.get("eval_strategy", "evaluation_strategy"))
    share = "data.eval_share" in LEAVES and not off(theirs.get("val_set_size", "val_size"))
    return bool(split or share or theirs.get("test_datasets", "eval_dataset", "validation_file"))


def eval_share(name: str, value: Any, theirs: Theirs) -> Answer:
    if off(value):
        return Answer("the default already", "nothing is held out")
    if (_number(value) or 0) >= 1:
        return refused(f"data.eval_share is a share: write {value} divided by the number of samples")
    return carry({"data.eval_share": _number(value)})


def early_stop(name: str, value: Any, theirs: Theirs) -> Answer:
    if off(value):
        return Answer("the default already", "the run goes to its end")
    return carry({name: value}) if holds_out(theirs) else refused("it needs held-out data")


def optimizer(name: str, value: Any, theirs: Theirs) -> Answer:
    kind = named(_OPTIMIZERS, value)
    if kind is None:
        return refused(f"write optim, one of {', '.join(_OPTIMIZERS)}")
    if "optim" not in LEAVES and kind == "adamw":
        return Answer("the default already", "AdamW")
    return carry({"optim": kind})


def learning_rate_curve(name: str, value: Any, theirs: Theirs) -> Answer:
    if off(value):
        return Answer("the default already", "lr_scheduler_type=cosine") if theirs.trainer == "axolotl" else carry({name: "linear"})
    minimum = value == "cosine" and not off(theirs.get("cosine_min_lr_ratio"))
    return carry({"lr_scheduler_type": "cosine_with_min_lr" if minimum else value})


def schedule_kwargs(name: str, value: Any, theirs: Theirs) -> Answer:
    if off(value):
        return Answer("the default already", "none")
    return carry({f"{name}.{key}": one for key, one in value.items()}) if isinstance(value, dict) else refused("write a mapping")


def max_norm(name: str, value: Any, theirs: Theirs) -> Answer:
    return carry({"max_grad_norm": None if value == 0 else 1.0 if value is None else value})


def gradient_checkpointing(name: str, value: Any, theirs: Theirs) -> Answer:
    on = off(value) if name.startswith("disable") else not off(value)
    return carry({"gradient_checkpointing": on}, "" if isinstance(value, bool | None) else "activations stay on the device")


def resume(name: str, value: Any, theirs: Theirs) -> Answer:
    return (
        Answer("the default already", "resume=false") if off(value) else left("it is about their checkpoints; resume=true takes hecate's")
    )


def seed(name: str, value: Any, theirs: Theirs) -> Answer:
    if name == "data_seed":
        return left("seed is that of the data, too") if value in (None, theirs.values.get("seed")) else refused("write one seed for both")
    return left("a seed of chance there; hecate's is 0") if value is None else carry({"seed": value})


def attention(name: str, value: Any, theirs: Theirs) -> Answer:
    if off(value) or str(value) == "auto":
        return Answer("the default already", "model.attention=auto")
    kind = named(_ATTENTION, value if isinstance(value, str) else name)
    if kind or "sdp" in f"{name}{value}":
        return carry({"model.attention": "auto"}, f"takes {kind or 'sdpa'} where it can be had; the results are the same within rounding")
    return left("how it is computed; model.attention=auto takes the fastest that there is")


def dtype(name: str, value: Any, theirs: Theirs) -> Answer:
    if off(value) or str(value) == "auto":
        return Answer("the default already", "model.dtype=auto")
    if name in ("fp16", "float16") or str(value) in ("fp16", "float16"):
        return carry({"model.dtype": "auto"}, "float16's small range needs a loss scale: bfloat16, or float32 where there is none")
    if str(value) in ("float32", "bfloat16"):
        return carry({"model.dtype": str(value)})
    return carry({"model.dtype": "bfloat16"}) if value is True or "bf16" in str(value) else left("model.dtype=auto")


def template(name: str, value: Any, theirs: Theirs) -> Answer:
    if off(value) or value in ("tokenizer_default", "jinja", "tokenizer_default_fallback_chatml"):
        return Answer("the default already", "the tokenizer's own")
    text = str(value)
    if "{%" in text or "{{" in text or Path(text).is_file():
        return carry({"data.chat_template": text})
    if text in chat_templates():
        return carry({"data.chat_template": text})
    return left(f"the tokenizer's own is used, which in models of that name is {text}; data.chat_template=FILE takes another")


def trackers(name: str, value: Any, theirs: Theirs) -> Answer:
    if off(value) or value == ["none"]:
        return Answer("the default already", "none")
    return carry({"report_to": [value] if isinstance(value, str) else value}, "" if value != "all" else f"name them: {_TRACKERS}")


def tracker_named(name: str, value: Any, theirs: Theirs) -> Answer:
    if off(value):
        return Answer("the default already", "no tracker")
    tool = next(one for one in _TRACKERS if one in name)
    return carry({"report_to": [tool]}, f"the environment's {name.upper()} says it" if isinstance(value, str) else "")


def train_on_inputs(name: str, value: Any, theirs: Theirs) -> Answer:
    return Answer("the default already", "the loss is over answers") if off(value) else refused("the loss is over answers of chats alone")


def only_nll(name: str, value: Any, theirs: Theirs) -> Answer:
    return Answer("the default already", "nll") if value in (None, "nll", "chunked_nll") else refused("hecate has no other loss than nll")


def plugins(name: str, value: Any, theirs: Theirs) -> Answer:
    known = ("Liger", "CutCrossEntropy", "ExpertParallel", "Kernels")
    unknown = [one for one in value or () if not any(word in str(one) for word in known)]
    return (
        refused(f"{', '.join(map(str, unknown))}: hecate runs no code that a configuration names")
        if unknown
        else left("how it is computed")
    )


def model_settings(name: str, value: Any, theirs: Theirs) -> Answer:
    others = [one for one in value or () if one != "output_router_logits"]
    return refused("change the model's config.json in its folder") if others else left("moe.router_aux_loss_coef is the loss's weight")


def _number(value: Any) -> Any:
    """A number that YAML 1.1 reads as text, such as 1e-4, as one."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
