"""`hecate federate` as its users start it: what it prints, writes, counts, refuses, and how it goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hecate.adapters.sets.set_files import read_set
from hecate.apps.federate.base import vector_shape
from hecate.apps.federate.before_round import stacked_rank
from hecate.apps.federate.checks import RECIPE, check_federated, keep_recipe
from hecate.apps.federate.codec import HEADER_BYTES, encode
from hecate.apps.federate.held_out import held_out_figures
from hecate.apps.federate.records import RoundRecord, read_rounds
from hecate.apps.federate.rounds import federate
from hecate.apps.federate.section.settings import RoundsConfig
from hecate.config.rules.of_apps import refuse_training
from hecate.errors import UserError
from testing.answering import answer
from testing.byte_tokenizer import TEMPLATE
from tests.hecate.apps.federate.making import UNEQUAL, recipe, write_recipe
from tests.hecate.train.command_line import hecate, run, workshop

__all__ = ["workshop"]  # a fixture

FILE = "adapter_model.safetensors"
HELD_OUT = (
    "rounds.clients=[{{data: {folder}/up.train.jsonl, eval: {folder}/up.eval.jsonl, name: up}}, "
    "{{data: {folder}/echo.train.jsonl, eval: {folder}/echo.eval.jsonl, name: echo}}]"
)


def words(workshop: Path, name: str, *overrides: str) -> list[str]:
    given = [override.format(folder=workshop) for override in overrides]
    return ["federate", str(write_recipe(workshop)), f"output_dir={workshop}/runs/{name}", *given]


def of(workshop: Path, name: str, adapter: str) -> dict[str, torch.Tensor]:
    return load_file(workshop / "runs" / name / adapter / FILE)


def records(workshop: Path, name: str) -> list[RoundRecord]:
    return read_rounds(workshop / "runs" / name)


def test_rounds_end_in_an_ordinary_adapter(workshop: Path) -> None:
    """One round of a step: parts by the numbers of records, and the bytes of the files."""
    template = workshop / "own.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    given = ("rounds.count=1", "rounds.local_steps=1", "rounds.codec.up=0.25", f"data.chat_template={template}")
    printed = run(*words(workshop, "short", *given)).stdout
    (record,) = records(workshop, "short")
    assert "hecate: round 1/1 | 3 clients | error " in printed
    total = 120 + 120 + 6
    assert record.weights == pytest.approx({"up": 120 / total, "echo": 120 / total, "few": 6 / total})
    messages = workshop / "runs/short/round-1/messages"
    for counted, way in ((record.bytes_down, "down"), (record.bytes_up, "up")):
        assert counted == {name: (messages / f"{name}.{way}").stat().st_size for name in ("up", "echo", "few")}
    numbers = 2 * 4 * (32 + 32 + 48 + 32)
    assert record.bytes_down["up"] == HEADER_BYTES + 8 * numbers
    assert record.bytes_up["up"] == HEADER_BYTES + numbers // 8 + 8 * numbers // 4
    assert isinstance(answer(workshop / "runs/short/adapter", "w1x1", system=None, model=None, max_new_tokens=2), str)
    assert f"wrote {workshop}/runs/short/adapter" in printed
    assert (workshop / "runs/short/adapter/chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE, "that of its training"


@pytest.mark.slow
def test_processes_of_their_own_make_the_same_adapters(workshop: Path) -> None:
    together = run(*words(workshop, "together", HELD_OUT)).stdout
    run(*words(workshop, "apart", HELD_OUT, "rounds.isolation=process"))
    for adapter in ("round-1/received/echo", "round-2/received/up", "adapter"):
        ours, theirs = of(workshop, "together", adapter), of(workshop, "apart", adapter)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-10)
    first, second = records(workshop, "together")
    for ours, theirs in zip((first, second), records(workshop, "apart"), strict=True):
        assert (ours.bytes_up, ours.bytes_down, ours.weights) == (theirs.bytes_up, theirs.bytes_down, theirs.weights)
        for name in ("union", "up", "echo"):
            assert ours.held_out[name] == {data: pytest.approx(figures) for data, figures in theirs.held_out[name].items()}
    assert first.aggregation_error > 0.01, "averages of different A should not be exact"
    assert first.average_error == first.aggregation_error
    assert second.held_out["union"]["up"]["loss"] < first.held_out["union"]["up"]["loss"]
    assert "loss of the union" in together


@pytest.mark.slow
def test_each_client_may_be_a_job_on_ray(workshop: Path) -> None:
    pytest.importorskip("ray")
    given = ("rounds.count=1", "rounds.local_steps=2", "rounds.isolation=process")
    run(*words(workshop, "here", *given))
    run(*words(workshop, "on-ray", *given, "ray.workers=1", "--address", "local"))
    log = (workshop / "runs/on-ray/round-1/runs/sweep/up.log").read_text(encoding="utf-8")
    assert "hecate: generation 0: 1 ranks from step 0" in log
    here, on_ray = (of(workshop, name, "adapter") for name in ("here", "on-ray"))
    assert here.keys() == on_ray.keys()
    assert all(torch.equal(here[name], on_ray[name]) for name in here)


@pytest.mark.slow
def test_terms_of_any_ranks_are_merged_exactly_and_clients_drop_out(workshop: Path) -> None:
    stacks = ("rounds.aggregate=stack", "rounds.merge_into_base=true", "rounds.drop=['1:echo']", "model.dtype=float32")
    printed = run(*words(workshop, "stack", UNEQUAL, *stacks)).stdout
    first, second = records(workshop, "stack")
    assert "without echo" in printed
    assert (first.dropped, set(first.weights), first.weights["up"]) == (("echo",), {"up", "few"}, pytest.approx(120 / 126))
    assert (second.dropped, set(second.weights)) == ((), {"up", "echo", "few"})
    for record in (first, second):
        assert record.aggregation_error < 1e-6 < 0.01 < record.average_error
    config = recipe(workshop, "stack", UNEQUAL, *stacks)
    assert (stacked_rank(config, first), stacked_rank(config, second)) == (5, 7)
    numbers = 5 * 2 * (32 + 32 + 48 + 32)
    assert first.bytes_down == {"up": 0, "few": 0}
    assert second.bytes_down == dict.fromkeys(("up", "echo", "few"), HEADER_BYTES + 4 * numbers)
    whole = read_set(workshop / "runs/stack/adapter")
    assert (whole.rank, whole.description.base_model_name_or_path) == (12, f"{workshop}/model")
    base, merged = (load_file(folder / "model.safetensors") for folder in (workshop / "model", workshop / "runs/stack/round-2/base"))
    union = read_set(workshop / "runs/stack/round-1/union")
    for module in union.sizes:
        terms = union.read(module)
        wanted = base[f"{module}.weight"].double() + terms.b_Or @ terms.a_rI
        torch.testing.assert_close(merged[f"{module}.weight"].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_run_that_was_stopped_in_a_round_goes_on_to_the_same_result(workshop: Path) -> None:
    overrides = ("rounds.local_steps=12", "save_steps=2", "rounds.isolation=process", "rounds.server.learning_rate=0.5")
    run(*words(workshop, "whole", *overrides))
    arguments = words(workshop, "stopped", *overrides)
    runs = workshop / "runs/stopped/round-2/runs"
    with subprocess.Popen(hecate(*arguments), stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while not list(runs.glob("echo/checkpoint-*/COMMIT")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "stopped in round 2; the same command with resume=true goes on" in printed
    assert len(records(workshop, "stopped")) == 1
    up = (runs / "up/adapters/up" / FILE).stat().st_mtime_ns
    printed = run(*arguments, "resume=true").stdout
    assert "hecate: echo: goes on" in printed
    assert "hecate: up: " not in printed
    assert (runs / "up/adapters/up" / FILE).stat().st_mtime_ns == up
    assert [replaced(one) for one in records(workshop, "stopped")] == [replaced(one) for one in records(workshop, "whole")]
    for name, tensor in of(workshop, "whole", "adapter").items():
        torch.testing.assert_close(of(workshop, "stopped", "adapter")[name], tensor, rtol=0, atol=1e-12)


def replaced(record: RoundRecord) -> dict[str, Any]:
    """What of a round does not depend on the clock."""
    return {name: value for name, value in vars(record).items() if name != "seconds"}


def fake_client(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Clients whose processes are this shell script."""
    monkeypatch.setattr("hecate.apps.federate.rounds.PROGRAM", ("sh", "-c", script))


