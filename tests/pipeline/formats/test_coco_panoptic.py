"""COCO panoptic: what panopticapi checks is checked here by its rules, written anew."""

from __future__ import annotations

import json
import shutil

import numpy as np
from hypothesis import given, settings
from PIL import Image

from pipeline.files.storage import Storage, open_storage
from pipeline.formats.base import Loss, Sample
from pipeline.formats.coco_panoptic import CocoPanoptic, find_segments, read_coco_panoptic
from pipeline.ontology.ontology import Ontology
from tests.pipeline.formats.drawn import check_same, contents, datasets, export, picture

ONTOLOGY = Ontology.from_dict(
    {
        "name": "yard",
        "classes": [{"name": "cat", "kind": "thing"}, {"name": "grass", "kind": "stuff"}, "wall"],
    }
)
LABELS = np.array(
    [
        [0, 0, 1, 1, 0],
        [0, 1, 1, 1, 0],
        [1, 0, 1, 2, 1],
        [255, 255, 1, 2, 2],
    ],
    np.uint8,
)


def sample(labels: np.ndarray = LABELS, **fields: object) -> Sample:
    given: dict = {
        "number": 6,
        "id": 1,
        "name": "a b/c.d",
        "uri": "s3://b/c.d.jpg",
        "suffix": ".jpg",
    } | fields
    return Sample(labels=labels, **given)


def judge(output: Storage, name: str) -> list[tuple[np.ndarray, dict[int, dict]]]:
    """What panopticapi refuses is refused; ids of segments (H, W) and their entries by image."""
    file = json.loads(output.read_bytes(f"annotations/{name}.json"))
    categories = {one["id"]: one for one in file["categories"]}
    images = {one["id"]: one for one in file["images"]}
    assert len(categories) == len(file["categories"]) and len(images) == len(file["images"])
    assert all(one["isthing"] in (0, 1) and len(one["color"]) == 3 for one in categories.values())
    judged = []
    for one in file["annotations"]:
        with Image.open(output.path(f"annotations/{name}/{one['file_name']}")) as opened:
            assert opened.mode == "RGB"
            rgb = np.asarray(opened, np.uint32)
        ids = rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2]
        image = images.pop(one["image_id"])
        assert ids.shape == (image["height"], image["width"])
        segments = {segment["id"]: segment for segment in one["segments_info"]}
        values, areas = np.unique(ids[ids > 0], return_counts=True)
        # In the PNG and not in the JSON, or the other way round: panopticapi stops.
        assert sorted(segments) == values.tolist() and len(segments) == len(one["segments_info"])
        stuff = []
        for value, area in zip(values.tolist(), areas.tolist(), strict=True):
            segment = segments[value]
            y, x = np.nonzero(ids == value)
            box = [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
            assert segment["area"] == area and segment["bbox"] == box and segment["iscrowd"] == 0
            if not categories[segment["category_id"]]["isthing"]:
                stuff.append(segment["category_id"])
        assert len(stuff) == len(set(stuff)), "a stuff class is one segment"
        judged.append((ids, segments))
    assert not images
    return judged


def test_instances_are_components_of_things_and_stuff_is_one_segment(tmp_path):
    output = open_storage(tmp_path)
    names, lost = export(CocoPanoptic(), ONTOLOGY, [sample(image=picture(4, 5, ".jpg"))], output)
    assert names == ["annotations/panoptic_train.json"] and lost == Loss()
    ((ids, segments),) = judge(output, "panoptic_train")
    assert [one["category_id"] for one in segments.values()] == [1, 1, 2, 3]
    # A corner joins.
    assert ids.tolist() == [[1, 1, 3, 3, 2], [1, 3, 3, 3, 2], [3, 1, 3, 4, 3], [0, 0, 3, 4, 4]]
    assert (tmp_path / "images/train/a b/c.d.jpg").read_bytes() == picture(4, 5, ".jpg")


def test_what_is_left_open_can_be_a_thing_and_specks_can_be_left_out(tmp_path):
    output = open_storage(tmp_path)
    _, lost = export(CocoPanoptic(unspecified="thing", min_area=3), ONTOLOGY, [sample()], output)
    ((ids, segments),) = judge(output, "panoptic_train")
    assert all(one["area"] >= 3 for one in segments.values())
    assert lost == Loss(pixels=int((ids == 0).sum()) - 2, segments=1)


def test_too_many_segments_are_classes():
    labels = np.zeros((9, 9), np.uint8)
    labels[::2, ::2] = 1
    things = np.array([False, True])
    assert len(find_segments(labels, things, 255, most=26)[1]) == 26
    ids, classes = find_segments(labels, things, 255, most=25)
    assert classes.tolist() == [0, 1] and (ids == labels + 1).all()


@given(datasets())
@settings(max_examples=10)
def test_labels_come_back(tmp_path_factory, drawn):
    ontology, samples = drawn
    output = open_storage(tmp_path_factory.mktemp("out"))
    names, lost = export(CocoPanoptic(unspecified="thing"), ontology, samples, output)
    assert lost == Loss() and names == sorted({f"annotations/panoptic_{one.split}.json" for one in samples})
    for name in names:
        judge(output, name.removeprefix("annotations/").removesuffix(".json"))
    before = contents(output)
    export(CocoPanoptic(unspecified="thing"), ontology, samples, output)
    assert contents(output) == before
    if samples:
        read = read_coco_panoptic(output.uri)
        check_same(read, ontology, samples)
        assert (read.ontology.palette() == ontology.palette()).all()
        assert read.ontology.kinds() == [kind or "thing" for kind in ontology.kinds()]
    shutil.rmtree(output.root)
