"""A queue goes to Label Studio and CVAT, and what people correct there comes back."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from jobs.export import Export
from jobs.import_ import Import
from models.errors import WrongUse
from pipeline.formats.brush import encode_brush
from pipeline.review.queue import write_queue
from pipeline.table.corrections import open_corrections
from pipeline.table.labels import decode_mask, iter_rows
from tests.pipeline.review.reviews import TOYWORLD, make_reviewed, queue_of, row_id, truth_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = make_reviewed(tmp_path, [0.5, 0.4, 0.3, 0.2])
    write_queue(queue_of(folder, 3), str(folder / "table"))
    return folder


def export(folder: Path, format: str) -> Path:
    table, output = str(folder / "table"), folder / format
    Export(source=table, format=format, queue=table, output=str(output), workers=0).run(Console(quiet=True))
    return output


def take_back(folder: Path, format: str, place: Path, **options: str) -> str:
    console = Console(file=io.StringIO(), width=200)
    Import(format=format, input=str(place), corrects=str(folder / "table"), **options).run(console)  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def saved(folder: Path) -> dict[int, tuple[str, np.ndarray]]:
    place = folder / "table" / "corrections"
    rows = [pq.read_table(file).to_pylist()[0] for file in (place / "labels").iterdir()]
    return {row["id"]: (row["decision"], decode_mask(row["mask"]["bytes"])) for row in rows}


def test_label_studio(folder: Path) -> None:
    place = export(folder, "labelstudio")
    tasks = json.loads((place / "tasks.json").read_text())
    assert len(tasks) == 3
    by_name = {task["data"]["name"].split("_")[1]: task for task in tasks}
    # As Label Studio exports them: one is submitted as it was, one corrected, one skipped.
    accepted, corrected, skipped = (by_name[name] for name in ("000", "001", "002"))
    accepted["annotations"] = [{"result": accepted["predictions"][0]["result"]}]
    template = corrected["predictions"][0]["result"][0]
    truth = truth_of(folder, 1)
    corrected["annotations"] = [
        {
            "result": [
                {**template, "id": f"x{number}", "value": {
                    "format": "rle",
                    "rle": encode_brush(truth == number),
                    "brushlabels": [TOYWORLD.names[number]],
                }}
                for number in np.unique(truth).tolist()
            ]
        }
    ]  # fmt: skip
    skipped["annotations"] = [{"result": [], "was_cancelled": True}]
    stranger = json.loads(json.dumps(accepted).replace("scene_000_0", "scene_999_0"))
    (place / "tasks.json").write_text(json.dumps([*tasks, stranger]))

    told = take_back(folder, "labelstudio", place, reviewer="Ann")
    assert "2 images, 1 of them" in told and "1 of an image that the table does not have" in told
    found = saved(folder)
    assert set(found) == {row_id(folder, 0), row_id(folder, 1)}
    assert found[row_id(folder, 0)][0] == "accepted" and found[row_id(folder, 1)][0] == "painted"
    np.testing.assert_array_equal(found[row_id(folder, 1)][1], truth)
    assert "2 were there already" in take_back(folder, "labelstudio", place)
    corrections = open_corrections(str(folder / "table"))
    assert corrections is not None and len(corrections.files) == 2


def test_cvat(folder: Path) -> None:
    place = export(folder, "cvat")
    (changed,) = (place / "SegmentationClass").glob("scene_000*.png")
    pixels = np.array(Image.open(changed))
    pixels[:24] = pixels[-1, -1]  # somebody has painted over the upper half
    Image.fromarray(pixels).save(changed)
    told = take_back(folder, "cvat", place)
    assert "3 images, 1 of them" in told
    before = {row["id"]: decode_mask(row["mask"]["bytes"]) for row in iter_rows(str(folder / "table"))}
    decision, labels = saved(folder)[row_id(folder, 0)]
    assert decision == "painted" and (labels[:24] == before[row_id(folder, 0)][-1, -1]).all()
    np.testing.assert_array_equal(labels[24:], before[row_id(folder, 0)][24:])
    with pytest.raises(WrongUse, match="believed already"):
        Import(format="cvat", input=str(place), corrects=str(folder / "table" / "corrections")).run(
            Console(quiet=True)
        )