def test_a_client_that_fails_drops_out_and_a_mistake_stops(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(workshop, "failing", "rounds.isolation=process", "rounds.count=1")
    said: list[str] = []
    fake_client(workshop, monkeypatch, "echo 'UserError: no such thing'; exit 2")
    with pytest.raises(UserError, match=r"up: its training has failed: status 2: UserError: no such thing\n  mend it.*resume=true"):
        federate(config, ["train"], said.append)
    fake_client(workshop, monkeypatch, "exit 1")
    with pytest.raises(UserError, match="up: its training has failed: status 1: "):
        federate(config, ["train"], said.append)
    message = encode(torch.ones(vector_shape(config).numel, dtype=torch.float64), 1.0)
    for name in ("up", "echo"):
        (workshop / f"runs/failing/round-1/messages/{name}.up").write_bytes(message)
    fake_client(workshop, monkeypatch, 'case "$1" in *few*) echo "RuntimeError: lost"; exit 1;; esac')
    assert federate(config, ["train"], said.append) == 0
    assert "few: drops out of this round: status 1: RuntimeError: lost" in said
    (record,) = records(workshop, "failing")
    assert (record.dropped, record.weights) == (("few",), {"up": 0.5, "echo": 0.5})


def test_what_cannot_be_is_said_before_anything_starts(workshop: Path) -> None:
    config = recipe(workshop, "refused")
    with pytest.raises(UserError, match=r"rounds.clients: are trained by hecate federate"):
        refuse_training(config)
    with pytest.raises(UserError, match=r"(?s)rounds.clients: must be given: hecate federate trains clients.*hecate train trains without"):
        check_federated(replace(config, rounds=RoundsConfig()), lambda one: None)
    folder = workshop / "runs/refused"
    folder.mkdir(parents=True)
    (folder / "other").touch()
    resumed = recipe(workshop, "refused", "resume=true")
    with pytest.raises(UserError, match=rf"is not the folder of a federated run: it has no {RECIPE}"):
        check_federated(resumed, lambda one: None)
    empty = workshop / "empty.jsonl"
    empty.touch()
    without = recipe(workshop, "refused", "rounds.clients=[{{data: {folder}/up.train.jsonl}}, {{data: {folder}/empty.jsonl}}]")
    with pytest.raises(UserError, match=r"rounds.clients: empty has no samples: .*is empty"):
        federate(without, ["train"], print)
    assert not (folder / RECIPE).exists()


def test_a_resumed_run_computes_the_same(workshop: Path) -> None:
    keep_recipe(recipe(workshop, "changed"))
    more = recipe(workshop, "changed", "resume=true", "rounds.count=5", "save_steps=7", "rounds.drop=['5:up']")
    check_federated(more, lambda one: None)
    other = recipe(workshop, "changed", "resume=true", "rounds.local_steps=4")
    with pytest.raises(UserError, match=r"was begun with other values: max_steps was 3, and is 4 now\n  take another output_dir"):
        check_federated(other, lambda one: None)
    with pytest.raises(UserError, match="nproc was 1, and is 2 now"):
        check_federated(replace(more, nproc=2), lambda one: None)
    (workshop / "runs/changed/round-1/runs/together").mkdir(parents=True)
    with pytest.raises(UserError, match=r"rounds\.drop: cannot change in round 1, which has begun"):
        check_federated(more, lambda one: None)
    with pytest.raises(UserError, match="takes no path with a comma"):
        check_federated(replace(more, output_dir=f"{workshop}/lr=1,r=8/rounds"), lambda one: None)


def test_a_failed_evaluation_says_where_to_look(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(workshop, "unevaluated", HELD_OUT)
    (workshop / "runs/unevaluated/round-1").mkdir(parents=True)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "ValueError: no\n"))
    with pytest.raises(UserError, match=r"of round 1 were not evaluated: ValueError: no\n  see .*held_out.log"):
        held_out_figures(config, 1, {"union": Path("x")})
    models = [{"name": "x", "tasks": {"up": {"samples": 3, "loss": 1.5}}}]
    (workshop / "runs/unevaluated/round-1/held_out.json").write_text(json.dumps({"models": models}))
    assert held_out_figures(config, 1, {"union": Path("x")}) == {"union": {"up": {"loss": 1.5}}}
