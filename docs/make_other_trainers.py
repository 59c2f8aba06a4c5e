"""Write docs/use/other_trainers.md, which says what keys of other trainers are called: `python docs/make_other_trainers.py`."""

from __future__ import annotations

from pathlib import Path

from hecate.apps.convert.meanings import HINTS

PAGE = Path(__file__).parent / "use" / "other_trainers.md"
HEAD = """# What are the keys of axolotl, LLaMA-Factory or TRL called?

`hecate convert FILE -o RECIPE` makes a recipe of their YAML, and says what becomes of each key: carried over, the default already, left out
with the reason, or refused with what to do; `--drop KEY` leaves a refused one out. `hecate train` shows the same table. Here are keys with
another name in hecate, and in [support.md](support.md#not-supported) those for which there is nothing.

| their key | what to write |
|---|---|
"""


def page() -> str:
    """The page's text."""
    names: dict[str, list[str]] = {}
    for name, answer in sorted(HINTS.items()):
        if not answer.startswith(("not supported: ", "leave it out")):
            names.setdefault(answer.removeprefix("write "), []).append(f"`{name}`")
    return HEAD + "".join(f"| {', '.join(of)} | {answer} |\n" for answer, of in names.items())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
