"""The error of everything that can go wrong between a checkpoint and its disk."""

from hecate.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or cannot be trusted when read. Names the file, and the tensor if any."""
