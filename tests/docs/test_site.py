"""Every page of docs/ is in the site's navigation and in the list of pages, docs/README.md, once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.rooms import ROOT

SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
PAGES = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}


def named(nav: Any) -> Iterator[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from named(entry)


def test_the_navigation_has_every_page_once() -> None:
    """The README, CONTRIBUTING.md and SECURITY.md stand above docs/; a hook makes them pages."""
    hook = (ROOT / "docs" / "site_pages.py").read_text(encoding="utf-8")
    above = set(re.findall(r'"[A-Z]+\.md": "([a-z]+\.md)"', hook))
    assert len(above) == 3
    assert sorted(named(SITE["nav"])) == sorted(PAGES | above)


def test_the_list_of_pages_has_every_page() -> None:
    """But those of extend/, which a page of their own lists."""
    lists = {folder: (ROOT / "docs" / folder / "README.md").read_text(encoding="utf-8") for folder in ("", "extend")}
    linked = {f"{folder}/{page}".lstrip("/") for folder, text in lists.items() for page in re.findall(r"\]\(([\w/-]+\.md)\)", text)}
    assert linked | {"README.md"} == PAGES


def test_each_page_for_users_begins_with_the_question_that_the_list_asks() -> None:
    listed = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs" / "use").glob("*.md"):
        question = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert f"| {question} | [{page.name}](use/{page.name}) |" in listed


def test_every_picture_is_shown_and_made_by_what_lies_beside_it() -> None:
    """A program draw_NAME.py, NAME.yaml, from which hecate makes it, or a command on a page; report.png is a photograph of a page."""
    images = ROOT / "docs" / "images"
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
    for picture in images.glob("*.png"):
        assert f"images/{picture.name}" in pages, f"no page shows {picture.name}"
        made_by = [images / f"draw_{picture.stem}.py", images / f"{picture.stem}.yaml"]
        made = any(file.is_file() for file in made_by) or f"--plot {picture.name}" in pages
        assert picture.stem == "report" or made, f"nothing makes {picture.name}"
