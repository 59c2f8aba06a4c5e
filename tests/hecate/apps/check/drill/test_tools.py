"""What drills are judged with notices what it is to notice."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hecate.apps.check.drill.cases import saves
from hecate.apps.check.drill.processes import runs, tcp_addresses, wait_until_gone
from hecate.apps.check.drill.ranks import OVERRIDES, difference, loss_difference, settings
from hecate.apps.check.drill.tiny_run import write_samples
from hecate.apps.check.drill.tiny_training import Held, digests
from hecate.cli import drills


def test_later_settings_take_the_place_of_earlier_ones() -> None:
    given = settings("max_steps=3", "moe.num_experts=2", "moe.num_experts=4")
    assert given.count("moe.num_experts=4") == 1
    assert len(given) == len(OVERRIDES) + 1


def test_a_difference_is_the_largest_and_what_is_missing_counts() -> None:
    mine = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(0)}
    assert difference(mine, {"a": torch.tensor([1.5, 2.0]), "b": torch.zeros(0)}) == 0.5
    assert difference(mine, {"a": mine["a"]}) == float("inf")
    assert difference(mine, {"a": torch.zeros(3), "b": mine["b"]}) == float("inf")
    assert loss_difference({1: [1.0, 2.0]}, {1: [1.0, 2.25]}) == 0.25
    assert loss_difference({1: [1.0]}, {1: [1.0], 2: [1.0]}) == float("inf")


def test_a_changed_bit_of_what_is_held_is_named() -> None:
    first = Held({"a": torch.tensor([0.0]), "b": torch.tensor([float("nan")])})
    assert first.changed(Held({"a": torch.tensor([0.0]), "b": torch.tensor([float("nan")])})) == []
    assert first.changed(Held({"a": torch.tensor([-0.0]), "c": torch.tensor([1.0])})) == ["a", "b", "c"]


def test_a_torn_or_mixed_checkpoint_is_noticed(tmp_path: Path) -> None:
    saves.save(tmp_path, 1, 1.0)
    saves.save(tmp_path, 2, 2.0)
    assert saves.check_whole(tmp_path, (2.0,)) == ""
    assert saves.check_whole(tmp_path, (200.0,)) == "the new checkpoint has other numbers"
    assert len(digests(tmp_path / "checkpoint-2")) == 4
    (tmp_path / "checkpoint-2" / "COMMIT").unlink()
    assert "not whole" in saves.check_whole(tmp_path, (2.0,))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: /proc")
def test_sockets_processes_and_files_that_are_left_are_found(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.2", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert "127.0.0.2" in tcp_addresses([os.getpid()])
        assert client.getpeername()[0] in tcp_addresses([os.getpid()], listening=False)
    assert "127.0.0.2" not in tcp_addresses([os.getpid()])
    with subprocess.Popen(["sleep", "60"]) as process:
        assert runs(process.pid)
        (tmp_path / "file").touch()
        assert wait_until_gone([process.pid], tmp_path, 0.0) == [str(process.pid), str(tmp_path / "file")]
        process.kill()
    (tmp_path / "file").unlink()
    assert wait_until_gone([process.pid], tmp_path) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: /proc")
def test_idle_ranks_wait_for_a_signal(tmp_path: Path) -> None:
    """`python -m hecate.apps.check.drill.idle`, which R22 starts fifty times."""
    with subprocess.Popen([sys.executable, "-m", "hecate.apps.check.drill.idle", "2", str(tmp_path)], stderr=subprocess.DEVNULL) as process:
        while len(list(tmp_path.iterdir())) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) != 0


def test_the_tiny_data_are_conversations(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.jsonl", ["ab", "c"], str.upper)
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8").count('"content": "AB"') == 1


def test_the_verb_says_what_its_exit_status_means() -> None:
    assert "Exit status 1" in (inspect.getdoc(drills.drill) or "")
