"""Data files and configurations that cannot be used: R16, R17."""

from __future__ import annotations

import gzip
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from hecate.config import ConfigError, load_config
from hecate.config.schema import LEAVES, RANGES, DataSource
from hecate.data.encode import EncodedSource
from hecate.data.sources import read_source
from hecate.drill.outcome import DrillCase, DrillOutcome, Scope, outcome_of, worst
from hecate.drill.tiny_run import build_byte_tokenizer
from hecate.errors import UserError


def _chat(*contents: Any) -> bytes:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return json.dumps({"messages": turns}).encode() + b"\n"


_LENGTH = 256
_GOOD = [_chat("q", letter) for letter in "abcd"]
_LINES: dict[str, tuple[bytes, str]] = {
    "torn JSON": (b'{"messages": [{"role": "user"\n', "not valid JSON"),
    "no JSON": (b"once upon a time\n", "not valid JSON"),
    "bad UTF-8": (b'{"messages": "\xff\xfe"}\n', "not UTF-8"),
    "a number": (b"12\n", "JSON number"),
    "a list": (b"[1]\n", "JSON list"),
    "null": (b"null\n", ""),
    "no messages": (b"{}\n", "no 'messages'"),
    "messages are text": (b'{"messages": "hello"}\n', ""),
    "messages are empty": (b'{"messages": []}\n', ""),
    "a role that nobody has": (b'{"messages": [{"role": "robot", "content": "q"}, {"role": "assistant", "content": "a"}]}\n', ""),
    "content is a number": (b'{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "a"}]}\n', ""),
    "no answer": (_chat("q"), "no assistant turn"),
    "an empty answer": (_chat("q", " \n"), "an assistant turn is empty"),
    "an answer without a question": (b'{"messages": [{"role": "assistant", "content": "a"}]}\n', "begins with an assistant turn"),
    "nothing to learn": (_chat("q", ""), ""),
    "too long": (_chat("q", "a" * 400), "more than data.seq_len"),
    "nested 100,000 times": (b'{"messages": ' + b"[" * 100_000 + b"\n", ""),
    "NaN in it": (b'{"messages": NaN}\n', ""),
    "half of a surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}\n', ""),
}
"""a bad line among good ones, and words that its error has"""
_FILES: dict[str, tuple[str, bytes]] = {
    "an empty file": ("a.jsonl", b""),
    "blank lines only": ("a.jsonl", b"\n\n \n"),
    "a JSON list that ends early": ("a.json", b'[{"text": "a"},\n {"text": "b"\n'),
    "a list in a file of lines": ("a.jsonl", b'[\n{"text": "a"}\n]\n'),
    "zero bytes": ("a.json", b"[\0"),
    "a table that names a column twice": ("a.csv", b"text,text\na,b\n"),
    "a table with an open quote": ("a.csv", b'text\n"a\n'),
    "a packed file that is cut": ("a.jsonl.gz", gzip.compress(_GOOD[0] * 99, mtime=0)[:-9]),
    "no tensors but a picture": ("a.parquet", b"\x89PNG\r\n"),
    "keys of no format": ("a.jsonl", b'{"question": "a", "reply": "b"}\n'),
}
"""a file that cannot be read at all"""


def bad_data(scope: Scope) -> DrillOutcome:
    """R16"""
    tokenizer = build_byte_tokenizer()

    def encode(path: Path, policy: str) -> EncodedSource:
        found = read_source(
            DataSource(path=str(path), name="bad"),
            tokenizer,
            seq_len=_LENGTH,
            vocab_size=len(tokenizer),
            on_bad_sample=policy,
            quarantine=scope.path / "quarantine.jsonl",
            speaks=False,
        )
        assert isinstance(found, EncodedSource)
        return found

    cases = []
    good = scope.path / "good.jsonl"
    good.write_bytes(b"".join(_GOOD))
    wanted = [sample.input_ids.tolist() for sample in encode(good, "error")]
    quarantine = scope.path / "quarantine.jsonl"
    for name, (line, words) in _LINES.items():
        path = scope.path / "data.jsonl"
        path.write_bytes(b"".join([*_GOOD[:2], line, *_GOOD[2:]]))
        cases.append(DrillCase(name, _refused_with(partial(encode, path, "error"), f"{path}:3", words)))
        cases.append(DrillCase(f"{name}, skipped", _skipped(partial(encode, path, "skip"), wanted, quarantine)))
    for name, (file, content) in _FILES.items():
        path = scope.path / file
        path.write_bytes(content)
        cases.append(DrillCase(name, _refused_with(partial(encode, path, "error"), str(path), "")))
    seen = "file and line named, or the sample skipped and quarantined, and the others as they were"
    return outcome_of(cases, seen, {"files": len(_LINES) + len(_FILES)})


