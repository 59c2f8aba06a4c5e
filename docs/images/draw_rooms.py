"""Draw the rooms of the code: `python docs/images/draw_rooms.py` writes docs/images/rooms.png. Needs matplotlib.

A test holds TIERS to the order of rooms, ROOMS in tests/rooms.py.
"""

from __future__ import annotations

from pathlib import Path

TIERS: dict[str, dict[str, str]] = {
    "apps": {
        "apps.megatron": "the same for\nMegatron's models",
        "apps.answers": "generate, chat,\nevaluate, export",
        "apps.foresee": "memory and time\nwithout a run",
        "apps.sweep": "many runs,\none table",
        "apps.federate": "rounds of clients\nand a server",
        "apps.check": "doctor\nand drills",
        "apps.convert": "configurations\nof others",
        "cli": "the verbs of\nthe command line",
    },
    "run": {
        "optim": "gradient rules\nover shards",
        "checkpoint": "files that survive\na crash",
        "adapters": "formats of\nwhat was trained",
        "report": "progress, metrics,\npictures",
        "elastic": "lost, joining,\nmoved, backed up",
        "train": "the step,\nthe loop",
        "api": "training\nas a call",
        "launch": "start ranks, watch,\nreplace them",
    },
    "a model with\nexperts in it": {
        "config": "keys, ranges,\nrules",
        "data": "files to\nbatches",
        "experts": "families, pairs,\nrouters, the layer",
        "engine": "plan, gather, dispatch,\ncompute, reduce",
        "model": "load a model,\nput experts in",
    },
    "moving,\ncomputing": {
        "parallel.comm": "collectives, dispatch,\nexpert store (torch)",
        "kernels": "what computes\nexperts",
        "ranks": "this process\namong the others",
    },
    "planning\n(numpy)": {
        "parallel.loops": "compiled\nloops",
        "parallel.values": "units, loads,\nplacements",
        "parallel.cluster": "devices\nand links",
        "parallel.cost": "seconds\nand bytes",
        "parallel.transfer": "what moves\nwhere",
        "parallel.planners": "where experts\nshould be",
        "parallel.plan": "whole\nsteps",
        "parallel.simulate": "steps without\na GPU",
    },
    "ground": {
        "errors": "what a user\nreads",
        "faults": "where drills\nput faults",
        "io": "durable\nfiles",
    },
}
"""tiers from the top, each with its rooms (below the package `hecate`) and what is in them, from the bottom of ROOMS upwards"""
TARGET = Path(__file__).parent / "rooms.png"
_COLOURS = ("#e8eef7", "#e6f2ec", "#fdf3dc", "#f9e6dd", "#efe8f5", "#eceff1")


def main() -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    figure = Figure(figsize=(9.0, 5.6), facecolor="white")
    axis = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axis.set(xlim=(0, 100), ylim=(0, 6 * len(TIERS) + 2))
    axis.axis("off")
    for row, ((tier, rooms), colour) in enumerate(zip(TIERS.items(), _COLOURS, strict=True)):
        bottom = 6 * (len(TIERS) - 1 - row) + 0.6
        axis.text(11, bottom + 2.5, tier, ha="right", va="center", fontsize=9, style="italic")
        width = 83 / len(rooms)
        for column, (room, about) in enumerate(rooms.items()):
            left = 13 + column * width
            shape = FancyBboxPatch(
                (left, bottom), width - 1.6, 5, boxstyle="round,pad=0,rounding_size=0.6", facecolor=colour, edgecolor="#51606e"
            )
            axis.add_patch(shape)
            centre = left + width / 2 - 0.8
            axis.text(centre, bottom + 3.75, room, ha="center", va="center", fontsize=9 if len(rooms) < 8 else 7.2, fontweight="bold")
            axis.text(centre, bottom + 1.75, about, ha="center", va="center", fontsize=6.9)
    top = 6 * len(TIERS) + 0.2
    axis.annotate("", xy=(98.2, 1.0), xytext=(98.2, top), arrowprops={"arrowstyle": "-|>", "color": "#51606e", "lw": 1.4})
    axis.text(99.4, top / 2, "imports point down", rotation=270, ha="center", va="center", fontsize=8)
    axis.text(
        13,
        top + 0.6,
        "Rooms of hecate: each imports only rooms of its own tier that come before it, and of the tiers below",
        fontsize=9.5,
        va="center",
    )
    figure.savefig(TARGET, dpi=130, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
