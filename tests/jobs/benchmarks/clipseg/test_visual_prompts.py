"""The rows of CLIPSeg's Table 2 on the toy world, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from jobs.benchmarks.clipseg.visual_prompts import TABLES
from jobs.benchmarks.tables import Request
from models.clip.loading import load_clip
from models.errors import MaskMillError
from pipeline.datasets.registry import open_dataset
from pipeline.evaluation.prompts.strategies import UNMODIFIED, draw_objects, object_probabilities
from pipeline.evaluation.published import load_published
from pipeline.evaluation.results import Section

TOY = {"model": "toyclip", "pretrained": "bundled"}


def run(folder: Path, **fields: Any) -> list[Section]:
    wanted = Request(folder=folder, console=Console(file=io.StringIO()), **fields)
    return list(TABLES["prompt-strategies"][1](wanted))


@pytest.mark.slow
def test_rows_on_the_toy_world(tmp_path: Path) -> None:
    run(tmp_path, datasets=["toyworld"], settings=TOY, limit=6, rows=["mask CLS"])  # others may follow
    (section,) = run(tmp_path, datasets=["toyworld"], settings=TOY, limit=6, rows=["crop", "mask CLS"])
    wanted = [
        "mask CLS, layer 11", "mask CLS, all layers", "crop large context", "crop", "crop & BG blur",
        "crop & BG intensity 10 %", "crop & blur & 10 %",
    ]  # fmt: skip
    dataset: Any = open_dataset("toyworld")
    expected = object_probabilities(load_clip("toyclip", "bundled"), draw_objects(dataset, 6), wanted)
    base = np.array(expected[UNMODIFIED])
    rows = {line.name: line for line in section.rows}
    assert list(rows) == [
        UNMODIFIED,
        *(line.method for line in load_published("clipseg_visual_prompts").rows),
    ]
    for name in wanted:
        value = rows[name].values["delta_probability"]
        change = np.array(expected[name]) - base
        assert value.mean == pytest.approx(change.mean())
        half = 2.5706 * change.std(ddof=1) / 6**0.5  # Student's t with 5 degrees of freedom
        assert value.high - value.mean == pytest.approx(half, rel=1e-3)
        assert rows[name].missing is None
    assert rows[UNMODIFIED].values["probability"].mean == pytest.approx(base.mean())
    assert rows["crop"].published == {"delta_probability": 0.136}
    assert rows["red outline"].missing == "not asked for"
    assert "6 objects of seed-2" in section.note and "not comparable" in section.note
    assert "--limit 6 counts objects" in section.note

    # Kept: an earlier result is taken, and refused for something else.
    assert len(list((tmp_path / "rows").iterdir())) == 1 + len(wanted)
    file = tmp_path / "rows" / "toyworld-visual-prompts-crop.json"
    kept = json.loads(file.read_text())
    kept["found"]["probabilities"] = [1.0] * 6
    file.write_text(json.dumps(kept))
    (again,) = run(tmp_path, datasets=["toyworld"], settings=TOY, limit=6, rows=["crop", "mask CLS"])
    (crop,) = (line for line in again.rows if line.name == "crop")
    assert crop.values["probability"].mean == 1
    with pytest.raises(MaskMillError) as caught:
        run(tmp_path, datasets=["toyworld"], settings=TOY, limit=5, rows=["crop", "mask CLS"])
    assert caught.value.code == "output_differs"


def test_without_data_the_rows_say_what_they_need(tmp_path: Path) -> None:
    (section,) = run(tmp_path)
    assert len(section.rows) == 15 and not any(line.values for line in section.rows)
    assert all("--root lvis=DIR" in line.missing for line in section.rows)
    assert section.rows[2].published == {"delta_probability": -0.1444}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"weights": {"crop": "x.pth"}}, "--weights"),
        ({"datasets": ["phrasecut"]}, "'phrasecut' is not a dataset with masks of classes"),
        ({"roots": {"nothing": "x"}}, "'nothing' is not a dataset"),
        ({"settings": {"window": 3}}, "no setting 'window'"),
    ],
)
def test_wrong_use(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(MaskMillError, match=says) as caught:
        run(tmp_path, **fields)
    assert caught.value.code == "wrong_use"
