"""The worked examples of docs/extend/: each is applied to a copy of the checkout, and its commands must succeed there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted(path.name for path in (ROOT / "docs" / "extend").glob("*.md") if path.name != "README.md")
TRAINS_LONG = {"base-architecture.md", "config-key.md", "gradient-rule.md", "pair-source.md", "router.md"}
"""pages whose tests train on several ranks, or in many ways"""
COPIED = ("hecate", "parallel", "kernels", "launch", "configs", "examples", "tests", "testing", "pyproject.toml")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NEW_FILE = re.compile(r"# file: (\S+)\n")
_DIFF_HEAD = re.compile(r"--- (\S+)\n\+\+\+ (\S+)\n")


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block of a page."""
    return _BLOCK.findall((ROOT / "docs" / "extend" / page).read_text(encoding="utf-8"))


def changes(page: str) -> dict[str, str]:
    """Path -> the text of a new file, or the hunks of a diff (which begin with @@), of all blocks that are one or the other."""
    found: dict[str, str] = {}
    for language, text in blocks(page):
        if language == "diff":
            head = _DIFF_HEAD.match(text)
            assert head is not None, f"{page}: a diff begins with --- PATH and +++ PATH:\n{text}"
            assert head[1] == head[2], f"{page}: a diff changes one file: {head[0]}"
            found[head[1]] = found.get(head[1], "") + text[head.end() :]
        elif head := _NEW_FILE.match(text):
            assert head[1] not in found, f"{page}: {head[1]} is written twice"
            found[head[1]] = text[head.end() :]
    return found


def commands(page: str) -> list[str]:
    return [line for language, text in blocks(page) if language == "sh" for line in text.splitlines()]


def changed(text: str, hunks: str, where: str) -> str:
    """A file's text with a diff's hunks applied: what a hunk names must stand in the file exactly once."""
    for hunk in re.split(r"^@@.*\n", hunks, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[:1] in (" ", "-"))
        after = "".join(line[1:] for line in lines if line[:1] in (" ", "+"))
        assert all(line[:1] in (" ", "-", "+") for line in lines), f"{where}: a line of a diff begins with a blank, - or +:\n{hunk}"
        assert text.count(before) == 1, f"{where}: what the diff names is there {text.count(before)} times:\n{before}"
        text = text.replace(before, after)
    return text


def apply(page: str, root: Path) -> None:
    for path, text in changes(page).items():
        target = root / path
        if text.startswith("@@"):
            target.write_text(changed(target.read_text(encoding="utf-8"), text, f"{page}, {path}"), encoding="utf-8")
        else:
            assert not target.exists(), f"{page}: {path} exists already"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources and tests, links kept."""
    for name in COPIED:
        source, target = ROOT / name, tmp_path / name
        if not source.exists():
            continue
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc"))
        else:
            shutil.copy(source, target)
    return tmp_path


def run(command: str, root: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    programs = {"python": [sys.executable], "hecate": [sys.executable, "-m", "hecate"]}
    assert words[0] in programs, f"an example runs python or hecate, not {words[0]}"
    # Without numba's compiler, which takes longer than the planning of the few small layers here.
    variables = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "NUMBA_DISABLE_JIT": "1"}
    return subprocess.run(
        [*programs[words[0]], *words[1:]], cwd=root, env=variables, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.parametrize("page", [pytest.param(page, marks=pytest.mark.slow if page in TRAINS_LONG else ()) for page in PAGES])
def test_an_example_works(page: str, checkout: Path) -> None:
    apply(page, checkout)
    assert commands(page), f"{page} proves nothing: it has no sh block"
    for command in commands(page):
        done = run(command, checkout)
        assert done.returncode == 0, f"{page}: {command}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("page", PAGES)
def test_an_example_is_written_like_the_product(page: str, checkout: Path) -> None:
    apply(page, checkout)
    files = [str(checkout / path) for path in changes(page) if path.endswith(".py")]
    for arguments in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, *files], cwd=checkout, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{page}: ruff {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"


def test_a_page_counts_the_files_that_it_touches() -> None:
    """The table of docs/extend/README.md."""
    table = (ROOT / "docs" / "extend" / "README.md").read_text(encoding="utf-8")
    told = {page: int(number) for page, number in re.findall(r"\((\S+\.md)\) \| (\d+)", table)}
    assert told == {page: sum(not path.startswith("tests/") for path in changes(page)) for page in PAGES}


def test_a_diff_that_does_not_fit_is_refused() -> None:
    assert changed("a\nb\nc\n", "@@\n b\n-c\n+d\n", "here") == "a\nb\nd\n"
    for text in ("a\n", "b\nc\nb\nc\n"):
        with pytest.raises(AssertionError, match="times"):
            changed(text, "@@\n b\n-c\n+d\n", "here")