def _refused_with(read: Callable[[], Any], *words: str) -> str:
    try:
        read()
    except UserError as error:
        missing = [word for word in words if word not in str(error)]
        return f"its text lacks {missing[0]!r}: {str(error)[:150]}" if missing else ""
    except Exception as error:  # noqa: BLE001 - that is what the drill looks for
        return f"{type(error).__name__}: {error}".splitlines()[0][:150]
    return "was read"


def _skipped(read: Callable[[], EncodedSource], wanted: list[list[int]], quarantine: Path) -> str:
    quarantine.unlink(missing_ok=True)
    try:
        found = read()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}".splitlines()[0][:150]
    if [sample.input_ids.tolist() for sample in found] != wanted:
        return "the other samples have changed"
    lines = quarantine.read_text(encoding="utf-8").splitlines() if quarantine.exists() else []
    return "" if [json.loads(one)["line"] for one in lines] == [3] else "it is not in the quarantine file"


def bad_configs(scope: Scope) -> DrillOutcome:
    """R17. For every key of the schema: other types, numbers outside its range, another spelling."""
    made, seconds, cases = list(_bad_values()), [], []
    os.chdir(scope.path)
    for number, (key, value) in enumerate(made):
        if scope.quick and number % 10:
            continue
        started = time.perf_counter()
        problem = _config_problem(scope, key, value)
        seconds.append(time.perf_counter() - started)
        cases.append(DrillCase(f"{key}={value}"[:80], problem))
    slowest = worst(seconds)
    if not scope.quick:
        cases.append(DrillCase("each in 1 s", "" if slowest < 1.0 else f"one took {slowest:.2f} s"))
    counts = {"median_ms": 1000 * median(seconds), "slowest_ms": 1000 * slowest, "keys": len(LEAVES)}
    return outcome_of(cases, "all refused before any process starts, and the key is named", counts)


def _config_problem(scope: Scope, key: str, value: str) -> str:
    try:
        load_config(f"{scope.workshop}/config.yaml", ["output_dir=runs/first", f"{key}={value}"][key == "output_dir" :], claim_output=False)
    except ConfigError as error:
        named = any(key.startswith(one.key) or one.key.startswith(key) for one in error.problems)
        return "" if named else f"the error names {error.problems[0].key}"
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}".splitlines()[0][:150]
    return "was taken"


def _bad_values() -> Iterator[tuple[str, str]]:
    """(key, value) of many bad overrides."""
    for key, leaf in LEAVES.items():
        kinds = _kinds(leaf.type)
        yield key[:-1] + ("x" if key[-1] != "x" else "y"), "1"
        yield key, "{a: {b: 1}}"
        if kinds <= {int, float, bool, type(None)}:
            yield key, "many"
        if kinds <= {int, float, type(None)}:
            yield key, ".nan"
            yield key, "true"
            yield key, "012"
            allowed = RANGES.get(key)
            if allowed is not None:
                yield key, f"{math.floor(allowed.low) - 1}"
                if allowed.high < math.inf:
                    yield key, f"{math.ceil(allowed.high) + 1}"
        if any(get_origin(kind) is Literal for kind in kinds) and str not in kinds:
            yield key, "nothing_of_the_kind"


def _kinds(annotation: Any) -> set[Any]:
    """The arms of a union, or the annotation alone."""
    return set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else {annotation}
