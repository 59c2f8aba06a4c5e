"""What the pages name exists: files, modules, commands, links, and the places where the glossary's terms are defined."""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
from pathlib import Path

import pytest

from hecate.config.schema import LEAVES, SECTIONS
from tests.rooms import ROOMS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
HISTORY = {"docs/results/log.md", "CHANGELOG.md"}
"""the pages about the past, which may name what no longer exists"""
MAX_TERMS = 40
_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_MODULE = re.compile(r"(?:hecate|benchmarks|testing|tests)(?:\.[a-z_][a-z0-9_]*)+")
_ROOMS = ("hecate/", "parallel/", "kernels/", "launch/", "testing/", "tests/", "benchmarks/", "docs/", "configs/", "examples/")
_SUFFIXES = (".py", ".md", ".yaml", ".json", ".sh", ".sbatch", ".toml", ".png", "/")
_ELSEWHERE = ("kernels/tuned/DEVICE.json",)
"""paths that a program makes"""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


CURRENT = [page for page in PAGES if name_of(page) not in HISTORY]


def prose(page: Path) -> str:
    """A page without its fenced blocks, which may show what a reader is to write."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def test_the_pages_are_seen() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/design/architecture.md", "docs/design/glossary.md", "docs/extend/planner.md"} <= {
        name_of(p) for p in PAGES
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in _LINK.findall(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong, f"{name_of(page)}: links that lead nowhere: {wrong}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_paths_that_are_named_exist(page: Path) -> None:
    new = set(re.findall(r"^# file: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE))
    missing = []
    for code in _CODE.findall(prose(page)):
        path = code.split()[0]
        if (
            path.startswith(_ROOMS)
            and path.endswith(_SUFFIXES)
            and path not in {*new, *_ELSEWHERE}
            and not list(ROOT.glob(path.rstrip("/")))
        ):
            missing.append(path)
    assert not missing, f"{name_of(page)}: no such files: {missing}"


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_files_that_are_named_without_their_folder_exist(page: Path) -> None:
    names = {path.name for folder in _ROOMS for path in (ROOT / folder).rglob("*.py")}
    named = {code.rpartition("/")[2] for code in _CODE.findall(prose(page)) if re.fullmatch(r"[\w/]+\.py", code)}
    assert named <= names, f"{name_of(page)}: no such files: {named - names}"


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_modules_that_are_named_exist(page: Path) -> None:
    """`hecate.parallel.values.traces`, also with a name of the module at its end, and `python -m benchmarks.NAME`."""
    missing = [name for name in _MODULE.findall(prose(page)) if not module_exists(name) and not module_exists(name.rpartition(".")[0])]
    assert not missing, f"{name_of(page)}: no such modules: {missing}"


def module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_make_targets_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([a-z-]+)`", text)) | set(re.findall(r"^ {4}make ([a-z-]+)", text, re.MULTILINE))
    assert named <= targets, f"{name_of(page)}: no such targets: {named - targets}"


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_configuration_keys_that_are_named_exist(page: Path) -> None:
    """`fssdp.policy`, `data.*.format`, `fssdp.policy: auto`: a section, and a key of it."""
    new = set(re.findall(r"adds? `([a-z_.]+)`", page.read_text(encoding="utf-8")))
    wrong = []
    for code in _CODE.findall(prose(page)):
        head = re.fullmatch(r"([a-z]+)\.((?:\*\.)?[a-z_]+(?:\.[a-z_]+)*)(?:[:= ].*)?", code)
        named = f"{head[1]}.{head[2]}" if head and head[1] in SECTIONS and not code.startswith("ray.init") else ""
        if named and "*" not in named and named not in {*LEAVES, *SECTIONS, *new}:
            wrong.append(code)
    assert not wrong, f"{name_of(page)}: no such keys: {wrong}"


def test_every_room_is_on_the_page_and_in_the_picture() -> None:
    """The page lists rooms from the top down; the picture's tiers are in the order of ROOMS."""
    rooms = [room.removeprefix("hecate.") for room in ROOMS if not room.endswith("__main__")]
    page = (ROOT / "docs" / "design" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([a-z/]+)/` \|", page, re.MULTILINE)
    folders = [room for room in reversed(rooms) if room not in ("errors", "faults", "api")]
    assert [room.removeprefix("hecate/").replace("/", ".") for room in listed] == folders
    tiers = runpy.run_path(str(ROOT / "docs" / "images" / "draw_rooms.py"))["TIERS"]
    assert [room for tier in reversed(tiers.values()) for room in tier] == rooms


def glossary() -> list[tuple[str, str]]:
    """(term, the file that defines it) of each line of the glossary's tables."""
    text = (ROOT / "docs" / "design" / "glossary.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [(row[0], row[-1].strip("`")) for row in rows if row[0] != "term" and not set(row[0]) <= set("-: ")]


def test_the_glossary_is_short_and_names_each_term_once() -> None:
    terms = [term for entry, _ in glossary() for term in entry.split(", ")]
    assert len(terms) == len(set(terms))
    assert 20 <= len(glossary()) <= MAX_TERMS


@pytest.mark.parametrize(("entry", "path"), glossary(), ids=[entry for entry, _ in glossary()])
def test_a_term_is_used_where_the_glossary_says_that_it_is_defined(entry: str, path: str) -> None:
    """As a word of the file's text, in any form: `transfer plan` as "transfer plan", "TransferPlan" or "transfer_plan"."""
    assert (ROOT / path).is_file(), f"glossary: {path} does not exist"
    text = (ROOT / path).read_text(encoding="utf-8")
    ast.parse(text)
    plain = re.sub(r"[\s_-]", "", text).lower()
    for term in entry.split(", "):
        assert re.sub(r"[\s_-]", "", term).lower() in plain, f"glossary: {path} does not contain {term!r}"
