"""The messages of docs/use/troubleshooting.md that are hecate's own stand in the code, and those of the system are what it says."""

from __future__ import annotations

import ast
import errno
import os
import re
from functools import cache

import pytest

from tests.rooms import ALL_SOURCES, ROOT

PAGE = (ROOT / "docs" / "use" / "troubleshooting.md").read_text(encoding="utf-8")
HOLE = "\0"


def messages(headed: str) -> list[str]:
    """The texts in the first column of the tables that are headed so."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        head, _, *rows = table.splitlines()
        if head.startswith(f"| {headed} |"):
            found += [row.removeprefix("| ").split(" | ")[0] for row in rows]
    return found


@cache
def texts() -> tuple[str, ...]:
    """All texts in the code but its documentation: those of one expression as one, with holes where values go in."""
    found = []
    for path in ALL_SOURCES:
        if path.relative_to(ROOT).parts[0] != "benchmarks":
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            found += [_template(node) for node in nodes if isinstance(node, _TEXTS) and id(node) not in documentation]
    return tuple(found)


_TEXTS = (ast.JoinedStr, ast.Constant, ast.BinOp)


def _template(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(value) if isinstance(value, ast.Constant) else HOLE for value in node.values)
    return _template(node.left) + _template(node.right) if isinstance(node, ast.BinOp) else HOLE


def pattern(message: str) -> str:
    """What a message of the page says as a regular expression: its pieces of code in order, and anything for `...`."""
    pieces = [piece for code in re.findall(r"`([^`]+)`", message) for piece in code.split("...")]
    return r"[\s\S]*".join(re.escape(piece) for piece in pieces if piece)


OWN = messages("hecate says")


def test_the_page_has_both_sorts() -> None:
    assert len(OWN) > 60
    assert len(messages("others say")) > 25
    assert len(OWN) == len(set(OWN))


@pytest.mark.parametrize("message", OWN)
def test_a_message_of_ours_stands_in_the_code(message: str) -> None:
    wanted = re.compile(pattern(message))
    assert len(re.sub(r"\[\\s\\S\]\*|\\", "", wanted.pattern)) >= 6, "too short to be searched for"
    assert any(wanted.search(text) for text in texts()), f"no text of the code is {message}"


def test_a_message_that_is_not_in_the_code_is_seen() -> None:
    assert not any(re.search(pattern("`belongs to a run with ... other configuration`"), text) for text in texts())


def test_messages_of_the_system_are_right() -> None:
    foreign = " ".join(messages("others say"))
    for number in (errno.EADDRINUSE, errno.EMFILE, errno.ENOSPC, errno.EROFS, errno.EAGAIN):
        assert f"`{os.strerror(number)}`" in foreign
