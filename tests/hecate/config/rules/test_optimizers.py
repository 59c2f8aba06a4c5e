"""What goes together with `optim` and `lr_scheduler_type`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from hecate.config import ConfigError
from hecate.config.rules import optimizers
from hecate.config.rules.optimizers import check_optimizer, require_optimizer
from hecate.config.schema import LEAVES
from hecate.config.sections import OPTIMIZERS
from hecate.errors import UserError
from tests.hecate.config.making import MINIMAL, load


def test_the_optimizers_are_files_of_a_folder(folder: Path) -> None:
    assert list(OPTIMIZERS) == ["adamw", "muon", "adamw_8bit", "adafactor", "lion"]
    assert load(MINIMAL).optim == "adamw"
    assert [load(MINIMAL, f"optim={name}").optim for name in OPTIMIZERS] == list(OPTIMIZERS)
    assert {key for key in LEAVES if key.startswith("muon.")} == {"muon.momentum", "muon.adjust_lr_fn", "muon.adamw_learning_rate"}
    with pytest.raises(ConfigError, match="optim: must be one of adamw, muon, adamw_8bit, adafactor, lion, got adamw_torch"):
        load(MINIMAL, "optim=adamw_torch")
    with pytest.raises(ConfigError, match=r"optimizer: unknown key\n.*write optim"):
        load(MINIMAL, "optimizer=lion")


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("optim=muon", "optim=lion", "muon.momentum: is read with optim=muon only, but it is lion"),
        ("optim=adamw_8bit", "optim=lion", "adam_epsilon: is read with optim=adamw or muon or adamw_8bit only, but it is lion"),
        ("optim=lion", "optim=adafactor", "adam_beta2: is read with optim=adamw or muon or adamw_8bit or lion only, but it is adafactor"),
        ("lr_scheduler_type=wsd", "lr_scheduler_type=cosine", "lr_scheduler_kwargs.decay_ratio: is read with lr_scheduler_type=wsd only"),
        (
            "lr_scheduler_type=cosine_with_min_lr",
            "lr_scheduler_type=inverse_sqrt",
            "lr_scheduler_kwargs.min_lr_rate: is read with lr_scheduler_type=cosine_with_min_lr or wsd only, but it is inverse_sqrt",
        ),
    ],
)
def test_a_key_that_is_not_read_is_refused(folder: Path, good: str, bad: str, message: str) -> None:
    change = {"muon.momentum": "0.9", "adam_epsilon": "1e-6", "adam_beta2": "0.99"}.get(message.partition(":")[0], "0.2")
    given = f"{message.partition(':')[0]}={change}"
    load(MINIMAL, given, good)
    with pytest.raises(ConfigError, match=message) as error:
        load(MINIMAL, given, bad)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(("kind", "key"), [("wsd", "decay_ratio"), ("cosine_with_min_lr", "min_lr_rate")])
def test_a_schedule_says_what_it_needs(folder: Path, kind: str, key: str) -> None:
    whole = f"lr_scheduler_kwargs.{key}"
    assert getattr(load(MINIMAL, f"lr_scheduler_type={kind}", f"{whole}=0.3").lr_scheduler_kwargs, key) == 0.3
    with pytest.raises(ConfigError, match=rf"{whole}: must be given with lr_scheduler_type={kind}\n.*add {whole}=0.1"):
        load(MINIMAL, f"lr_scheduler_type={kind}")


def test_warm_up_and_decay_are_shares_of_the_same_steps(folder: Path) -> None:
    wsd = ("lr_scheduler_type=wsd", "lr_scheduler_kwargs.decay_ratio=0.6")
    assert load(MINIMAL, *wsd, "warmup_ratio=0.4").warmup_ratio == 0.4
    with pytest.raises(ConfigError, match="decay_ratio: and warmup_ratio are more than 1 together"):
        load(MINIMAL, *wsd, "warmup_ratio=0.5")


def problems_of(**values: object) -> list[str]:
    found: list[str] = []
    check_optimizer({key.replace("__", "."): value for key, value in values.items()}, lambda key, what, _: found.append(f"{key}: {what}"))
    return found


@pytest.mark.parametrize("optim", list(OPTIMIZERS))
def test_parts_of_matrices_are_stepped_by_what_steps_numbers(optim: str) -> None:
    refused = [f"optim: {optim} steps whole matrices, but with model.tensor_parallel each rank has a part of them"]
    assert problems_of(optim=optim, model__tensor_parallel=2) == (refused if optim in ("muon", "adamw_8bit", "adafactor") else [])
    assert problems_of(optim=optim, model__tensor_parallel=1) == []


@pytest.mark.parametrize("optim", list(OPTIMIZERS))
def test_what_does_not_go_with_an_optimizer(optim: str) -> None:
    shards = ["optim: muon steps matrices, but lora.pairs=shards trains pieces of them"]
    assert problems_of(optim=optim, lora__pairs="shards") == (shards if optim == "muon" else [])
    narrow = [f"optim: {optim} is computed in float32 by bitsandbytes, but model.dtype is float64"]
    assert problems_of(optim=optim, model__dtype="float64") == (narrow if optim in ("lion", "adamw_8bit") else [])


def test_a_missing_package_is_named_with_what_installs_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_for: list[str] = []
    monkeypatch.setattr(optimizers, "find_spec", looked_for.append)
    for optim in ("adamw", "muon", "adafactor"):
        require_optimizer(load(MINIMAL, f"optim={optim}"))
    assert not looked_for
    with pytest.raises(UserError, match=r"optim: lion needs the package bitsandbytes, which is not installed\n.*pip install '\.\[optim\]'"):
        require_optimizer(load(MINIMAL, "optim=lion"))
    assert looked_for == ["bitsandbytes"]
    assert importlib.util.find_spec("bitsandbytes") is not None, "the tests need it"
