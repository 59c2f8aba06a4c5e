"""Reads what a run has written of itself into a manifest, without believing it: its configuration, and the owners of its experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hecate.checkpoint.files import CheckpointError
from hecate.checkpoint.manifest import MANIFEST, Manifest
from hecate.errors import UserError
from hecate.io.strict_yaml import YamlError, parse_yaml
from hecate.parallel.values.units import Unit, parse_unit


@contextmanager
def reading_meta(folder: Path) -> Iterator[None]:
    """Read a manifest's `meta` in the block: what it lacks, or has of another kind, raises CheckpointError."""
    try:
        yield
    except YamlError as error:
        raise CheckpointError(f"{folder / MANIFEST}: the configuration in it is damaged: {error}\n  take another checkpoint") from error
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"{folder / MANIFEST}: what its run says there is damaged: {reason}\n  take another checkpoint") from error


SAVED_AT = "saved_at"
"""The key of the time when rank 0 began to save, in whole seconds since 1970."""


CHAT_TEMPLATE = "chat_template"
"""The key of the template in which the run writes conversations; an empty text: its tokenizer's own."""


LOSS = "loss"
"""The key of the name of a calling program's loss; it is absent where the cross-entropy was trained for."""


def template_in(folder: Path, meta: Any) -> str:
    """Return the chat template that a run has in place of its tokenizer's own; empty: none, or its version had no such choice.

    Raises:
        CheckpointError: it is no text.
    """
    with reading_meta(folder):
        found = meta.get(CHAT_TEMPLATE, "")
        if not isinstance(found, str):
            raise TypeError("the chat template is no text")
        return found


def saved_at(meta: Any) -> int | None:
    """Return when a checkpoint was saved, in seconds since 1970, as its run says; None: it does not, as those of early versions."""
    when = meta.get(SAVED_AT) if isinstance(meta, dict) else None
    return when if type(when) is int and 0 <= when < 2**37 else None


def config_text(folder: Path, meta: Any) -> str:
    """Return the run's configuration as YAML. Raises CheckpointError: there is none."""
    with reading_meta(folder):
        text = meta["config"]
        if not isinstance(text, str):
            raise TypeError("the configuration is no text")
        return text


def config_values(folder: Path, meta: Any) -> Mapping[str, Any]:
    """Return the run's configuration as nested mappings. Raises CheckpointError: there is none."""
    with reading_meta(folder):
        found = parse_yaml(config_text(folder, meta))
        if not isinstance(found, Mapping):
            raise TypeError("the configuration is no mapping")
        return found


def owners_of(folder: Path, manifest: Manifest) -> dict[Unit, np.ndarray]:
    """Return the rank that owns each expert, [experts] of each unit. Raises CheckpointError: an owner is no rank of the run."""
    with reading_meta(folder):
        owners = {parse_unit(text): np.array(owner_E) for text, owner_E in manifest.meta["owners"].items()}
        for unit, owner_E in owners.items():
            if owner_E.ndim != 1 or owner_E.dtype != np.int64 or not ((owner_E >= 0) & (owner_E < manifest.world_size)).all():
                raise TypeError(f"the owners of unit {unit} are no ranks")
        return owners
