"""Names of a sweep's runs, which are the names of their folders: readable, unique, and safe on every file system."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256

LONGEST = 64
"""characters that the last component of output_dir may have"""
_DIGEST = 8
_NUMBER = re.compile(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?")


def column_names(keys: Sequence[str]) -> dict[str, str]:
    """Return for each dotted key the shortest end of it that no other of the keys ends with: r for lora.r."""
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
        names[key] = next((end for end in ends if not any(_ends_with(other, end) for other in keys if other != key)), key)
    return names


def run_names(runs: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a name for each run, such as learning_rate-1e-4_r-8.

    Where two runs' names would be the same, or one would be too long, part of a digest of the values stands at its end. A name depends on
    the keys that vary and on the run's own values; other values of other runs leave it as it is, unless they make it ambiguous.

    Args:
        runs: of each run the values that set it apart, as text, by dotted keys; a name that the user has given to the values stands under
            the key "". No two are equal.
    """
    columns = column_names(list(dict.fromkeys(key for values in runs for key in values)))
    plain = ["_".join(f"{columns[key]}-{_safe(text)}" if key else text for key, text in values.items()) for values in runs]
    twice = {name for name, count in Counter(name.lower() for name in plain).items() if count > 1}
    return [
        _with_digest(name, values) if len(name) > LONGEST or name.lower() in twice else name
        for name, values in zip(plain, runs, strict=True)
    ]


def _ends_with(key: str, end: str) -> bool:
    return key == end or key.endswith("." + end)


def _safe(text: str) -> str:
    """A value as a part of a folder's name; of a path, its last two components."""
    if _NUMBER.fullmatch(text):
        return text.replace("+", "")
    text = "/".join(text.split("/")[-2:])
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")


def _with_digest(name: str, values: Mapping[str, str]) -> str:
    digest = sha256("\n".join(f"{key}={text}" for key, text in values.items()).encode()).hexdigest()[:_DIGEST]
    return f"{name[: LONGEST - _DIGEST - 1].rstrip('-_.')}-{digest}"
