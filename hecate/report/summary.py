"""What a person reads before and after a run: what trains, and what was learned."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hecate.io.terminal import PROGRESS, new_console, shows_messages
from hecate.report.events import EvalScore

EVERY_RANK = "every rank"
"""The owner of what each rank holds alike."""

NON_EXPERTS = "non-expert weights"
"""The name of what trains outside experts, routers and adapters, all of it together."""

PLAIN_WIDTH = 100
"""Columns where the output is no terminal."""

NARROWEST = 80
"""A narrower terminal breaks the lines itself: rich would cut numbers."""

MAX_LINES = 5
"""largest number of lines of a section of the training report, below its title"""

MAX_RUNS = 4
_UNITS = ("bytes", "kB", "MB", "GB", "TB")
_LAYER_PART = re.compile(r"layers\.([0-9]+)\.(.+)")


def print_summary(before: dict[str, EvalScore] | None, after: dict[str, EvalScore], facts: list[tuple[str, str]]) -> None:
    """Log a table of held-out loss and exact accuracy per task, and the facts, (label, value), below it, as the run's progress.

    What was measured of no task, before training or at all, has no column; of one task alone, it stands as "-". No number is wrapped or
    cut, whatever the width.
    """
    console = summary_console()
    before = before or {}
    tasks = list(dict.fromkeys([*after, *before]))
    arrow = "→" if console.encoding.startswith("utf") else "->"
    if tasks:
        table = Table(title=f"Held-out data{', before and after training' if before else ''}", title_justify="left")
        table.add_column("task", overflow="fold")
        both = f" before {arrow} after" if before else ""
        exact = any(score.accuracy is not None for score in (*before.values(), *after.values()))
        columns = {"samples": True, f"loss{both}": True, "change": bool(before), f"exact{both}": exact}
        for header in (header for header, shown in columns.items() if shown):
            table.add_column(header, justify="right", no_wrap=True, min_width=len(header))
        for task in tasks:
            cells = _cells([before.get(task), after.get(task)] if before else [after.get(task)], arrow)
            table.add_row(Text(task), *(cell for cell, shown in zip(cells, columns.values(), strict=True) if shown))
    with console.capture() as captured:
        if tasks:
            console.print(table)
        print_facts(console, facts)
    if text := captured.get():
        PROGRESS.info(text.removesuffix("\n"), extra={"styled": True})


def summary_console() -> Console:
    """Standard output, of a width that cuts no number. It is as of a file where messages go elsewhere."""
    console = new_console() if shows_messages() else new_console(force_terminal=False)
    console.width = max(console.width, NARROWEST) if console.is_terminal else PLAIN_WIDTH
    return console


def print_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    """Print a line for each label and value."""
    width = max((len(label) for label, _ in facts), default=0)
    for label, value in facts:
        console.print(Text.assemble((f"{label:<{width}}  ", "dim"), value), soft_wrap=True)


def _cells(scores: Sequence[EvalScore | None], arrow: str) -> list[str]:
    """Samples, loss, change, accuracy of one task; `scores` are those before and after, or after alone."""
    samples = dict.fromkeys(str(score.samples) for score in scores if score is not None)
    loss = _pair([score.loss if score else None for score in scores], arrow)
    accuracy = _pair([score.accuracy if score else None for score in scores], arrow)
    change, before, after = "-", scores[0], scores[-1]
    if before is not None and after is not None and before.loss != 0:
        change = f"{100 * (after.loss - before.loss) / before.loss:+.1f} %"
    return [f" {arrow} ".join(samples), loss, change, accuracy]


def _pair(values: list[float | None], arrow: str) -> str:
    if values == [None, None]:
        return "-"
    return f" {arrow} ".join("-" if value is None else f"{value:.3f}" for value in values)


@dataclass(frozen=True)
class TrainableRow:
    """`count` things that train, all alike and of one owner."""

    name: str
    """`layers.3.experts`, `layers.3.router`, `layers.3.router.bias` and whatever else of a router is trained, the same of another unit such
    as `layers.3.self_attn.q_proj.router`, a tensor's name such as `layers.3.self_attn.q_proj.A`, or NON_EXPERTS"""
    count: int
    numel: int
    """parameters of each"""
    bytes: int
    """of the master copy of each"""
    owner: str
    """`rank 0`, or EVERY_RANK"""


def training_report(rows: Sequence[TrainableRow]) -> tuple[str, dict[str, Any]]:
    """What trains, as text of at most 25 lines, and all of it as a JSON-able value.

    In the text equal layers share a line, and so do ranks that own as much; what is past MAX_LINES of a section is
    counted there. The value is {"parameters", "bytes", "by_owner": {owner: {"parameters", "bytes"}}, "rows": [...]}; its
    sums count each parameter once, however many ranks hold it.
    """
    experts = [row for row in rows if _part(row) == "experts"]
    routers = [row for row in rows if _part(row) == "router"]
    blocks = [row for row in rows if _part(row) == "blocks"]
    adapters = [row for row in rows if _part(row) not in ("experts", "blocks", "router", NON_EXPERTS)]
    others = [row for row in rows if _part(row) == NON_EXPERTS]
    owners = sorted({row.owner for row in rows}, key=_natural)
    by_owner = {owner: [row for row in rows if row.owner == owner] for owner in owners}
    lines = [
        f"trains {_amount(rows)}",
        *_section(f"experts: {_amount(experts)}", _expert_lines(experts)),
        *([f"pools of all layers: {_amount(blocks)}", f"  {_sizes('block', blocks)}, {_owners(blocks)}"] if blocks else []),
        *_section(f"routers: {_amount(routers)}", _lines({layer: _sizes("router", of) for layer, of in _by_layer(routers).items()})),
        *_section(
            f"{'attention adapters' if experts or routers else 'adapters'}: {_amount(adapters)}",
            _lines({k: _adapters(of) for k, of in _by_layer(adapters).items()}),
        ),
        *([f"{NON_EXPERTS}: {_amount(others)}"] if others else []),
        *_section("held by each rank", _lines({owner: _amount(of) for owner, of in by_owner.items()})),
    ]
    totals = {owner: {"parameters": _numel(of), "bytes": _bytes(of)} for owner, of in by_owner.items()}
    value = {"parameters": _numel(rows), "bytes": _bytes(rows), "by_owner": totals, "rows": [asdict(row) for row in rows]}
    return "\n".join(lines), value


