from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.errors import MaskMillError
from pipeline.corpus.manifest import build_manifest


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) if not isinstance(row, str) else row for row in rows))
    return path


def test_json_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metadata.jsonl",
        {"file_name": "a.jpg", "text": "a cat"},
        "",
        {"uri": "s3://bucket/b.jpg", "width": 4, "height": 3},
        {"url": "https://host/c.jpg", "offset": 1, "length": 2},
    )
    table = build_manifest(path)
    assert table["uri"].to_pylist() == [f"{tmp_path}/a.jpg", "s3://bucket/b.jpg", "https://host/c.jpg"]
    assert table["width"].to_pylist() == [None, 4, None] and table["offset"].to_pylist() == [None, None, 1]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["{"], ":1: not JSON"),
        (["[" * 100_000], ":1: not JSON"),
        ([{"uri": "a.jpg"}, [1]], ":2: not an object"),
        ([{"name": "a.jpg"}], r":1: no address under uri, .* \(keys: name\)"),
        ([{"uri": 5}], ":1: no address"),
        ([{"uri": "a.jpg", "width": "4"}], "width '4' is not a whole number"),
        ([{"uri": "a.jpg", "offset": True, "length": 1}], "offset True"),
        ([""], "lists no image"),
    ],
)
def test_bad_json_lines(tmp_path: Path, rows: list[object], words: str) -> None:
    with pytest.raises(MaskMillError, match=words) as caught:
        build_manifest(write(tmp_path / "l.jsonl", *rows))
    assert caught.value.code == "dataset_invalid"


COCO = {"images": [{"id": 1, "file_name": "1.jpg", "width": 4, "height": 3}, {"id": 2, "file_name": "2.jpg"}]}


@pytest.mark.parametrize(
    "folder", ["annotations", "annotations/images", "", "images", "val2017", "images/val2017"]
)
def test_coco_names_its_images(tmp_path: Path, folder: str) -> None:
    path = write(tmp_path / "annotations/instances_val2017.json", COCO)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / "1.jpg").touch()
    table = build_manifest(path)
    place = tmp_path / folder
    assert table["uri"].to_pylist() == [f"{place}/1.jpg", f"{place}/2.jpg"]
    assert table["width"].to_pylist() == [4, None]


def test_coco_without_pictures_has_their_addresses(tmp_path: Path) -> None:
    images = [{"file_name": "1.jpg", "coco_url": "http://images.cocodataset.org/val2017/1.jpg"}]
    path = write(tmp_path / "x.json", {"images": images})
    assert build_manifest(path)["uri"].to_pylist() == ["http://images.cocodataset.org/val2017/1.jpg"]
    with pytest.raises(MaskMillError, match=r"1\.jpg is in none of"):
        build_manifest(write(tmp_path / "y.json", COCO))
    whole = {"images": [{"file_name": "s3://bucket/1.jpg"}, {"file_name": "/data/2.jpg"}]}
    assert build_manifest(write(tmp_path / "z.json", whole))["uri"].to_pylist() == [
        "s3://bucket/1.jpg",
        "/data/2.jpg",
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not COCO's JSON"),
        ([], "not COCO's JSON"),
        ({"annotations": []}, "images: Field required"),
        ({"images": [{"id": 1}]}, r"images\.0\.file_name: Field required"),
        ({"images": []}, "lists no image"),
    ],
)
def test_bad_coco(tmp_path: Path, content: object, words: str) -> None:
    with pytest.raises(MaskMillError, match=words) as caught:
        build_manifest(write(tmp_path / "x.json", content))
    assert caught.value.code == "dataset_invalid"
