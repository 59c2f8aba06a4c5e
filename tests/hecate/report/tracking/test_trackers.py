"""Trackers get what metrics.jsonl gets; whatever they do, the run goes on."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hecate.config import ConfigError, load_config
from hecate.errors import UserError
from hecate.report.metrics import Record, event_record, step_record
from hecate.report.tracking import tracker_threads
from hecate.report.tracking.tracked_figures import load_pictures, numbers_of
from hecate.report.tracking.tracker_threads import Trackers
from hecate.report.tracking.trackers import ADAPTERS, TrackedRun, Tracker, check_trackers
from hecate.train.preflight import check_machine
from tests.hecate.report.made_runs import a_step, an_eval
from tests.hecate.train.command_line import workshop

__all__ = ["workshop"]  # a fixture

STEP = step_record(a_step(1))


def a_run(folder: Path, step: int = 0) -> TrackedRun:
    return TrackedRun(name="first", folder=folder, config={"seed": 0, "lora": {"r": 4}}, step=step, known_as=None)


def report(adapter: Callable[[TrackedRun], Tracker], run: TrackedRun, *records: Record) -> list[str]:
    said: list[str] = []
    with Trackers({"one": adapter}, run, said.append) as trackers:
        for record in records:
            trackers.record(record)
    return said


def test_the_numbers_of_records() -> None:
    numbers = numbers_of(STEP)
    assert numbers["train/loss"] == STEP["loss"]
    assert numbers["train/epoch"] == STEP["epoch"]
    assert numbers["balance/static_imbalance"] == STEP["static_imbalance"]
    assert numbers["memory/peak_bytes"] == 701_000, "of the fullest rank"
    assert numbers["speed/forward_seconds"] == 0.2
    assert len(numbers) == 18
    assert numbers_of(an_eval(3, 2.0)) == {"eval/sum/loss": 2.0, "eval/sum/accuracy": 0.5, "eval/count/loss": 3.0}
    assert numbers_of(event_record(3, "saved")) == {}
    assert "train/loss" not in numbers_of({**STEP, "loss": None}), "what was not finite"


def test_pictures_of_loads() -> None:
    pictures = load_pictures({"1": [0, 4], "0": [2, 2], "0.self_attn.q_proj": [1, 1, 1]})
    assert {name: pixels.shape for name, pixels in pictures.items()} == {
        "loads/ffn": (256, 256, 3),
        "loads/self_attn.q_proj": (86, 258, 3),
    }
    corners = pictures["loads/ffn"][[0, -1]][:, [0, -1]]
    assert (corners[0, 0] == corners[0, 1]).all(), "layer 0, on top, is even"
    assert (corners[1, 0] == [68, 1, 84]).all(), "nobody has asked for expert 0 of layer 1"


class Recorded:
    """A stand-in module of a tracker, whose functions write down their calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, **values: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        module = ModuleType(name)
        for function, returned in values.items():
            setattr(module, function, self.function(function, returned))
        monkeypatch.setitem(sys.modules, name, module)

    def function(self, name: str, returned: Any = None) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.calls.append((name, arguments, keywords))
            return returned

        return call

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(arguments, keywords) for called, arguments, keywords in self.calls if called == name]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run = SimpleNamespace(id="abc")
    module = Recorded(monkeypatch, "wandb", init=run, Image="picture", Settings="settings")
    run.log, run.finish = module.function("log"), module.function("finish")
    for step in (0, 1, 0):
        assert report(ADAPTERS["wandb"], a_run(tmp_path, step), STEP) == []
    (_, first), (_, again), (_, anew) = module.of("init")
    assert (first["project"], first["name"], first["dir"], first["config"]["seed"]) == ("hecate", "first", str(tmp_path), 0)
    assert (first["id"], again["id"], anew["id"]) == (None, "abc", None), "a resumed run goes on as the one that it was"
    ((numbers,), keywords), *_ = module.of("log")
    assert keywords == {"step": 1}
    assert numbers == {**numbers_of(STEP), "loads/ffn": "picture"}
    assert module.of("Image")[0][0][0].dtype == np.uint8
    assert len(module.of("finish")) == 3


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(info=SimpleNamespace(run_id="abc"))
    module = Recorded(monkeypatch, "mlflow", start_run=run, log_dict=None, log_metrics=None, log_image=None, end_run=None)
    for step in (0, 1):
        assert report(ADAPTERS["mlflow"], a_run(tmp_path, step), STEP, an_eval(1, 2.0)) == []
    assert [keywords for _, keywords in module.of("start_run")] == [
        {"run_id": None, "run_name": "first"},
        {"run_id": "abc", "run_name": None},
    ]
    assert module.of("log_metrics")[:2] == [((numbers_of(STEP),), {"step": 1}), ((numbers_of(an_eval(1, 2.0)),), {"step": 1})]
    assert module.of("log_image")[0][1] == {"key": "loads/ffn", "step": 1, "synchronous": True}
    assert module.of("log_dict")[0][0][1] == "config.yaml"
    assert len(module.of("end_run")) == 2


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Recorded(monkeypatch, "trackio", init=SimpleNamespace(name="first-2"), log=None, Image="picture", finish=None)
    for step in (0, 1):
        assert report(ADAPTERS["trackio"], a_run(tmp_path, step), STEP) == []
    assert [(keywords["name"], keywords["resume"]) for _, keywords in module.of("init")] == [("first", "never"), ("first-2", "allow")]
    assert module.of("log")[0] == (({**numbers_of(STEP), "loads/ffn": "picture"},), {"step": 1})
    assert len(module.of("finish")) == 2


