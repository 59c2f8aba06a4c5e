"""Checks of the machine find what is wrong, with files and limits in the place of the machine's own."""

from __future__ import annotations

import resource
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from hecate.apps.check.doctor import machine
from hecate.apps.check.doctor.finding import Finding

_GIB_IN_KB = 1024 * 1024


def test_little_memory_is_a_problem_and_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(machine, "_MEMINFO", meminfo)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    meminfo.write_text(f"MemAvailable: {8 * _GIB_IN_KB} kB\n", encoding="ascii")
    assert machine.memory() == Finding("ok", "8.0 GiB free")
    (tmp_path / "memory.max").write_text(str(1024**3), encoding="ascii")
    assert (machine.memory().state, machine.memory().what) == ("problem", "1.0 GiB free")


def test_roots_rights_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert machine.account() == Finding("ok", "user 1000, not root")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert machine.account().state == "warning"


def test_a_containers_share_of_the_cores_is_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hecate.ranks.cores._CGROUP", tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    (tmp_path / "cpu.max").write_text("max 100000\n", encoding="ascii")
    assert machine.cores() == Finding("ok", "64 of 64")
    (tmp_path / "cpu.max").write_text("400000 100000\n", encoding="ascii")
    assert machine.cores() == Finding("ok", "4 of 64")


@pytest.mark.parametrize(("given", "state"), [(None, "ok"), ("1", "ok"), ("9", "warning"), ("0", "problem"), ("many", "problem")])
def test_threads(given: str | None, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setenv("OMP_NUM_THREADS", given) if given else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert machine.threads().state == state


def test_limits_say_how_they_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 65536))
    assert machine.open_files() == Finding("warning", "256 at most", "many ranks need more connections: ulimit -n 65536")
    assert machine.processes() == Finding("warning", "256 at most", "threads count, too: ulimit -u 65536")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert machine.open_files() == Finding("ok", "unlimited at most")


def test_infiniband_needs_locked_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_INFINIBAND", tmp_path)
    assert machine.locked_memory().state == "skipped"
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    assert machine.locked_memory().state == "problem"


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert machine.working_folder().what.startswith(f"{tmp_path}: ")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "none"))
    found = machine.temporary_folder()
    assert (found.state, found.what) == ("problem", f"{tmp_path / 'none'}: No such file or directory")
    assert found.mend == "set TMPDIR to a folder that can be written"


def test_a_name_that_is_unknown_or_slowly_looked_up_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise socket.gaierror

    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(socket, "gethostbyname", unknown)
    assert machine.host_name().what == "node7 is not known to this machine"
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "10.0.0.7")
    assert machine.host_name() == Finding("ok", "node7 is 10.0.0.7")


def test_a_wrong_clock_and_a_closed_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise OSError("not permitted")

    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((1970, 1, 1, 0, 0, 7, 3, 1, 0)))
    assert machine.clock().state == "warning"
    assert machine.loopback().state == "ok"
    monkeypatch.setattr(socket, "create_server", closed)
    assert machine.loopback().what == "127.0.0.1: not permitted"
