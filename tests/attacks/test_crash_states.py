"""After a power cut at any moment, what was saved before is there, and what was being saved is there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hecate.apps.federate.records import RoundRecord, add_record, read_rounds
from hecate.apps.federate.server_optimizer import ServerState, load_server, save_server
from hecate.checkpoint import good_checkpoints, prune, remove_stale_staging
from hecate.config import DataSource, load_config
from hecate.data.encode import BadSamples
from hecate.data.token_cache import cached_source
from hecate.io.durable import new_folder, put_in_place, successor_of, write_durable
from hecate.launch.many_runs.ledger import STATE_FOLDER, RunState, SweepEntry, read_entries, write_entry
from hecate.ranks.ranks import join_ranks
from hecate.report.metrics import MetricsWriter, event_record
from hecate.train.loop import train
from testing.byte_tokenizer import build_byte_tokenizer
from testing.crash_states import CONTENTS, Log, lay_out, recorded, states
from testing.tiny_run import make_workshop
from tests.hecate.checkpoint.saving import holds, save, shards_of
from tests.hecate.data.making import chat, write_jsonl

EVERY = 5
"""of `make test`, which looks at one state in so many"""


def explore(log: Log, place: Path, check: Callable[[], None], every: int) -> int:
    """Lay out the states one after another, and check each; how many there were."""
    count = 0
    for number, (what, state) in enumerate(states(log)):
        if number % every:
            continue
        lay_out(state, place)
        try:
            check()
        except BaseException as error:
            raise AssertionError(f"{what}: {sorted(state)}: {type(error).__name__}: {error}") from error
        count += 1
    assert count > 1
    return count


each_and_some = pytest.mark.parametrize("every", [EVERY, pytest.param(1, marks=pytest.mark.slow)])


@each_and_some
def test_checkpoints(tmp_path: Path, every: int) -> None:
    """The older one until the new one is whole, after which it is deleted; a run that begins again saves the step anew."""
    run, place = tmp_path / "run", tmp_path / "place"
    save(run, 1, shards_of(1.0))

    def write() -> None:
        save(run, 2, shards_of(2.0))
        prune(run, 1)

    def check() -> None:
        found = list(good_checkpoints(place))
        assert found, "no checkpoint is left"
        for folder in found:
            assert holds(folder, shards_of(float(folder.name.partition("-")[2])))
        remove_stale_staging(place)
        if (place / "checkpoint-2").exists() and place / "checkpoint-2" not in found:
            raise AssertionError("a checkpoint of that name is damaged")
        if place / "checkpoint-2" not in found:
            save(place, 2, shards_of(2.0), "b")
        assert holds(place / "checkpoint-2", shards_of(2.0))

    explore(recorded(run, write), place, check, every)


@each_and_some
def test_metrics_of_a_run_that_saves(tmp_path: Path, every: int) -> None:
    """Every record up to the newest checkpoint is there; what is damaged goes, or is kept under another name, and the run goes on."""
    run, place = tmp_path / "run", tmp_path / "place"
    run.mkdir()

    def write() -> None:
        with MetricsWriter(run / "metrics.jsonl") as metrics:
            for step in range(1, 5):
                metrics.write({"kind": "step", "step": step, "loss": 1.0})
                if step % 2 == 0:
                    metrics.write(event_record(step, f"saved checkpoint-{step}"))
                    metrics.sync()
                    save(run, step, shards_of(float(step)))

    def check() -> None:
        newest = max([0, *(int(folder.name.partition("-")[2]) for folder in good_checkpoints(place))])
        with MetricsWriter(place / "metrics.jsonl") as metrics:
            metrics.truncate_after(newest)
            assert metrics.steps_without_record(newest, 1) == []
            metrics.write({"kind": "step", "step": newest + 1, "loss": 1.0})
        steps = [json.loads(line)["step"] for line in (place / "metrics.jsonl").read_text().splitlines()]
        assert [step for step in steps if step <= newest + 1] == steps

    explore(recorded(run, write), place, check, every)


@each_and_some
def test_an_adapter_that_takes_the_place_of_another(tmp_path: Path, every: int) -> None:
    run, place = tmp_path / "run", tmp_path / "place"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "weights").write_bytes(b"old" * 100)

    def write() -> None:
        successor = successor_of(run / "adapter")
        with new_folder(successor) as staging:
            write_durable(staging / "weights", [b"new" * 100])
        put_in_place(successor, run / "adapter")

    def check() -> None:
        assert (place / "adapter" / "weights").read_bytes() in (b"old" * 100, b"new" * 100)

    explore(recorded(run, write), place, check, every)


@each_and_some
def test_a_cache_of_tokens(tmp_path: Path, every: int) -> None:
    """A folder that is not as it was written is made again; no wrong token is trained on."""
    tokenizer: Any = build_byte_tokenizer()
    data = DataSource(path=str(write_jsonl(tmp_path / "data.jsonl", [chat("q" * i, "a" * i) for i in range(1, 9)])), name="data")
    run, place = tmp_path / "run", tmp_path / "place"
    for folder in (run, place):
        (folder / "files").mkdir(parents=True)

    def open_in(folder: Path) -> list[list[int]]:
        source = cached_source(data, tokenizer, folder, seq_len=64, vocab_size=258, bad=BadSamples(speaks=False))
        return [source[number].input_ids.tolist() for number in range(len(source))]

    wanted: list[list[int]] = []
    log = recorded(run, lambda: wanted.extend(open_in(run)))

    def check() -> None:
        assert open_in(place) == wanted

    explore(log, place, check, every)


def a_round(number: int) -> RoundRecord:
    return RoundRecord(number, {"a": 1.0}, (), {"a": 1}, {"a": 1}, 0.0, 0.0, {"union": {"x": {"loss": 1.0}}}, {}, 1.0)


@each_and_some
def test_federated_rounds(tmp_path: Path, every: int) -> None:
    run, place = tmp_path / "run", tmp_path / "place"
    run.mkdir()
    vectors = {number: torch.full((4,), float(number)) for number in (1, 2)}
    add_record(run, a_round(1))
    save_server(run / "server", ServerState(vectors[1]))

    def write() -> None:
        save_server(run / "server", ServerState(vectors[2]))
        add_record(run, a_round(2))

    def check() -> None:
        rounds = [record.round for record in read_rounds(place)]
        assert rounds in ([1], [1, 2])
        held = load_server(place / "server").vector
        assert any(torch.equal(held, vector) for vector in vectors.values())
        assert len(rounds) == 1 or torch.equal(held, vectors[2]), "a round counts whose state is not there"

    explore(recorded(run, write), place, check, every)


@each_and_some
def test_the_ledger_of_a_sweep(tmp_path: Path, every: int) -> None:
    run, place = tmp_path / "run", tmp_path / "place"
    entry = SweepEntry(RunState.STARTED, "", 0.0, "seed: 1\n")
    (run / STATE_FOLDER).mkdir(parents=True)
    write_entry(str(run), "a", entry)
    runs = [SimpleNamespace(name=name, folder=str(tmp_path)) for name in "ab"]
    sweep: Any = SimpleNamespace(output_dir=str(place), runs=runs)

    def write() -> None:
        write_entry(str(run), "a", SweepEntry(RunState.FINISHED, "", 1.0, "seed: 1\n"))
        write_entry(str(run), "b", entry)

    def check() -> None:
        found = read_entries(sweep)
        assert found["a"].state in (RunState.STARTED, RunState.FINISHED)

    explore(recorded(run, write), place, check, every)


def test_a_writer_that_does_not_sync_is_found_out(tmp_path: Path) -> None:
    """The explorer itself: a file that is renamed into its place without fsync is lost, zeros or a half in some state."""
    run, place = tmp_path / "run", tmp_path / "place"
    run.mkdir()
    (run / "a").write_bytes(b"old!")

    def write() -> None:
        descriptor = os.open(run / "b", os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(descriptor, b"new!")
        os.close(descriptor)
        os.rename(run / "b", run / "a")

    left = []
    for _, state in states(recorded(run, write)):
        lay_out(state, place)
        left.append((place / "a").read_bytes() if (place / "a").exists() else None)
    assert {b"old!", b"new!", b"", bytes(4), b"ne"} <= set(left)
    assert len(CONTENTS) == 4


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_bits_from_what_a_power_cut_has_left(tmp_path: Path) -> None:
    """A whole run, its metrics, checkpoints and adapter; each state is resumed, and trains to the same end."""
    workshop = make_workshop(tmp_path / "workshop")
    run, place = tmp_path / "run", tmp_path / "place"
    run.mkdir()
    given = ["max_steps=4", "save_steps=1", "save_total_limit=2", "data.eval=[]", "eval.on_start=false", "eval.generate=false"]

    def train_in(folder: Path, *more: str) -> None:
        config = load_config(workshop / "config.yaml", [f"output_dir={folder}", *given, *more], claim_output=False)
        with join_ranks() as ranks:
            assert train(config, ranks)

    def left_in(folder: Path) -> dict[str, bytes]:
        tensors = [*(folder / "checkpoint-4").glob("*.safetensors"), *(folder / "adapter").glob("*.safetensors")]
        return {str(file.relative_to(folder)): file.read_bytes() for file in tensors}

    log = recorded(run, lambda: train_in(run))
    wanted = left_in(run)
    assert len(wanted) == 2

    def check() -> None:
        begun = any(good_checkpoints(place)) or (place / "config.yaml").is_file()
        train_in(place, *(["resume=true"] if begun else []))
        assert left_in(place) == wanted
        steps = [one["step"] for line in (place / "metrics.jsonl").read_text().splitlines() if (one := json.loads(line))["kind"] == "step"]
        assert steps == sorted(set(steps)), steps

    explore(log, place, check, max(1, len(list(states(log))) // 60))
