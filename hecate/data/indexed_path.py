"""Which paths mean an indexed data set, that is two files, PREFIX.idx and PREFIX.bin."""

import os

SUFFIXES = (".idx", ".bin")


def indexed_prefix(path: str) -> str | None:
    """PREFIX of the data set that is meant by PREFIX.idx, PREFIX.bin, or PREFIX where only those are there; None: none is meant."""
    if path.endswith(SUFFIXES):
        return path[:-4]
    return path if not os.path.isfile(path) and all(os.path.isfile(path + suffix) for suffix in SUFFIXES) else None
