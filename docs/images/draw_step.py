"""Draw what a step does with experts: `python docs/images/draw_step.py` writes docs/images/step.png. Needs matplotlib.

Three ranks own two experts each, and most tokens choose expert 1. Expert 3 is chosen by few tokens, so these travel instead of its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "step.png"
RANKS, PER_RANK, HOT, COLD = 3, 2, 1, 3
COLOURS = ("#f0d9c8", "#d98c5f", "#7fb3a3", "#cfe5de", "#8fa7cf", "#d5deef")
_LINE = "#51606e"
PANELS = (
    ("1  own", "Each expert's parameters and optimizer state\nare on one rank, its owner."),
    ("2  materialize", "The owner of a popular expert sends copies\nto ranks that have many tokens for it."),
    ("3  compute", "Most tokens find their expert on their rank;\nthe few for expert 3 travel to it, and back."),
    ("4  reduce", "Gradients of the copies are summed up\non the owner."),
    ("5  drop, and step", "Copies are freed; each owner takes\nthe optimizer's step for its experts."),
)


def main() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.1), facecolor="white")
    for number, (title, text) in enumerate(PANELS):
        axis = figure.add_axes((0.005 + number * 0.199, 0.01, 0.194, 0.98))
        axis.set(xlim=(0, 10), ylim=(0, 15))
        axis.axis("off")
        axis.text(0.3, 14.3, title, fontsize=12, fontweight="bold", va="center")
        axis.text(0.3, 12.9, text, fontsize=7.6, va="center")
        for rank in range(RANKS):
            draw_rank(axis, rank, copies=number in (1, 2, 3), tokens=number == 2, stepped=number == 4)
        if number == 1:
            arrows(axis, outwards=True)
        if number == 3:
            arrows(axis, outwards=False)
        if number == 2:
            arrow(axis, (8.0, bottom(0) + 0.4), (4.1, bottom(1) + 2.55), bend=-0.1, dashed=True)
            arrow(axis, (8.0, bottom(2) + 2.6), (4.1, bottom(1) + 0.45), bend=0.1, dashed=True)
    figure.savefig(TARGET, dpi=120, pil_kwargs={"optimize": True})


def bottom(rank: int) -> float:
    return 8.1 - 3.9 * rank


def draw_rank(axis: Any, rank: int, *, copies: bool, tokens: bool, stepped: bool) -> None:
    """A rank with the experts that it owns, and with a copy of the popular one, and tokens in the colours of their experts."""
    box(axis, 0.3, bottom(rank), 9.3, 3.4, "#fafafa")
    axis.text(0.5, bottom(rank) + 3.0, f"rank {rank}", fontsize=7.5, va="center", style="italic")
    for place in range(PER_RANK):
        expert = rank * PER_RANK + place
        left = 0.7 + 2.2 * place
        box(axis, left, bottom(rank) + 0.5, 1.9, 2.0, COLOURS[expert])
        name = f"expert\n{expert}" + ("\nstepped" if stepped else "")
        axis.text(left + 0.95, bottom(rank) + 1.5, name, fontsize=7, ha="center", va="center")
    if copies and rank != HOT // PER_RANK:
        box(axis, 5.3, bottom(rank) + 0.5, 1.9, 2.0, COLOURS[HOT], dashed=True)
        axis.text(6.25, bottom(rank) + 1.5, f"copy\nof {HOT}", fontsize=7, ha="center", va="center")
    if tokens:
        chosen = [HOT] * 4 + [COLD if rank != COLD // PER_RANK else HOT, rank * PER_RANK]
        for number, expert in enumerate([*chosen[4:], *chosen[:4]] if rank == RANKS - 1 else chosen):
            x, y = 7.8 + 0.75 * (number % 2), bottom(rank) + 2.3 - 0.8 * (number // 2)
            box(axis, x, y - 0.25, 0.5, 0.5, COLOURS[expert])


def arrows(axis: Any, *, outwards: bool) -> None:
    """Between the popular expert on its owner and its copies."""
    for rank in range(1, RANKS):
        owner, copy = (4.85, bottom(0) + 0.6 + 0.7 * rank), (5.9 + 0.5 * rank, bottom(rank) + 2.55)
        bend = 0.1 + 0.42 * (rank - 1)
        arrow(axis, *((owner, copy) if outwards else (copy, owner)), bend=-bend if outwards else bend)


def arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], *, bend: float, dashed: bool = False) -> None:
    look = {"arrowstyle": "-|>", "color": _LINE, "lw": 1.3, "ls": "--" if dashed else "-", "connectionstyle": f"arc3,rad={bend}"}
    axis.annotate("", xy=end, xytext=start, arrowprops=look)


def box(axis: Any, left: float, low: float, width: float, height: float, colour: str, *, dashed: bool = False) -> None:
    from matplotlib.patches import FancyBboxPatch

    round_corners = "round,pad=0,rounding_size=0.15"
    style = "--" if dashed else "-"
    axis.add_patch(FancyBboxPatch((left, low), width, height, boxstyle=round_corners, facecolor=colour, edgecolor=_LINE, lw=0.8, ls=style))


if __name__ == "__main__":
    main()