def _section(title: str, lines: list[str]) -> list[str]:
    if not lines:
        return []
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"... and {len(lines) - MAX_LINES + 1} more lines like these"]
    return [title, *(f"  {line}" for line in lines)]


def _expert_lines(rows: Sequence[TrainableRow]) -> list[str]:
    layers = {layer: (_sizes("expert", of), _owners(of)) for layer, of in _by_layer(rows).items()}
    lines = _lines({layer: f"{size}, {owners}" for layer, (size, owners) in layers.items()})
    if len(lines) <= MAX_LINES:
        return lines
    return _lines({layer: f"{size}, owners differ by layer" for layer, (size, _) in layers.items()})


def _lines(texts: dict[str, str]) -> list[str]:
    """`texts`: name of a layer or an owner -> what is said of it."""
    return [f"{_ranges(names)}: {text}" for text, names in _alike(texts)]


def _sizes(noun: str, rows: Sequence[TrainableRow]) -> str:
    """8 experts x 101,376 parameters"""
    counts: Counter[int] = Counter()
    for row in rows:
        counts[row.numel] += row.count
    return " and ".join(f"{count:,} {noun}{'s' if count != 1 else ''} x {numel:,} parameters" for numel, count in counts.items())


def _owners(rows: Sequence[TrainableRow]) -> str:
    """4 on each of ranks 0-1"""
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row.owner] += row.count
    ordered = {owner: str(counts[owner]) for owner in sorted(counts, key=_natural)}
    return ", ".join(f"{count} on {'each of ' if len(names) > 1 else ''}{_ranges(names)}" for count, names in _alike(ordered))


def _adapters(rows: Sequence[TrainableRow]) -> str:
    """q_proj, v_proj: 4 tensors, 36,864 parameters"""
    parts = [_part(row).split(".") for row in rows]
    modules = dict.fromkeys(part[-2] if len(part) > 1 and part[-1] in ("A", "B") else part[-1] for part in parts)
    count = sum(row.count for row in rows)
    return f"{', '.join(modules)}: {count:,} tensor{'s' if count != 1 else ''}, {_numel(rows):,} parameters"


def _by_layer(rows: Sequence[TrainableRow]) -> dict[str, list[TrainableRow]]:
    """`layer 3` -> its rows, in the order of layers."""
    layers: dict[str, list[TrainableRow]] = {}
    for row in rows:
        layers.setdefault(f"layer {_LAYER_PART.fullmatch(row.name)[1]}", []).append(row)  # type: ignore[index]
    return {layer: layers[layer] for layer in sorted(layers, key=_natural)}


def _part(row: TrainableRow) -> str:
    """`experts`, `blocks` of a pool, `router`, or the name inside the layer; `NON_EXPERTS` are in all."""
    if row.name == NON_EXPERTS:
        return row.name
    match = _LAYER_PART.fullmatch(row.name)
    assert match is not None, f"{row.name!r} names no layer"
    parts = match[2].split(".")
    return next((part for part in ("experts", "blocks", "router") if part in parts), match[2])


def _alike(texts: dict[str, str]) -> list[tuple[str, list[str]]]:
    """Each text, and those of one kind (ranks, layers) of whom it is said."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, text in texts.items():
        names.setdefault((name.split()[0], text), []).append(name)
    return [(text, alike) for (_, text), alike in names.items()]


def _ranges(names: list[str]) -> str:
    """`rank 0`, `rank 1`, `rank 3` as "ranks 0-1, 3"; many runs are cut short, and the number of names given."""
    if len(names) == 1:
        return names[0]
    noun = names[0].split()[0]
    numbers = [int(name.split()[1]) for name in names]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    if len(texts) > MAX_RUNS:
        return f"{len(names)} {noun}s ({', '.join(texts[: MAX_RUNS - 2])}, ..., {texts[-1]})"
    return f"{noun}s {', '.join(texts)}"


def _natural(name: str) -> tuple[bool, int, str]:
    """Sorts `rank 2` before `rank 10`, and names without a number last."""
    number = name.split()[-1]
    return (False, int(number), name) if number.isdecimal() else (True, 0, name)


def _amount(rows: Sequence[TrainableRow]) -> str:
    size, unit = float(_bytes(rows)), 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{_numel(rows):,} parameters, {size:.{1 if unit else 0}f} {_UNITS[unit]}"


def _numel(rows: Sequence[TrainableRow]) -> int:
    return sum(row.count * row.numel for row in rows)


def _bytes(rows: Sequence[TrainableRow]) -> int:
    return sum(row.count * row.bytes for row in rows)
