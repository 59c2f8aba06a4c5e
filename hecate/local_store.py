"""How ranks started on one machine find each other: a file, named in their environment by whoever starts them."""

from pathlib import Path

STORE_VARIABLE = "HECATE_STORE"
"""path of the file store; set for the ranks, never by a user"""


def error_file(store: Path, rank: int) -> Path:
    """Where a rank leaves the text of a user's mistake that rank 0 may not have met."""
    return store.with_name(f"error-{rank}")
