"""Calls in a thread of their own come in order, and end with one that raises."""

from __future__ import annotations

from hecate.report.tracking.call_thread import CallThread


def test_calls_are_made_one_after_another_until_one_raises() -> None:
    thread, made = CallThread("calls", 10), list[int]()

    def fail() -> None:
        raise KeyError("gone")

    assert all(thread.hand_over(call) for call in (lambda: made.append(1), lambda: made.append(2), fail, lambda: made.append(3)))
    thread.end()
    assert thread.wait(60)
    assert (made, thread.error, thread.silent_for) == ([1, 2], "'gone'", 0.0)
