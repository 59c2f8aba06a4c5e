import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hecate.errors import UserError
from hecate.report.pages.heatmap import write_heatmap

pytest.importorskip("matplotlib")

Shares = dict[str, list[list[float]]]


def even(num_tasks: int, experts: list[int]) -> Shares:
    return {f"task_{task}": [[1 / count] * count for count in experts] for task in range(num_tasks)}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Shares, str], Any]:
    """Draw, and return the matplotlib Figure with its layout done."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig

    def saving(figure: Figure, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", saving)

    def draw(shares: Shares, title: str) -> Figure:
        write_heatmap(tmp_path / "heat.png", shares, title)
        return figures[-1]

    return draw


def images(figure: Any) -> dict[str, Any]:
    """title of each panel -> its picture"""
    return {axes.get_title(): axes.images[0] for axes in figure.axes if axes.images}


def test_a_png(tmp_path: Path) -> None:
    from PIL import Image

    write_heatmap(tmp_path / "heat.png", even(4, [8] * 30), "load")
    with Image.open(tmp_path / "heat.png") as picture:
        assert picture.format == "PNG"
        assert 800 < picture.width < 2500
        assert 400 < picture.height < 1500


def test_cells_hold_the_shares_and_the_rest_is_blank(drawn: Callable[[Shares, str], Any]) -> None:
    # The layer in the middle has no experts.
    panels = images(drawn({"gcd": [[0.25, 0.75], [], [0.5, 0.2, 0.3]], "sum": [[1.0, 0.0], [], [0.1, 0.1, 0.8]]}, "load"))
    nan = np.nan
    np.testing.assert_equal(panels["gcd"].get_array().filled(nan), np.array([[0.25, 0.75, nan], [nan, nan, nan], [0.5, 0.2, 0.3]]))
    np.testing.assert_equal(panels["sum"].get_array().filled(nan), np.array([[1.0, 0.0, nan], [nan, nan, nan], [0.1, 0.1, 0.8]]))
    assert {image.get_clim() for image in panels.values()} == {(0.0, 1.0)}, "one scale for all"


def test_axes_are_labelled_and_layer_0_is_on_top(drawn: Callable[[Shares, str], Any]) -> None:
    figure = drawn(even(2, [4] * 3), "a title with $ and _")
    assert (figure.get_suptitle(), figure.get_supxlabel(), figure.get_supylabel()) == ("a title with $ and _", "expert", "layer")
    for image in images(figure).values():
        assert image.axes.get_ylim() == (2.5, -0.5)
        assert [tick.get_text() for tick in image.axes.get_xticklabels()] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(("num_tasks", "layers"), [(1, 1), (2, 80), (5, 80), (12, 1)])
def test_nothing_overlaps_or_leaves_the_picture(drawn: Callable[[Shares, str], Any], num_tasks: int, layers: int) -> None:
    shares = even(num_tasks - 1, [8] * layers) | {"w" * 64: [[0.125] * 8] * layers}
    figure = drawn(shares, "Expert load by layer and task")
    panels = [image.axes for image in images(figure).values()]
    assert len(panels) == num_tasks
    boxes = [axes.get_tightbbox() for axes in panels]
    for number, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:number]), number
    assert min(axes.bbox.height for axes in panels) > 60
    assert min(axes.bbox.width for axes in panels) > 60


def test_a_task_whose_layers_had_no_token(drawn: Callable[[Shares, str], Any]) -> None:
    panels = images(drawn({"idle": [[0.0, 0.0]]}, "load"))
    assert panels["idle"].get_clim() == (0.0, 1.0)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.ticker"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install '\.\[report\]'"):
        write_heatmap(tmp_path / "heat.png", even(1, [2]), "load")


def test_no_folder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"heat\.png: the heatmap cannot be written: No such file"):
        write_heatmap(tmp_path / "missing" / "heat.png", even(1, [2]), "load")
