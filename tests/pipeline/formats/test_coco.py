from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.formats.base import Loss, Sample
from pipeline.formats.coco import Coco, encode_components, find_segments, read_coco
from pipeline.ontology.ontology import Ontology

WITH = Ontology.from_dict({"name": "pets", "classes": ["cat", "dog"], "background": ["wall"]})
WITHOUT = Ontology.from_dict({"name": "pets", "classes": ["cat", "dog", "car"], "background": None})
label_maps = arrays.arrays(
    np.uint8,
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    elements=st.sampled_from([0, 1, 2, 255]),
)


def sample(number: int, labels: np.ndarray, **changes: Any) -> Sample:
    fields = {"name": f"a/{number}", "uri": f"/d/a/{number}.JPG", "suffix": ".jpg"} | changes
    return Sample(number=number, id=number, labels=labels, **fields)


def export(made: Coco, samples: Iterable[Sample], ontology: Ontology, place: str | Path) -> Loss:
    output, total = open_storage(place), Loss()
    written = list(made.write_part("00000", samples, ontology, output))
    for one in written:
        total.add(one.lost)
    made.finish(json.loads(json.dumps([one.entry for one in written])), ontology, output)
    return total


def dataset(place: Path, split: str = "train") -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(place / f"annotations/instances_{split}.json")


@pytest.mark.parametrize("ontology", [WITH, WITHOUT])
@settings(max_examples=50)
@given(maps=st.lists(label_maps, min_size=1, max_size=3))
def test_every_pixel_comes_back(ontology: Ontology, maps: list[np.ndarray]) -> None:
    place = f"memory://coco-{id(maps)}"
    lost = export(Coco(), (sample(n, one) for n, one in enumerate(maps)), ontology, place)
    assert lost == Loss()
    read = read_coco(place)
    assert read.ontology == ontology and read.count == len(maps)
    back = list(read.samples)
    assert [one.name for one in back] == [f"a/{n}" for n in range(len(maps))]
    assert [one.uri for one in back] == [f"/d/a/{n}.JPG" for n in range(len(maps))]
    for one, labels in zip(back, maps, strict=True):
        assert one.labels.dtype == np.uint8 and np.array_equal(one.labels, labels)


@given(label_maps)
@settings(max_examples=200)
def test_segments_are_those_of_scipy_and_rles_those_of_pycocotools(labels: np.ndarray) -> None:
    segments, components, _ = find_segments(labels, leave_out={255})
    texts = encode_components(components, len(segments))
    expected = []
    for class_id in (0, 1, 2):
        found, count = ndimage.label(labels == class_id, np.ones((3, 3)))
        for number in range(1, count + 1):
            code = rle.encode(np.asfortranarray((found == number).astype(np.uint8)))
            box = tuple(rle.toBbox(code).astype(int).tolist())
            expected.append((class_id, int(rle.area(code)), box, code["counts"].decode()))
    made = [(s.class_id, s.area, s.bbox, text) for s, text in zip(segments, texts, strict=True)]
    assert sorted(made) == sorted(expected)


def test_small_components_are_left_out_or_one_crowd(tmp_path: Path) -> None:
    labels = np.full((6, 8), 255, np.uint8)
    labels[0:2, 0:3] = 1
    labels[3, [0, 2, 4]] = 1
    labels[5, 6:8] = 2
    assert export(Coco(min_area=3), [sample(0, labels)], WITHOUT, tmp_path / "out") == Loss(
        pixels=5, segments=4
    )
    kept = dataset(tmp_path / "out")
    assert [(one["area"], one["iscrowd"]) for one in kept.dataset["annotations"]] == [(6, 0)]

    assert export(Coco(min_area=3, crowd=True), [sample(0, labels)], WITHOUT, tmp_path / "crowd") == Loss()
    crowd = dataset(tmp_path / "crowd")
    told = [(one["category_id"], one["area"], one["bbox"], one["iscrowd"]) for one in crowd.anns.values()]
    assert told == [(2, 6, [0, 0, 3, 2], 0), (2, 3, [0, 3, 5, 1], 1), (3, 2, [6, 5, 2, 1], 1)]
    assert np.array_equal(next(iter(read_coco(str(tmp_path / "crowd")).samples)).labels, labels)


def test_pycocotools_reads_and_scores_it(tmp_path: Path) -> None:
    """Holes are holes, ids begin at 1, and a dataset that is compared with itself is perfect."""
    random = np.random.default_rng(0)
    maps = [np.kron(random.integers(0, 3, (6, 5)), np.ones((16, 16))).astype(np.uint8) for _ in range(4)]
    maps[0][10:20, 10:20] = 255
    split = ["train", "val", "train", "train"]
    samples = [sample(n, one, split=split[n], image=b"x") for n, one in enumerate(maps)]
    export(Coco(), samples, WITH, tmp_path)
    truth = dataset(tmp_path)
    assert [truth.imgs[n]["file_name"] for n in (1, 3, 4)] == ["a/0.jpg", "a/2.jpg", "a/3.jpg"]
    assert (tmp_path / "images/val/a/1.jpg").read_bytes() == b"x"
    assert sorted(truth.cats) == [2, 3] and truth.cats[2]["name"] == "cat" and min(truth.anns) == 1
    for one in truth.anns.values():
        mask = truth.annToMask(one).astype(bool)
        assert mask.sum() == one["area"]
        assert (maps[one["image_id"] - 1][mask] == one["category_id"] - 1).all()
    assert list(dataset(tmp_path, "val").imgs) == [2]

    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes([copy.deepcopy(one) | {"score": 1.0} for one in truth.anns.values()])
        scores = COCOeval(truth, found, "segm")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    assert scores.stats[0] == pytest.approx(1.0)
    assert next(one.uri for one in read_coco(str(tmp_path)).samples).endswith("images/train/a/0.jpg")


