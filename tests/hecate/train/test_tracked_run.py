"""A run whose trackers raise or hang trains what a run without trackers trains, bit for bit."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from hecate.config import load_config
from hecate.report.tracking import tracker_threads
from hecate.train.loop import train
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.train.in_process import ranks_of_default_group


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


def trained(rank: int, world: int, workshop: str, name: str, trackers: str) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The adapter of a run that reports to these stand-ins, and the steps that the one in working order has got.

    wandb raises when it is opened, mlflow hangs, trackio works.
    """
    released, steps = threading.Event(), []
    modules = {name: ModuleType(name) for name in ("wandb", "mlflow", "trackio")}

    def no_network(**_: Any) -> NoReturn:
        torch.manual_seed(1)  # whoever draws from a global generator finds another
        raise ConnectionError("no route to host")

    def log(numbers: dict[str, float], step: int) -> None:
        if "train/loss" in numbers:
            steps.append(step)

    vars(modules["wandb"]).update(init=no_network, Settings=SimpleNamespace)
    vars(modules["mlflow"]).update(start_run=lambda **_: released.wait(60))
    vars(modules["trackio"]).update(
        init=lambda **given: SimpleNamespace(**given), log=log, Image=lambda pixels: pixels, finish=lambda: None
    )
    folder = f"{workshop}/runs/{name}"
    overrides = ["max_steps=3", "data.eval=[]", "eval.generate=false", f"report_to={trackers}", f"output_dir={folder}"]
    config = load_config(f"{workshop}/config.yaml", overrides, claim_output=False)
    short = mock.patch.multiple(tracker_threads, PATIENCE=0.5, START_PATIENCE=0.5)
    with mock.patch.dict(sys.modules, modules), short:
        assert train(config, ranks_of_default_group(rank, world))
        released.set()
    return load_file(f"{folder}/adapter/adapter_model.safetensors"), steps


def both(rank: int, world: int, workshop: str) -> tuple[Any, Any]:
    return trained(rank, world, workshop, "plain", "[]"), trained(rank, world, workshop, "tracked", "[wandb,mlflow,trackio]")


def test_broken_trackers_change_nothing(workshop: str) -> None:
    (((plain, _), (tracked, steps)),) = run_ranks(1, both, workshop)
    assert plain.keys() == tracked.keys()
    assert all(torch.equal(plain[name], tracked[name]) for name in plain)
    assert steps == [1, 2, 3]
    records = [json.loads(line) for line in (Path(workshop) / "runs/tracked/metrics.jsonl").read_text().splitlines()]
    said = sorted(record["text"] for record in records if record["kind"] == "event" and "tracker" in record["text"])
    assert [text.split(";")[0] for text in said] == ["tracker mlflow has not started in 0.5 s", "tracker wandb failed: no route to host"]
