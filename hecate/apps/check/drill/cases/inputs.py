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

from hecate.apps.check.drill.outcome import DrillCase, DrillOutcome, Scope, outcome_of, worst
from hecate.apps.check.drill.tiny_run import build_byte_tokenizer
from hecate.config import ConfigError, load_config
from hecate.config.schema import LEAVES, RANGES, DataSource
from hecate.data.encode import BadSamples, EncodedSource
from hecate.data.sources import read_source
from hecate.errors import UserError


def _chat(*contents: Any) -> bytes:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return json.dumps({"messages": turns}).encode() + b"\n"


def _called(role: bytes, calls: bytes) -> bytes:
    """A conversation whose second turn calls tools."""
    turn = b'{"role": "%s", "content": "a", "tool_calls": %s}' % (role, calls)
    return b'{"messages": [{"role": "user", "content": "q"}, %s]}\n' % turn


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
    "infinity": (b"-Infinity\n", ""),
    "true": (b"true\n", "JSON boolean"),
    "text": (b'"once upon a time"\n', "JSON string"),
    "two objects": (_GOOD[0][:-1] + b" " + _GOOD[1], "not valid JSON"),
    "a comma at the end": (_GOOD[0][:-1] + b",\n", "not valid JSON"),
    "a zero byte": (b'{"messages": "\0"}\n', "not valid JSON"),
    "single quotes": (b"{'messages': []}\n", "not valid JSON"),
    "a mark of byte order": (b"\xef\xbb\xbf" + _GOOD[0], "not valid JSON"),
    "a turn that is text": (b'{"messages": ["hello"]}\n', ""),
    "a turn without content": (b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}\n', ""),
    "a role that is a list": (b'{"messages": [{"role": ["user"], "content": "q"}]}\n', ""),
    "an answer that is null": (b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null}]}\n', ""),
    "a call of the user's": (_called(b"user", b'[{"function": {"name": "f", "arguments": {}}}]'), "only the assistant calls tools"),
    "a call without a name": (_called(b"assistant", b'[{"function": {}}]'), "is no call"),
    "a call whose arguments are cut": (_called(b"assistant", b'[{"function": {"name": "f", "arguments": "{"}}]'), "not valid JSON"),
    "calls that are a number": (_called(b"assistant", b"3"), "JSON number"),
    "another format": (b'{"text": "once upon a time"}\n', ""),
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
    "a table without names": ("a.csv", b",\na,b\n"),
    "a file in UTF-16": ("a.json", '[{"text": "a"}]'.encode("utf-16")),
    "an object that holds the list": ("a.json", b'{\n"data": [{"text": "a"}]\n}\n'),
    "more behind the list": ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]\n'),
    "a list without commas": ("a.json", b'[{"text": "a"}\n{"text": "b"}]\n'),
    "a packed file of another program": ("a.jsonl.gz", b"\x1f\x8b\x09" + bytes(40)),
    "a table's file that is empty": ("a.arrow", b""),
    "a text that is named Parquet": ("a.parquet", b'{"text": "a"}\n'),
    "an index of nothing": ("a.idx", b"MMIDIDX\0\0" + bytes(25)),
    "tokens without an index": ("a.bin", bytes(40)),
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
            bad=BadSamples(policy, scope.path / "quarantine.jsonl", speaks=False),
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
    for number, (name, (file, content)) in enumerate(_FILES.items()):
        path = scope.path / f"{number}" / file
        path.parent.mkdir()
        path.write_bytes(content)
        cases.append(DrillCase(name, _refused_with(partial(encode, path, "error"), str(path.with_suffix("")))))
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


_DECIDING = ("hub",)
"""keys that decide how others are read"""


def bad_configs(scope: Scope) -> DrillOutcome:
    """R17. For every key of the schema: other types, numbers outside its range, another spelling; and many of them at once."""
    made, seconds, cases = list(_bad_values()), [], []
    os.chdir(scope.path)
    for number, (key, value) in enumerate(made):
        if scope.quick and number % 10:
            continue
        started = time.perf_counter()
        problem = _config_problem(scope, key, value)
        seconds.append(time.perf_counter() - started)
        cases.append(DrillCase(f"{key}={value}"[:80], problem))
    for name, mistakes in _several(made):
        cases.append(DrillCase(f"{name}, {len(mistakes)} at once", _all_named(scope, mistakes)))
    slowest = worst(seconds)
    if not scope.quick:
        cases.append(DrillCase("each in 1 s", "" if slowest < 1.0 else f"one took {slowest:.2f} s"))
    counts = {"median_ms": 1000 * median(seconds), "slowest_ms": 1000 * slowest, "keys": len(LEAVES)}
    return outcome_of(cases, "all refused before any process starts, and the key is named", counts)


def _several(made: list[tuple[str, str]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Mistakes of many keys: of all keys of each section, and one of each key of all sections."""
    one_each = {key: value for key, value in made if key in LEAVES and key not in _DECIDING}
    for section in sorted({key.partition(".")[0] for key in one_each}):
        mistakes = {key: value for key, value in one_each.items() if key.partition(".")[0] == section}
        if len(mistakes) > 1:
            yield section, mistakes
    yield "all keys", one_each


def _all_named(scope: Scope, mistakes: dict[str, str]) -> str:
    """What is wrong where the error of a configuration with several mistakes should name all their keys."""
    given = {"output_dir": "runs/first"} | mistakes
    try:
        load_config(f"{scope.workshop}/config.yaml", [f"{key}={value}" for key, value in given.items()], claim_output=False)
    except ConfigError as error:
        named = {problem.key for problem in error.problems}
        missing = [key for key in mistakes if not any(one == key or one.startswith((f"{key}.", f"{key}[")) for one in named)]
        return f"the error does not name {', '.join(missing[:4])} ({len(missing)} of {len(mistakes)})" if missing else ""
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}".splitlines()[0][:150]
    return "was taken"


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
