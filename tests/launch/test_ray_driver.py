"""The programs of `hecate ray` around its controller (`hecate.launch.ray_job.driver`), and of `hecate submit`, without Ray."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hecate.errors import UserError
from hecate.launch.local_launcher import STOPPING
from hecate.launch.ray_job import submit
from hecate.launch.ray_job.driver import _stop_on_signals
from testing.tiny_run import make_workshop


class InterruptedWrite(io.RawIOBase):
    """A stream whose first write is interrupted by a signal."""

    signals: tuple[int, ...] = (signal.SIGTERM,)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        numbers, self.signals = self.signals, ()
        for number in numbers:
            signal.raise_signal(number)
        return len(data)


def test_a_signal_in_the_midst_of_a_line_to_stderr_stops_the_job(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    controller = SimpleNamespace(stop_wanted=False)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(InterruptedWrite())))
    with _stop_on_signals(controller) as signals:
        print("a warning", file=sys.stderr, flush=True)
    assert signals == [signal.SIGTERM]
    assert controller.stop_wanted
    assert capfd.readouterr().err == STOPPING


@pytest.mark.parametrize(("mode", "passed"), [("disabled", "disabled"), ("token", None)])
def test_a_job_is_told_how_its_cluster_authenticates_and_never_a_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, passed: str | None
) -> None:
    workshop, given = make_workshop(tmp_path), {}

    class Client:
        def submit_job(self, *, entrypoint: str, runtime_env: dict[str, Any]) -> str:
            given.update(runtime_env["env_vars"], entrypoint=entrypoint)
            return "job"

    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the secret")
    monkeypatch.setattr(submit, "_client", lambda _: Client())
    monkeypatch.setattr(submit, "_follow", lambda *_: 0)
    assert submit.submit(workshop / "config.yaml", [], "http://127.0.0.1:1", working_dir=workshop) == 0
    assert given["entrypoint"] == "python -m hecate ray config.yaml"
    assert given.get("RAY_AUTH_MODE") == passed
    assert "the secret" not in given.values()


def test_a_cluster_that_takes_no_job_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As one whose agent has not started yet, or has no port."""
    workshop = make_workshop(tmp_path)

    class Client:
        def submit_job(self, **_: Any) -> str:
            raise RuntimeError("Request failed with status code 500:\nNo available agent to submit job")

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(submit, "_client", lambda _: Client())
    with pytest.raises(UserError, match="Ray takes no job: Request failed with status code 500: No available agent"):
        submit.submit(workshop / "config.yaml", [], "http://127.0.0.1:1", working_dir=workshop)