def write(place: Path, annotations: list[dict[str, Any]], **image: Any) -> str:
    (place / "annotations").mkdir(parents=True)
    content = {
        "images": [{"id": 7, "file_name": "x.jpg", "height": 4, "width": 6} | image],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 18, "name": "dog"}],
        "annotations": annotations,
    }
    (place / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return str(place)


def test_of_segments_that_overlap_the_smaller_wins_and_crowds_lie_beneath(tmp_path: Path) -> None:
    def box(x0: int, y0: int, x1: int, y1: int) -> list[list[int]]:
        return [[x0, y0, x1, y0, x1, y1, x0, y1]]

    crowd = {"size": [4, 6], "counts": [0, 24]}
    one = {"image_id": 7, "category_id": 18}
    place = write(
        tmp_path,
        [
            one | {"category_id": 90, "segmentation": box(1, 1, 2, 2)},
            one | {"segmentation": box(0, 0, 3, 3)},
            one | {"category_id": 90, "segmentation": crowd, "iscrowd": 1},
            one | {"segmentation": [[1, 1]]},
        ],
    )
    read = read_coco(place, images=str(tmp_path / "photos"))
    assert read.ontology.names == ("dog", "toothbrush")
    (found,) = read.samples
    expected = np.ones((4, 6), np.uint8)
    expected[:3, :3] = 0
    expected[1, 1] = 1
    assert np.array_equal(found.labels, expected)
    assert (found.uri, found.split, found.name) == (str(tmp_path / "photos/x.jpg"), "val2017", "x")


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ({"segmentation": {"size": [4, 6], "counts": "PPPPPPPPPPPPPPP1"}}, "place 1: its segmentation"),
        ({"segmentation": {"size": [4, 6], "counts": [5]}}, "describes 5 pixels"),
        ({"segmentation": {"size": [40_000, 60_000], "counts": [0, 2_400_000_000]}}, "size"),
        ({"segmentation": [[1e300, 0, 1, 1, 2, 2]]}, "far outside"),
        ({"segmentation": 3}, "neither polygons nor RLE"),
        ({"segmentation": [[0, 0, 1, 1, 2, 2]], "category_id": 1}, "not list"),
        ({"segmentation": [[0, 0, 1, 1, 2, 2]], "image_id": "7x"}, "place 1"),
    ],
)
def test_hostile_annotations_are_refused(tmp_path: Path, annotation: dict[str, Any], words: str) -> None:
    place = write(tmp_path, [{"image_id": 7, "category_id": 18} | annotation])
    with pytest.raises(MaskMillError, match=words) as caught:
        [one.labels for one in read_coco(place).samples]
    assert caught.value.code == "dataset_invalid"


def test_one_file_of_any_name_is_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"image_id": 7, "category_id": 18, "segmentation": [[0, 0, 6, 0, 6, 4, 0, 4]]}
    place = Path(write(tmp_path, [one]))
    (place / "annotations/instances_val2017.json").rename(tmp_path / "_annotations.coco.json")
    given = tmp_path / "_annotations.coco.json"
    (found,) = read_coco(str(given)).samples
    assert found.uri == str(tmp_path / "x.jpg")  # beside the file, as Roboflow has them
    (found,) = read_coco(str(given), images=str(tmp_path / "photos")).samples
    assert found.uri == str(tmp_path / "photos/x.jpg") and (found.labels == 0).all()
    monkeypatch.chdir(tmp_path)
    assert read_coco(given.name).count == 1
    given.rename(tmp_path / "folder.json")
    (tmp_path / "data.json/annotations").mkdir(parents=True)
    (tmp_path / "folder.json").rename(tmp_path / "data.json/annotations/instances_a.json")
    assert read_coco(str(tmp_path / "data.json")).count == 1
    with pytest.raises(MaskMillError, match=r"none\.json") as caught:
        read_coco(str(tmp_path / "none.json"))
    assert caught.value.code == "dataset_missing"


def test_annotations_of_images_that_are_not_listed_are_left_out_and_told(tmp_path: Path) -> None:
    one = {"category_id": 18, "segmentation": [[0, 0, 6, 0, 6, 4, 0, 4]]}
    place = write(tmp_path, [one | {"image_id": 8}, one | {"image_id": 7}, one | {"image_id": 9}])
    read = read_coco(place)
    assert read.left_out() == []
    for _ in range(2):  # samples may be read again
        (found,) = read.samples
        assert (found.labels == 0).all()
        (told,) = read.left_out()
        assert "instances_val2017.json: 2 annotations left out" in told and "number 1, 3" in told


def test_images_that_lead_out_of_the_dataset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MaskMillError) as caught:
        [one.labels for one in read_coco(write(tmp_path / "a", [], file_name="../../etc/passwd")).samples]
    assert caught.value.code == "dataset_invalid"
    with pytest.raises(MaskMillError):
        read_coco(write(tmp_path / "b", [], height=10**6, width=10**6))
