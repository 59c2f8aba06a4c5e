"""A hook of mkdocs (`make docs`): the README and CONTRIBUTING.md, which stand above the folder docs, become pages of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ABOVE = {"README.md": "start.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
"""file above docs -> its page"""


_LINK = re.compile(r"\]\(([^)#:]+)(#[^)]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    for name, page in ABOVE.items():
        text = (Path(config.docs_dir).parent / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_LINK.sub(_from_docs, text)))
    return files


def _from_docs(link: re.Match[str]) -> str:
    """A link of a file above docs, as a page of the site has it; what the site lacks keeps its text alone."""
    target = ABOVE.get(link[1]) or (link[1].removeprefix("docs/") if link[1].startswith("docs/") else "")
    target += "README.md" if target.endswith("/") else ""
    return f"]({target}{link[2] or ''})" if target else "]"


def on_page_markdown(markdown: str, **_: Any) -> str:
    for name, page in ABOVE.items():
        markdown = markdown.replace(f"](../{name})", f"]({page})")
    return markdown
