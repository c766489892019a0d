"""``maskmill export`` in every format that can be read, on one table of toy scenes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.files.images import decode
from pipeline.files.status import STATUS_FILE
from pipeline.files.storage import Storage
from pipeline.formats.registry import find_reader, readable
from pipeline.table.labels import OK, decode_mask, iter_rows
from tests.pipeline.formats.tables import TOYWORLD, toy_table

COUNT = 24
"""So many that neither split is empty: which images are in it depends on where they are."""


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Storage:
    folder = tmp_path_factory.mktemp("toy")
    return toy_table(folder / "table", COUNT, images=folder / "images")


@pytest.fixture(scope="module")
def truth(table) -> dict[str, np.ndarray]:
    rows = iter_rows(table, ["uri", "status", "mask"])
    return {Path(row["uri"]).stem: decode_mask(row["mask"]["bytes"]) for row in rows if row["status"] == OK}


def files(output: Path) -> dict[Path, bytes]:
    """All files of an export but its status, which tells times."""
    found = (path for path in output.rglob("*") if path.is_file() and path.name != STATUS_FILE)
    return {path: path.read_bytes() for path in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", readable())
def test_labels_and_images_come_back(tmp_path, maskmill_here, table, truth, name):
    output = tmp_path / "out"
    command = (
        "export",
        table.uri,
        "--format",
        name,
        "--output",
        output,
        "--with-images",
        "--val-share",
        "0.4",
    )
    done = maskmill_here(*command)
    assert done.returncode == 0, done.stderr
    record = json.loads((output / "export.json").read_text())
    assert sum(record["images"].values()) == COUNT - 1 and set(record["images"]) == {"train", "val"}
    assert all((output / file).exists() for file in record["files"])

    imported = find_reader(name)(str(output))
    found = {Path(sample.name).name: sample for sample in imported.samples}
    assert imported.ontology.names == TOYWORLD.names and found.keys() == truth.keys()
    for key, sample in found.items():
        assert sample.labels.shape == truth[key].shape
        if not any(record["lost"].values()):
            ignored = truth[key] == TOYWORLD.ignore_index
            assert (sample.labels == np.where(ignored, imported.ontology.ignore_index, truth[key])).all()
        data = sample.image if sample.image is not None else Path(sample.uri).read_bytes()
        assert decode(data).shape[:2] == sample.labels.shape
    assert {sample.split for sample in found.values()} == {"train", "val"}

    before = files(output)
    done = maskmill_here(*command, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert files(output) == before


@pytest.mark.parametrize(
    ("name", "options"), [("yolo", ["smallest=9"]), ("coco", ["min_area=9"]), ("coco", [])]
)
def test_what_a_format_loses_is_told(tmp_path, maskmill_here, table, truth, name, options):
    """Polygons and segments that are too small: as many pixels as differ when the export is read again."""
    output = tmp_path / "out"
    settings = [word for option in options for word in ("--set", option)]
    done = maskmill_here(
        "export", table.uri, "--format", name, "--output", output, "--with-images", *settings
    )
    assert done.returncode == 0, done.stderr
    lost = json.loads((output / "export.json").read_text())["lost"]
    found = {Path(sample.name).name: sample.labels for sample in find_reader(name)(str(output)).samples}
    wrong = sum(int((found[key] != labels)[labels != 255].sum()) for key, labels in truth.items())
    assert wrong == lost["pixels"] and bool(wrong) == bool(options)
    told = ", ".join(f"{count:,} {what}" for what, count in lost.items() if count)
    assert f"  not carried  {told or 'nothing was lost'}\n" in done.stderr


def test_load_dataset_opens_images_and_masks(tmp_path, monkeypatch, maskmill_here, table, truth):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    for images in ((), ("--with-images",)):
        output = tmp_path / f"out{len(images)}"
        done = maskmill_here("export", table.uri, "--format", "hf", "--output", output, *images)
        assert done.returncode == 0, done.stderr
        rows = datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
        assert len(rows) == COUNT - 1
        for row in rows:
            assert isinstance(row["image"], Image.Image) and row["image"].size == (48, 48)
            assert (np.asarray(row["mask"]) == truth[row["name"]]).all()
