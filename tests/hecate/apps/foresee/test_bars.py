"""The picture of simulated step times names its models, clusters and workloads, and its bars have the right lengths and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.text import Text

from hecate.apps.foresee.bars import PARTS, draw_bars, write_bars
from hecate.apps.foresee.report import COST, SPEEDUP
from hecate.errors import UserError


def row(policy: str, seconds: float, **changes: Any) -> dict[str, Any]:
    """A step of which the experts take all but a quarter, which tokens take."""
    parts = dict.fromkeys((*PARTS, "gather", "reduce"), 0.0) | {"compute": 0.75 * seconds, "dispatch": 0.25 * seconds}
    common = {"topology": "cluster", "ranks": 2, "model": "small", "kind": "moe_lora", "experts": 4, "workload": "zipf"}
    sizes = {"tokens_per_rank": 8192, "memory_bytes": 3e9, "fits_memory": True}
    return common | sizes | {"policy": policy, "step_seconds": seconds, "seconds": parts, SPEEDUP: 4 / seconds, COST: None, **changes}


def texts(figure: Figure) -> list[str]:
    figure.draw_without_rendering()  # tick labels are made when they are drawn
    found = [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text)]
    return [text for text in found if text]


def test_model_cluster_and_workload_are_named() -> None:
    shown = "\n".join(texts(draw_bars([row("static_ep", 4.0), row("auto", 1.0)])))
    for part in (
        "small: LoRA on frozen experts",
        "4 experts",
        "8,192 tokens",
        "cluster (2 ranks)",
        "workload zipf",
        "one training step",
        "fits: auto\n16,384 tokens/s",
    ):
        assert part in shown


def test_a_bar_says_speedup_and_memory_and_is_as_long_as_the_step() -> None:
    figure = draw_bars([row("static_ep", 4.0), row("auto", 1.0), row("full", 2.0, fits_memory=False)])
    shown = texts(figure)
    assert {"4000 ms, 1.00x, 3 GB", "1000 ms, 4.00x, 3 GB", "2000 ms, 2.00x, 3 GB: too much"} <= set(shown)
    (axis,) = figure.axes
    ends = {round(patch.get_y() + patch.get_height() / 2): patch.get_x() + patch.get_width() for patch in axis.patches}  # type: ignore[attr-defined]
    assert ends == pytest.approx({0: 4000, 1: 1000, 2: 2000})


def test_several_workloads_are_one_bar() -> None:
    """2 s and 4 s over 4 s and 12 s of the baseline: 6 s over 16 s."""
    both = [row("static_ep", 4.0), row("auto", 2.0), row("static_ep", 12.0, workload="burst"), row("auto", 4.0, workload="burst")]
    for one in both:
        one[SPEEDUP] = {"zipf": 4.0, "burst": 12.0}[one["workload"]] / one["step_seconds"]
    shown = texts(draw_bars(both))
    assert "3000 ms, 2.67x, 3 GB" in shown
    assert any("mean of the workloads zipf, burst" in text for text in shown)


def test_without_the_baseline_a_bar_says_its_time() -> None:
    shown = texts(draw_bars([row("auto", 0.25, **{SPEEDUP: None})]))
    assert "250 ms, 3 GB" in shown


def test_clusters_with_a_price_are_drawn_to_one_scale_with_their_costs() -> None:
    """The policy that is fastest does not fit, so that the panel names the next one."""
    first = [row("static_ep", 4.0, **{COST: 0.5}), row("full", 1.0, fits_memory=False, **{COST: 0.125})]
    figure = draw_bars([*first, row("static_ep", 8.0, topology="slow"), row("full", 8.0, topology="slow")])
    shown = texts(figure)
    assert {"4000 ms, 1.00x, 3 GB, cost 0.5", "1000 ms, 4.00x, 3 GB: too much, cost 0.125", "8000 ms, 0.50x, 3 GB"} <= set(shown)
    assert any("static_ep\n4,096 tokens/s, a million for 0.5" in text for text in shown)
    assert any("cost of a million tokens" in text for text in shown)
    left, right = (axis.get_xlim()[1] for axis in figure.axes)
    assert left == right > 8000


def test_the_default_policy_is_marked_and_parts_that_are_nothing_are_not_explained() -> None:
    figure = draw_bars([row("static_ep", 4.0), row("auto", 1.0)])
    shown = texts(figure)
    assert "auto\n(the default)" in shown
    assert "static_ep\n(expert parallelism)" in shown
    assert PARTS["compute"][0] in shown
    assert PARTS["reshard"][0] not in shown


def test_the_picture_is_opaque(tmp_path: Path) -> None:
    figure = draw_bars([row("static_ep", 4.0)])
    assert figure.get_facecolor() == (1, 1, 1, 1)
    write_bars(
        tmp_path / "new" / "bars.png", [row("static_ep", 4.0), row("static_ep", 4.0, model="large"), row("static_ep", 4.0, model="third")]
    )
    assert (tmp_path / "new" / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_bars(tmp_path / "file" / "bars.png", [row("auto", 1.0)])
