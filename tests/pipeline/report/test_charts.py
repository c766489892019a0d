from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.report import charts
from pipeline.report.charts import Point


def paths(drawing: str, name: str) -> list[list[float]]:
    """The numbers in the paths of a class of elements."""
    found = re.findall(rf'<g class="{name}">.*?<path d="([^"]+)"', drawing)
    return [[float(number) for number in re.findall(r"-?[\d.]+", path)] for path in found]


def test_the_reliability_diagram_shows_the_share_correct() -> None:
    drawing = str(charts.reliability([[0, 0, 0], [100, 20, 100 * 102], [300, 270, 300 * 230]]))
    heights = [max(path[1::2]) - min(path[1::2]) for path in paths(drawing, "fill")]
    np.testing.assert_allclose(heights, [272 * 0.2, 272 * 0.9], atol=0.01)
    counts = [max(path[1::2]) - min(path[1::2]) for path in paths(drawing, "count")]
    assert counts[0] * 3 == pytest.approx(counts[1], abs=0.05)
    assert "20.0 % correct at a mean confidence of 40.0 %, 25.0 % of the pixels</title>" in drawing


def test_a_curve_goes_through_its_points() -> None:
    drawing = str(
        charts.curve(
            [Point(1, 0.0), Point(3, 1.0, 0.9, 1.0)],
            label="a <b>",
            references=[0.5],
            published=[Point(2, 0.5)],
            others=[[Point(1, 1.0), Point(2, 0.0)]],
            xs=[1, 2, 3],
            top=1.0,
        )
    )
    assert paths(drawing, "main") == [[44, 118, 230, 8]] and paths(drawing, "faint") == [[44, 8, 137, 118]]
    assert paths(drawing, "reference") == [[44, 63, 230, 63]] and paths(drawing, "theirs") == [[137, 63] * 2]
    assert "<title>3: 100.0 % (95 %: 90.0 to 100.0)</title>" in drawing
    assert "<title>published at 2: 50.0 %</title>" in drawing
    assert 'role="img" aria-label="a &lt;b&gt;"' in drawing


def test_charts_take_colours_and_fonts_from_the_page_and_no_ids() -> None:
    drawing = str(charts.trace([Point(0, 1), Point(9, 2)], label="loss", marks=[3]))
    assert re.findall(r"#[0-9a-fA-F]{6}", drawing) == [] and "var(--accent)" in drawing
    assert " id=" not in drawing and "url(" not in drawing and "font-family" not in drawing
    assert "<script" not in drawing and "<style" not in drawing and "<metadata" not in drawing


def test_a_trace_spans_its_points_and_marks() -> None:
    points = [Point(float(x), float(x % 7)) for x in range(0, 5000)]
    drawing = str(charts.trace(points, label="loss <x>", marks=[100.0, 9999.0]))
    assert len(paths(drawing, "reference")) == 1 and "loss &lt;x&gt;" in drawing
    assert len(paths(drawing, "main")[0]) < 2000  # thinned


@pytest.mark.parametrize(
    ("largest", "top"),
    [(0.0, 1.0), (0.471, 0.5), (0.5, 0.5), (0.61, 0.8), (81.0, 100.0), (1.2, 1.5), (3e-4, 3e-4)],
)
def test_axes_end_at_a_round_number(largest: float, top: float) -> None:
    assert charts.nice_top(largest) == pytest.approx(top)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 21, 60, 171])
def test_the_confusion_matrix_has_room_for_every_name(tmp_path: Path, count: int) -> None:
    names = [
        "a rather long class name, cut off at the end",
        *[f"class $_{index}" for index in range(1, count)],
    ]
    confusion = np.zeros((count, count + 1), dtype=np.int64)
    confusion[0, -1] = 5000
    confusion[np.arange(1, count), np.arange(1, count)] = 5000
    charts.save_confusion(tmp_path / "c.png", confusion, names, title="x")
    with Image.open(tmp_path / "c.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert min(image.size) > 14 * count and max(image.size) < 5200
    dark = (np.abs(pixels - np.array([8, 48, 107])).sum(-1) < 12).sum(0)
    # The cells of the first row's last column and of the diagonal: full shares, the darkest blue.
    assert (dark > 8).sum() > 8 * count
