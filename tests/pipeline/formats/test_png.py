"""Grey PNGs of class ids, read as Pillow and OpenCV do."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.formats.base import Loss, Sample
from pipeline.formats.png import IMAGES_FILE, Png, read_png
from pipeline.ontology.ontology import Ontology
from tests.pipeline.formats.drawn import check_same, contents, datasets, export

Drawn = tuple[Ontology, list[Sample]]


@given(datasets())
@settings(max_examples=30)
def test_every_pixel_comes_back_and_others_read_the_same(
    tmp_path_factory: pytest.TempPathFactory, drawn: Drawn
) -> None:
    ontology, samples = drawn
    folder = tmp_path_factory.mktemp("out")
    _, lost = export(Png(), ontology, samples, open_storage(folder))
    assert lost == Loss()
    check_same(read_png(str(folder)), ontology, samples)
    for one in samples:
        path = folder / "masks" / f"{one.name}.png"
        with Image.open(path) as mask:
            np.testing.assert_array_equal(np.asarray(mask), one.labels)
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert mask is not None and mask.dtype == one.labels.dtype
        np.testing.assert_array_equal(mask, one.labels)


@given(datasets(images=True))
@settings(max_examples=10)
def test_copied_images_come_back_and_the_bytes_are_the_same_again(
    tmp_path_factory: pytest.TempPathFactory, drawn: Drawn
) -> None:
    ontology, samples = drawn
    outputs = [open_storage(tmp_path_factory.mktemp("out")) for _ in range(2)]
    for output in outputs:
        export(Png(), ontology, samples, output)
    assert contents(outputs[0]) == contents(outputs[1])
    found = {one.name: one.uri for one in read_png(outputs[0].uri).samples}
    assert {name: Path(uri).read_bytes() for name, uri in found.items()} == {
        one.name: one.image for one in samples
    }


@pytest.mark.parametrize("place", ["../outside.png", "/etc/outside.png", "masks/../../outside.png"])
def test_a_list_that_leads_out_of_the_export_is_refused(tmp_path: Path, place: str) -> None:
    ontology = Ontology.from_dict({"name": "pets", "background": None, "classes": ["cat", "dog"]})
    sample = Sample(
        number=0,
        id=1,
        name="a",
        uri="/d/a.jpg",
        suffix=".jpg",
        split="train",
        labels=np.zeros((2, 3), np.uint8),
    )
    export(Png(), ontology, [sample], open_storage(tmp_path))
    (rows,) = csv.DictReader((tmp_path / IMAGES_FILE).open(newline=""))
    with (tmp_path / IMAGES_FILE).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows)
        writer.writeheader()
        writer.writerow(rows | {"mask": place})
    with pytest.raises(MaskMillError) as caught:
        [one.labels for one in read_png(str(tmp_path)).samples]
    assert caught.value.exit_status == 2
