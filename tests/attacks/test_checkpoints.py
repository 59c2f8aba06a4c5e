"""A checkpoint that somebody has forged, COMMIT and all, is refused by its name or is what it says; nothing runs or leads outside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hecate.apps.answers.opened import load_trained
from hecate.checkpoint.manifest import COMMIT, MANIFEST, commit_line, read_manifest
from hecate.checkpoint.meta import owners_of
from hecate.checkpoint.train_state import state_of
from hecate.config import load_config
from hecate.model.base import BaseChoice
from hecate.ranks.ranks import Ranks, join_ranks
from hecate.train.training import Training
from testing.tiny_run import make_workshop
from tests.attacks.watching import HARMLESS, REFUSED, outcome

Change = Callable[[dict[str, Any]], object]


def meta(**values: Any) -> Change:
    return lambda manifest: manifest["meta"].update(values)


def config(key: str, value: str) -> Change:
    """Another value for a key of the configuration that the checkpoint's run had."""

    def change(manifest: dict[str, Any]) -> None:
        lines = manifest["meta"]["config"].splitlines()
        (at,) = [number for number, line in enumerate(lines) if line.strip().startswith(f"{key}:")]
        lines[at] = f"{lines[at].partition(':')[0]}: {value}"
        manifest["meta"]["config"] = "\n".join(lines)

    return change


def tensor(**values: Any) -> Change:
    """Another entry for one of the experts' matrices."""
    return lambda manifest: next(iter(manifest["tensors"].values())).update(values)


def top(**values: Any) -> Change:
    return lambda manifest: manifest.update(values)


MANIFESTS: dict[str, tuple[Change, str]] = {
    "as it was": (top(), HARMLESS),
    "a rank of millions": (config("r", "4000000"), REFUSED),
    "a million experts": (config("num_experts", "1000000"), REFUSED),
    "10^15 experts": (config("num_experts", "1000000000000000"), REFUSED),
    "a model of other sizes": (config("num_hidden_layers", "1"), REFUSED),
    "a variable of the environment": (config("name_or_path", "${oc.env:HOME}"), REFUSED),
    "references without end": (config("name_or_path", "${" * 400 + "}" * 400), REFUSED),
    "a base that is a device": (config("name_or_path", "/dev/zero"), REFUSED),
    "a base on the network": (config("name_or_path", "https://example.org/x"), REFUSED),
    "another family": (config("family", "moe_lora"), REFUSED),
    "a family that there is not": (config("family", "boom"), REFUSED),
    "a tag that calls": (meta(config="output_dir: !!python/object/apply:os.system ['touch ran']"), REFUSED),
    "no configuration": (meta(config=None), REFUSED),
    "a configuration that is a list": (meta(config="[1]"), REFUSED),
    "a configuration nested without end": (meta(config="x: " + "[" * 50_000), REFUSED),
    "a configuration of 100,000 keys": (meta(config="\n".join(f"k{n}: 1" for n in range(10**5))), REFUSED),
    "a number to the base of sixty": (meta(config="seed: " + "1:" * 30_000 + "1"), REFUSED),
    "a template that fails where it is used": (meta(chat_template="{{ 1 / 0 }}"), HARMLESS),
    "a template that is a list": (meta(chat_template=["x"]), REFUSED),
    "another base model": (meta(base_model="0" * 32), REFUSED),
    "a step that is text": (top(step="2"), REFUSED),
    "a step below zero": (top(step=-1), REFUSED),
    "a newer version": (top(version=99), REFUSED),
    "more ranks than files": (top(world_size=2), REFUSED),
    "99,999 ranks": (top(world_size=99_999), REFUSED),
    "no tensors": (top(tensors={}), REFUSED),
    "tensors that are a list": (top(tensors=[]), REFUSED),
    "a file that leads up": (tensor(file="../bait"), REFUSED),
    "a file from the root": (tensor(file="/etc/passwd"), REFUSED),
    "a type that there is not": (tensor(dtype="F3"), REFUSED),
    "whole numbers": (tensor(dtype="I32"), REFUSED),
    "a shape of 2^60": (tensor(shape=[2**60]), REFUSED),
    "a shape of 10^30": (tensor(shape=[10**30]), REFUSED),
    "a negative shape": (tensor(shape=[-1]), REFUSED),
    "a shape that is text": (tensor(shape="4"), REFUSED),
    "another digest": (tensor(xxh3_128="0" * 32), REFUSED),
    "a digest that is a number": (tensor(xxh3_128=0), REFUSED),
    "a key that nobody knows": (top(more=1), REFUSED),
}


RESUMED: dict[str, tuple[Change, str]] = {
    "as it was": (top(), HARMLESS),
    "rows of a step below zero": (meta(rows_per_step=-1), REFUSED),
    "no rows of a step": (meta(rows_per_step=0), REFUSED),
    "rows of a step without end": (meta(rows_per_step=10**30), REFUSED),
    "rows of a step that are a list": (meta(rows_per_step=[4]), REFUSED),
    "norms that are text": (meta(grad_norms=["x"]), REFUSED),
    "norms that are nested": (meta(grad_norms=[[1]]), REFUSED),
    "a history that is text": (meta(history="x"), REFUSED),
    "a history of text": (meta(history=[{"0": "x"}]), REFUSED),
    "tokens that are text": (meta(tokens="x"), REFUSED),
    "owners that are no ranks": (meta(owners={"0": [7, 7, 7]}), REFUSED),
    "owners that are a list": (meta(owners=[]), REFUSED),
    "owners of no unit": (meta(owners={"../x": [0]}), REFUSED),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has saved a checkpoint after two steps."""
    workshop = make_workshop(tmp_path_factory.mktemp("workshop"))
    config = load_config(workshop / "config.yaml", [f"output_dir={workshop}/run"], claim_output=False)
    with join_ranks() as ranks:
        run = Training(config, ranks)
        for _ in range(2):
            run.train_one()
        run.save()
    return workshop / "run"


@pytest.fixture
def checkpoint(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "bait").write_text("secret", encoding="utf-8")
    return tmp_path / "checkpoint-2"


def forge(checkpoint: Path, change: Change) -> None:
    """Change the manifest, and make COMMIT fit to it."""
    value = json.loads((checkpoint / MANIFEST).read_bytes())
    change(value)
    data = json.dumps(value).encode()
    (checkpoint / MANIFEST).write_bytes(data)
    (checkpoint / COMMIT).write_bytes(commit_line(data))


SLOW = ("a configuration of 100,000 keys",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in MANIFESTS])
def test_a_forged_manifest(checkpoint: Path, ranks: Ranks, name: str) -> None:
    change, wanted = MANIFESTS[name]
    forge(checkpoint, change)
    assert outcome(lambda: load_trained(checkpoint, ranks, BaseChoice()), checkpoint) == wanted


@pytest.mark.parametrize("name", RESUMED)
def test_a_forged_state_of_training(checkpoint: Path, name: str) -> None:
    """As a resume reads it, before it opens tensors."""
    change, wanted = RESUMED[name]
    forge(checkpoint, change)

    def take() -> None:
        manifest = read_manifest(checkpoint)
        state_of(checkpoint, manifest)
        owners_of(checkpoint, manifest)

    assert outcome(take, checkpoint) == wanted
