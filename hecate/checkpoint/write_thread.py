"""Write in a thread beside the training. The thread sends no messages: ranks agree about it in the messages that they exchange anyway."""

import threading
from collections.abc import Callable

from hecate.checkpoint.files import CheckpointError


class WriteThread:
    """One call of a function that works on files, in a thread of its own, which begins at once."""

    def __init__(self, write: Callable[[Callable[[], None]], None]) -> None:
        """Begin. `write`: it gets a function to call now and then, which raises CheckpointError once the write is to be broken off."""
        self._broken_off = threading.Event()
        self._failure: BaseException | None = None
        # A daemon: a process that ends for another reason does not wait for the disk. What is not committed then counts as never written.
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint writer", daemon=True)
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        return self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        return not self.is_writing and self._failure is not None

    def ends_within(self, seconds: float) -> bool:
        """Wait for so long at most, and return whether it has ended."""
        self._thread.join(seconds)
        return not self.is_writing

    def wait(self) -> None:
        """Wait until it has ended, and raise what it has raised."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def break_off(self) -> None:
        """Have it end as soon as possible, and wait for that. Raises nothing."""
        self._broken_off.set()
        self._thread.join()

    def _run(self, write: Callable[[Callable[[], None]], None]) -> None:
        try:
            write(self._go_on)
        except BaseException as error:  # noqa: BLE001  (raised where it is waited for)
            self._failure = error

    def _go_on(self) -> None:
        if self._broken_off.is_set():
            raise CheckpointError("this rank's part of the save was broken off, because another rank was lost or could not write")