def test_tensorboard(tmp_path: Path) -> None:
    """What its own reader finds in the files of a run and of its resume."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begun, steps in ((0, (1, 2, 3)), (2, (3,))):
        records = [step_record(a_step(step)) for step in steps]
        assert report(ADAPTERS["tensorboard"], a_run(tmp_path, begun), *records) == []
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    losses = [(one.step, round(one.value, 4)) for one in found.Scalars("train/loss")]
    assert losses == [(1, 3.0), (2, 1.5), (3, 1.0)], "step 3 stands once"
    assert found.Images("loads/ffn")[0].width == 256


class Broken:
    """A tracker that goes wrong where it is told to."""

    run_id = None

    def __init__(self, where: str, until: threading.Event | None = None) -> None:
        self.where, self.until = where, until
        self.logged: list[int] = []
        self.do("open")

    def do(self, what: str) -> None:
        if what == self.where:
            if self.until is None:
                raise SystemExit("no network\nat all")
            self.until.wait(60)

    def log(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        self.do("log")
        self.logged.append(step)

    def close(self) -> None:
        self.do("close")


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Lets go, after the test, of what hangs in it; meanwhile patience is short."""
    monkeypatch.setattr(tracker_threads, "PATIENCE", 0.2)
    monkeypatch.setattr(tracker_threads, "START_PATIENCE", 0.3)
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_tracker_that_raises_is_named_once(tmp_path: Path, where: str) -> None:
    said = report(lambda _: Broken(where), a_run(tmp_path), *[STEP] * 5)
    assert said == ["tracker one failed: no network at all; the run goes on without it, and metrics.jsonl has everything"]


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_tracker_that_hangs_is_named_once_and_not_waited_for(tmp_path: Path, released: threading.Event, where: str) -> None:
    said: list[str] = []
    begun = time.monotonic()
    trackers = Trackers({"one": lambda _: Broken(where, released)}, a_run(tmp_path), said.append)
    trackers.record(STEP)
    while where != "close" and not said and time.monotonic() - begun < 20:
        time.sleep(0.02)
        trackers.record(STEP)
    trackers.record(STEP)
    trackers.close()
    trackers.close()
    (text,) = said
    trouble = {
        "open": "has not started in 0.3 s",
        "log": "has not answered for 0.2 s",
        "close": "has not finished 0.2 s after the run's last word",
    }[where]
    assert text == f"tracker one {trouble}; the run goes on without it, and metrics.jsonl has everything"
    assert time.monotonic() - begun < 30, "it was waited for"


def test_a_tracker_that_starts_slowly_gets_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts after the run has ended, and after the time in which any other call must have returned."""
    monkeypatch.setattr(tracker_threads, "PATIENCE", 0.2)
    ended, said, opened = threading.Event(), list[str](), list[Broken]()

    def say(text: str) -> None:
        said.append(text)
        ended.set()

    def slow(_: TrackedRun) -> Broken:
        assert ended.wait(60)
        opened.append(Broken("nowhere"))
        return opened[0]

    trackers = Trackers({"one": slow}, a_run(tmp_path), say)
    for step in (1, 2, 3):
        trackers.record({**STEP, "step": step})
    trackers.close()
    assert said == ["waiting for one to start, so that what was recorded goes there, too"]
    assert opened[0].logged == [1, 2, 3]


def test_a_note_that_cannot_be_read_stops_the_tracker_alone(tmp_path: Path) -> None:
    (tmp_path / "tracker-one.txt").write_bytes(b"\xff")
    (text,) = report(lambda _: Broken("nowhere"), a_run(tmp_path, step=1), STEP)
    assert text.startswith("tracker one failed: 'utf-8' codec can't decode byte 0xff")


def test_a_tracker_that_falls_behind_is_given_up(tmp_path: Path, released: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_threads, "MOST_WAITING", 2)
    said = report(lambda _: Broken("log", released), a_run(tmp_path), *[STEP] * 9)
    assert said == ["tracker one is 2 steps behind; the run goes on without it, and metrics.jsonl has everything"]


def test_pictures_come_with_the_first_step_and_then_seldom(tmp_path: Path) -> None:
    with_pictures: list[int] = []

    class Noting(Broken):
        def log(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
            if pictures:
                with_pictures.append(step)

    report(lambda _: Noting("nowhere"), a_run(tmp_path), an_eval(0, 1.0), *({**STEP, "step": step} for step in range(1, 120)))
    assert with_pictures == [1, 51, 101]


def test_what_is_not_installed_is_refused(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("wandb", "mlflow") else object())
    config = load_config(workshop / "config.yaml", ("report_to=[wandb,trackio,mlflow]",), claim_output=False)
    with pytest.raises(
        UserError, match=r"^report_to: wandb, mlflow: not installed\n  pip install wandb mlflow, or leave out of report_to$"
    ):
        check_machine(config)
    check_trackers(("trackio",))
    with pytest.raises(ConfigError, match=r"report_to\[0\]: must be one of tensorboard, .*got wand\n.*did you mean wandb\?"):
        load_config(workshop / "config.yaml", ("report_to=[wand]",), claim_output=False)
    with pytest.raises(ConfigError, match="report_to: names a tracker twice"):
        load_config(workshop / "config.yaml", ("report_to=[wandb,wandb]",), claim_output=False)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_with_the_package_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Two runs of one tracker, the second of which goes on with the first; names that a tracker refuses are changed."""
    monkeypatch.chdir(tmp_path)
    for variable, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(variable, value)
    pytest.importorskip(name, reason=f"{name} is not installed, so that its adapter is held to a stand-in alone")
    odd = {**an_eval(1, 2.0), "sources": {"chats (1)": {"loss": 2.0, "accuracy": 0.5}}}
    for step in (0, 1):
        assert report(ADAPTERS[name], a_run(tmp_path, step), STEP, odd) == []
    assert (tmp_path / "tracker-one.txt").read_text(encoding="utf-8").strip()
