"""The pieces of HTML that the sections of a report are made of."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from hecate.report.pages.svg import COLOURS

NOT_RECORDED = "not recorded"


def section(title: str, *parts: str) -> str:
    """A section with a heading. `parts` are HTML."""
    return f'<section><h2>{escape(title)}</h2><div class="parts">{"".join(parts)}</div></section>'


def figure(title: str, chart: str, text: str, names: Sequence[str] = ()) -> str:
    """A chart with its title, the names of its lines or areas, and what is said of it.

    Args:
        chart: HTML.
        names: in the order of their colours; empty where the title says it.
    """
    said = (legend(names) if names else "") + (f"<p>{escape(text)}</p>" if text else "")
    return f"<figure><h3>{escape(title)}</h3>{chart}<figcaption>{said}</figcaption></figure>"


def not_recorded(title: str, why: str = "") -> str:
    """In place of a figure, for want of values."""
    return f'<figure><h3>{escape(title)}</h3><p class="dim">{NOT_RECORDED}. {escape(why)}</p></figure>'


def legend(names: Sequence[str]) -> str:
    """The names of lines or areas in their colours, in their order."""
    items = (f'<span><i class="c{number % COLOURS}"></i>{escape(name)}</span>' for number, name in enumerate(names))
    return f'<div class="legend">{"".join(items)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def bytes_text(size: float) -> str:
    """1.50 GB"""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(size) < 999.5:  # what is more has four digits when it is rounded
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
