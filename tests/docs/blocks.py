"""Find the blocks of code in the pages, and the commands in their sentences."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from textwrap import dedent

from tests.rooms import ROOT

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("README.md")], key=lambda path: path.as_posix()
)
HISTORY = {"docs/results/log.md", "CHANGELOG.md"}
"""pages about the past, whose sentences may name commands that are gone"""
_FENCE = re.compile(r" *```(\S*)")
_PROGRAMS = r"(?:hecate|torchrun|make|python|pip|git|ray|cat|sbatch|\.|examples/\S+\.sh)"
_COMMAND = re.compile(rf"(?:[A-Za-z_]+=\S+ )*{_PROGRAMS}(?: |$)|[a-z_]+(?:\.[a-z_]+)*='")
_CODE = re.compile(r"`([^`\n]+)`")
_VERB = re.compile(r"hecate [-a-z]|torchrun -|make [a-z]|python (?:-m )?[a-z]|pip install|(?:[A-Za-z_]+=\S+ )*ray start")


@dataclass(frozen=True)
class Block:
    """A block of code: fenced, or a paragraph that is indented by four blanks."""

    page: str
    line: int
    language: str
    """what stands after the fence; `commands` where every line of an indented block is one; else empty"""
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class CommandLine:
    """A command of a page, of a block or of a sentence."""

    place: str
    text: str
    in_sentence: bool

    @property
    def words(self) -> list[str]:
        """As a shell has them, without comments."""
        split = shlex.shlex(self.text, posix=True, punctuation_chars="|")
        split.whitespace_split = True
        return list(split)


def blocks_of(page: str, text: str) -> list[Block]:
    """All blocks of a page, in order."""
    found: list[Block] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        start = at
        if fence := _FENCE.fullmatch(lines[at]):
            end = next(number for number in range(at + 1, len(lines)) if lines[number].strip() == "```")
            found.append(Block(page, start + 1, fence[1] or "", dedent("\n".join(lines[at + 1 : end]) + "\n")))
            at = end + 1
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1]):
            while at < len(lines) and lines[at].startswith("    "):
                at += 1
            inside = dedent("\n".join(lines[start:at]) + "\n")
            commands = all(_COMMAND.match(line) for line in inside.splitlines())
            found.append(Block(page, start + 1, "commands" if commands else "", inside))
        else:
            at += 1
    return found


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8"))]


def all_commands() -> list[CommandLine]:
    """The commands of all blocks of commands and of all sentences, pages about the past left out."""
    found = []
    for block in all_blocks():
        if block.language == "commands":
            found += [
                CommandLine(f"{block.page}:{block.line + number}", line, False) for number, line in enumerate(block.text.splitlines())
            ]
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        text = page.read_text(encoding="utf-8")
        inside = {block.line + number for block in blocks_of(name, text) for number in range(block.text.count("\n") + 1)}
        for number, line in enumerate(text.splitlines(), start=1):
            if name not in HISTORY and number not in inside:
                found += [CommandLine(f"{name}:{number}", code, True) for code in _CODE.findall(line) if _VERB.match(code)]
    return [command for command in found if command.words]
