"""Check what goes together with `optim` and `lr_scheduler_type`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from hecate.config.problems import Add
from hecate.config.schema import LEAVES, Config
from hecate.config.sections import OPTIMIZERS
from hecate.errors import UserError, install_hint

_BY_NUMBER = ("adamw", "lion")
"""the optimizers that step each number by itself, so that a rank may step a part of a matrix"""
_MIN, _DECAY = "lr_scheduler_kwargs.min_lr_rate", "lr_scheduler_kwargs.decay_ratio"
_READ_WITH: dict[str, tuple[str, list[str]]] = {
    "adam_beta1": ("optim", [one for one in OPTIMIZERS if one != "adafactor"]),
    "adam_beta2": ("optim", [one for one in OPTIMIZERS if one != "adafactor"]),
    "adam_epsilon": ("optim", [one for one in OPTIMIZERS if one not in ("adafactor", "lion")]),
    **{key: ("optim", [section]) for key in LEAVES if (section := key.partition(".")[0]) in OPTIMIZERS},
    _MIN: ("lr_scheduler_type", ["cosine_with_min_lr", "wsd"]),
    _DECAY: ("lr_scheduler_type", ["wsd"]),
}
"""key -> the key that decides whether it is read, and with which values"""


def check_optimizer(values: Mapping[str, Any], add: Add) -> None:
    """Add every problem of the optimizer's and the schedule's keys, given the typed values of dotted keys; absent ones have one already."""
    optim, kind = values.get("optim", "adamw"), values.get("lr_scheduler_type")
    for key, (chooser, readers) in _READ_WITH.items():
        if values.get(key, LEAVES[key].default) != LEAVES[key].default and values.get(chooser, readers[0]) not in readers:
            add(key, f"is read with {chooser}={' or '.join(readers)} only, but it is {values[chooser]}", "leave it out")
    for needed, key in (("cosine_with_min_lr", _MIN), ("wsd", _DECAY)):
        if kind == needed and values.get(key, 0.1) is None:
            add(key, f"must be given with lr_scheduler_type={kind}", f"add {key}=0.1, for example")
    if kind == "wsd" and values.get("warmup_ratio", 0.0) + (values.get(_DECAY) or 0.0) > 1:
        add(_DECAY, "and warmup_ratio are more than 1 together, but are shares of the same steps", "make one of them smaller")
    if optim not in _BY_NUMBER and values.get("model.tensor_parallel", 1) > 1:
        what = f"{optim} steps whole matrices, but with model.tensor_parallel each rank has a part of them"
        add("optim", what, f"use {' or '.join(_BY_NUMBER)}, or set model.tensor_parallel=1")
    if optim == "muon" and values.get("lora.pairs") == "shards":
        add("optim", "muon steps matrices, but lora.pairs=shards trains pieces of them", "use another optimizer, or other pairs")
    if hasattr(OPTIMIZERS[optim], "PACKAGE") and values.get("model.dtype") == "float64":
        add("optim", f"{optim} is computed in float32 by bitsandbytes, but model.dtype is float64", "use adamw, muon or adafactor")


def require_optimizer(config: Config) -> None:
    """Raises UserError: this machine lacks the package that `optim` needs."""
    package = getattr(OPTIMIZERS[config.optim], "PACKAGE", None)
    if package is not None and find_spec(package) is None:
        raise UserError(f"optim: {config.optim} needs the package {package}, which is not installed\n  {install_hint('optim')}")
