"""The program of `hecate ray` around its controller (`hecate.launch.ray_job.driver`), without Ray."""

from __future__ import annotations

import io
import signal
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from hecate.launch.local_launcher import STOPPING
from hecate.launch.ray_job.driver import _stop_on_signals


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
