"""A configuration of somebody else, or an override, is refused in time: it runs nothing, reads no variable and opens no other file.

That each key refuses what it cannot take, and says how to mend it, is tests/hecate/config/test_bad_configs.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hecate.config import load_config
from tests.attacks.watching import HARMLESS, PLACES, REFUSED, outcome

MOST_PROBLEMS = 42
"""lines: all mistakes are said at once, twenty of them with their hints, and how many more there are"""
GOOD = b"model: {name_or_path: model}\ndata: {train: data.jsonl}\nmax_steps: 2\noutput_dir: runs/a\n"
LAUGHS = b"".join(b"x%d: &x%d [%s]\n" % (n, n, b", ".join([b"*x%d" % (n - 1)] * 9) if n else b"a, a") for n in range(14))

FILES: dict[str, tuple[bytes, str]] = {
    "as it was": (GOOD, HARMLESS),
    "empty": (b"", REFUSED),
    "a zero byte": (GOOD + b"seed: \0\n", REFUSED),
    "half a character": (GOOD + b"seed: \xff\n", REFUSED),
    "a lone surrogate": (GOOD + b'seed: "\\ud800"\n', REFUSED),
    "a tag that calls": (GOOD + b"seed: !!python/object/apply:os.system ['touch ran']\n", REFUSED),
    "a tag that imports": (GOOD + b"seed: !!python/name:os.system\n", REFUSED),
    "a tag of an object": (GOOD + b"seed: !!python/object/new:os.popen [x]\n", REFUSED),
    "a variable": (GOOD.replace(b"runs/a", b"${oc.env:HOME}"), REFUSED),
    "a variable, decoded": (GOOD.replace(b"runs/a", b"${oc.decode:${oc.env:HOME}}"), REFUSED),
    "a resolver that there is not": (GOOD.replace(b"runs/a", b"${boom:1}"), REFUSED),
    "a file by a resolver": (GOOD.replace(b"runs/a", b"${oc.select:/etc/passwd}"), REFUSED),
    "a reference to itself": (GOOD.replace(b"runs/a", b"${output_dir}"), REFUSED),
    "references in a circle": (GOOD.replace(b"runs/a", b"${model.name_or_path}").replace(b"path: model", b"path: ${output_dir}"), REFUSED),
    "400 nested references": (GOOD.replace(b"runs/a", b"${" * 400 + b"}" * 400), REFUSED),
    "20,000 nested references": (GOOD.replace(b"runs/a", b"${" * 20_000), REFUSED),
    "aliases of aliases": (LAUGHS + GOOD, REFUSED),
    "an alias of itself": (b"a: &a [*a]\n" + GOOD, REFUSED),
    "lists nested 20,000 times": (GOOD + b"seed: " + b"[" * 20_000, REFUSED),
    "mappings nested 20,000 times": (GOOD + b"seed: " + b"{a: " * 20_000, REFUSED),
    "a number of 100,000 digits": (GOOD + b"seed: " + b"9" * 100_000 + b"\n", REFUSED),
    "a number to the base of sixty": (GOOD + b"seed: " + b"1:" * 50_000 + b"1\n", REFUSED),
    "a number with an endless exponent": (GOOD + b"learning_rate: 1e999999999\n", REFUSED),
    "40,000 keys": (GOOD + b"".join(b"k%d: 1\n" % n for n in range(20_000)), REFUSED),
    "more than 256 KiB": (GOOD + b"#" * 300_000, REFUSED),
    "a key of 100,000 characters": (GOOD + b"k" * 100_000 + b": 1\n", REFUSED),
    "a key that is a list": (GOOD + b"? [a]\n: 1\n", REFUSED),
    "a key that a terminal obeys": (GOOD + b'"\\e]0;owned\\a": 1\n', REFUSED),
    "a key given twice": (GOOD + b"max_steps: 3\n", REFUSED),
    "two documents": (GOOD + b"---\n" + GOOD, REFUSED),
    "an order to the parser": (b"%YAML 9.9\n---\n" + GOOD, REFUSED),
    "a merge of keys": (b"a: &a {max_steps: 9}\n<<: *a\n" + GOOD, REFUSED),
    "a million experts in a list": (GOOD + b"moe: {num_experts: [" + b"1," * 30_000 + b"1]}\n", REFUSED),
    "a path with a zero byte": (GOOD.replace(b"data.jsonl", b'"a\\0b"'), REFUSED),
    "a path of 100,000 characters": (GOOD.replace(b"data.jsonl", b"a" * 100_000), REFUSED),
    "a pattern of stars": (GOOD.replace(b"data.jsonl", b'"' + b"*/" * 3000 + b'*.jsonl"'), REFUSED),
    "data that are a device, which is refused where it is read": (GOOD.replace(b"data.jsonl", b"/dev/zero"), HARMLESS),
    "a model that is a device": (GOOD.replace(b"path: model", b"path: /dev/zero"), REFUSED),
    "a model on the network": (GOOD.replace(b"path: model", b'path: "https://example.org/x"'), REFUSED),
    "an output that is a device": (GOOD.replace(b"runs/a", b"/dev/null"), REFUSED),
    "an output that is a file": (GOOD.replace(b"runs/a", b"data.jsonl"), REFUSED),
    "an output in a file": (GOOD.replace(b"runs/a", b"data.jsonl/x"), REFUSED),
}
OVERRIDES: dict[str, tuple[str, str]] = {
    "a variable": ("output_dir=${oc.env:HOME}", REFUSED),
    "a tag that calls": ("seed=!!python/object/apply:os.system ['touch ran']", REFUSED),
    "nested without end": ("seed=" + "[" * 20_000, REFUSED),
    "a number to the base of sixty": ("seed=" + "1:" * 50_000 + "1", REFUSED),
    "no sign": ("seed", REFUSED),
    "no key": ("=1", REFUSED),
    "a key with a terminal's order": ("\x1b]0;owned\x07=1", REFUSED),
    "half a character": ("output_dir=\udcff", REFUSED),
    "400 nested references": ("output_dir=" + "${" * 400 + "}" * 400, REFUSED),
    "a section as a value": ("lora={r: 1}", HARMLESS),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    return tmp_path


SLOW = ("a million experts in a list", "40,000 keys")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FILES])
def test_a_file(folder: Path, name: str) -> None:
    content, wanted = FILES[name]
    (folder / "config.yaml").write_bytes(content)
    assert outcome(lambda: load_config("config.yaml"), folder, named="", lines=MOST_PROBLEMS) == wanted
    assert sorted(os.listdir(folder)) == ["config.yaml", "data.jsonl", "model"]


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override(folder: Path, name: str) -> None:
    override, wanted = OVERRIDES[name]
    (folder / "config.yaml").write_bytes(GOOD)
    assert outcome(lambda: load_config("config.yaml", [override]), folder, named="") == wanted


@pytest.mark.parametrize("what", PLACES)
def test_what_stands_in_its_place(folder: Path, what: str) -> None:
    PLACES[what](folder / "config.yaml")
    assert outcome(lambda: load_config("config.yaml"), folder, named="config.yaml") == REFUSED
