"""The disk of `hecate.apps.check.drill.disk`, and an end of the process that a test survives."""

from hecate.apps.check.drill.disk import OPERATIONS, watched_disk, write_half

__all__ = ["OPERATIONS", "Killed", "watched_disk", "write_half"]


class Killed(BaseException):
    """Stands for the end of the process: no `except Exception` or `except OSError` sees it."""
