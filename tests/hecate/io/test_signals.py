"""`on_signals` calls a handler in its block, and afterwards what was there before it is there again."""

from __future__ import annotations

import signal

import pytest

from hecate.io.signals import on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_handler_holds_in_the_block_alone(number: signal.Signals) -> None:
    come: list[int] = []
    outer: list[int] = []

    def fail_after_a_signal() -> None:
        with on_signals(lambda number, _frame: come.append(number)):
            signal.raise_signal(number)
            raise ZeroDivisionError

    with on_signals(lambda number, _frame: outer.append(number)):
        with pytest.raises(ZeroDivisionError):
            fail_after_a_signal()
        signal.raise_signal(number)
    assert (come, outer) == ([number], [number])
