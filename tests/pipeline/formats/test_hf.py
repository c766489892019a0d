"""The export for Hugging Face, opened with the package ``datasets``."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.formats.base import Sample
from pipeline.formats.hf import HuggingFace, read_hf, split_name
from pipeline.ontology.ontology import Ontology
from pipeline.table.labels import encode_mask
from tests.pipeline.formats.drawn import check_same, contents, datasets, export, picture

ONTOLOGY = Ontology.from_dict({"name": "x: y", "classes": ["a|b", "猫", "dog's: #1"]})


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """The package, with nowhere to go but a cache of its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    package = pytest.importorskip("datasets")
    package.disable_progress_bars()
    cache = str(tmp_path_factory.mktemp("hub"))
    return lambda folder, **options: package.load_dataset(str(folder), cache_dir=cache, **options)


def sample(number: int, *, image: bytes | None, split: str = "train", uri: str = "") -> Sample:
    labels = np.full((4, 6), number % 3, np.uint8)
    labels[0, :2] = (255, 1)
    return Sample(
        number=number,
        id=2**62 + number,
        name=f"a.b/猫 {number}",
        uri=uri or f"/nowhere/{number}.png",
        suffix=".png",
        split=split,
        labels=labels,
        image=image,
    )


def test_load_dataset_opens_the_folder(tmp_path, hub):
    samples = [
        sample(number, image=picture(4, 6), split=["train", "val 2"][number % 3 == 2]) for number in range(5)
    ]
    export(HuggingFace(), ONTOLOGY, samples, open_storage(tmp_path))
    loaded = hub(tmp_path)
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 4, "val_2": 1}
    rows = loaded["train"]
    assert rows.features["classes"].feature.names == ["a|b", "猫", "dog's: #1"]
    assert [type(rows.features[name]).__name__ for name in ("image", "mask")] == ["Image", "Image"]
    for row, one in zip(rows, [one for one in samples if one.split == "train"], strict=True):
        assert row["image"].size == (6, 4) and row["image"].mode == "RGB"
        assert (np.asarray(row["mask"]) == one.labels).all()
        assert (row["id"], row["name"], row["uri"]) == (one.id, one.name, one.uri)
        assert row["classes"] == sorted({*one.labels.ravel().tolist()} - {255})


def test_without_copies_images_are_opened_where_they_are(tmp_path, hub):
    (tmp_path / "my photo.png").write_bytes(picture(4, 6))
    one = sample(0, image=None, uri=str(tmp_path / "my photo.png"))
    export(HuggingFace(), ONTOLOGY, [one], open_storage(tmp_path / "out"))
    (row,) = hub(tmp_path / "out", split="train")
    assert row["image"].size == (6, 4)


def test_more_classes_than_eight_bits_hold(tmp_path, hub):
    ontology = Ontology.from_dict({"name": "many", "classes": [f"c{number}" for number in range(300)]})
    labels = np.array([[299, 65_535], [0, 7]], np.uint16)
    one = dataclasses.replace(sample(0, image=None), labels=labels)
    export(HuggingFace(), ontology, [one], open_storage(tmp_path))
    (row,) = hub(tmp_path, split="train").remove_columns("image")
    assert (np.asarray(row["mask"]) == labels).all() and row["classes"] == [0, 7, 299]


@given(datasets(images=True))
@settings(max_examples=10)
def test_labels_come_back(tmp_path_factory, drawn):
    ontology, samples = drawn
    output = open_storage(tmp_path_factory.mktemp("out"))
    export(HuggingFace(), ontology, samples, output)
    before = contents(output)
    export(HuggingFace(), ontology, samples, output)
    assert contents(output) == before
    if samples:
        imported = read_hf(output.uri)
        check_same(
            imported,
            ontology,
            [dataclasses.replace(one, split=split_name(one.split)) for one in samples],
        )
        assert {one.image for one in imported.samples} == {one.image for one in samples}
    shutil.rmtree(output.root)


def test_groups_of_rows_are_small(tmp_path):
    samples = [sample(number, image=None) for number in range(250)]
    list(HuggingFace().write_part("0", samples, ONTOLOGY, open_storage(tmp_path)))
    file = pq.ParquetFile(tmp_path / "data/train-0.parquet").metadata
    assert [file.row_group(group).num_rows for group in range(file.num_row_groups)] == [100, 100, 50]


def _foreign(folder: Path, mask: object, **columns: object) -> None:
    """A dataset as others publish it."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"label": [mask], **{name: [value] for name, value in columns.items()}})
    pq.write_table(table, folder / "validation-00000-of-00001.parquet")


MASK = encode_mask(np.array([[0, 1, 255], [0, 0, 1]], np.uint8))


def test_datasets_of_others_are_read(tmp_path):
    _foreign(tmp_path / "data", {"bytes": MASK, "path": None}, pixel_values={"bytes": b"x", "path": "7.jpg"})
    (tmp_path / "id2label.json").write_text('{"1": "dog", "0": "cat"}')
    imported = read_hf(str(tmp_path))
    (one,) = imported.samples
    assert imported.ontology.names == ("cat", "dog") and one.labels.tolist() == [[0, 1, 255], [0, 0, 1]]
    assert (one.split, one.image, one.suffix) == ("validation", b"x", ".jpg")


LABELS = '{"0": "cat", "1": "dog"}'
HUGE = MASK[:16] + (60_000).to_bytes(4, "big") * 2 + MASK[24:]
HOSTILE = {
    "no names": ({}, MASK, "", "no id2label"),
    "gap": ({}, MASK, '{"0": "cat", "2": "dog"}', "all ids from 0"),
    "number": ({}, MASK, '{"0": 1}', "not a text"),
    "list": ({}, MASK, "[1]", "not of the form"),
    "huge": ({}, HUGE, LABELS, "exceeds the limit"),
    "half": ({}, MASK[:40], LABELS, "cannot be read"),
    "other id": ({}, encode_mask(np.full((2, 2), 9, np.uint8)), LABELS, "does not have: 9"),
    "no bytes": ({}, None, LABELS, "no mask"),
    "outside": ({"name": "../../x"}, MASK, LABELS, "not in the dataset"),
    "type": ({"name": 7}, MASK, LABELS, "no text"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_datasets_are_refused(tmp_path, case):
    columns, mask, names, why = HOSTILE[case]
    _foreign(tmp_path, {"bytes": mask, "path": "/etc/passwd"}, **columns)
    if names:
        (tmp_path / "id2label.json").write_text(names)
    with pytest.raises(MaskMillError, match=why) as error:
        [one.labels for one in read_hf(str(tmp_path)).samples]
    assert error.value.code in ("dataset_invalid", "mask_invalid", "dataset_missing")


@pytest.mark.parametrize(
    ("card", "why"),
    [
        ("configs: [{data_files: [{split: 3, path: x}]}]", "not splits and paths"),
        ("configs: 7", "not splits and paths"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: [", "not valid YAML"),
    ],
)
def test_wrong_cards_are_refused(tmp_path, card, why):
    export(HuggingFace(), ONTOLOGY, [sample(0, image=None)], open_storage(tmp_path))
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(MaskMillError, match=why) as error:
        read_hf(str(tmp_path))
    assert error.value.code == "dataset_invalid"


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    export(HuggingFace(), ONTOLOGY, [sample(0, image=None)], open_storage(tmp_path))
    file = tmp_path / "data/train-00000.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"name", b"n\x80me"))  # a column's name that is not UTF-8
    with pytest.raises(MaskMillError, match="no readable Parquet"):
        [one.labels for one in read_hf(str(tmp_path)).samples]
    file.write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(MaskMillError, match="no readable Parquet") as error:
        [one.labels for one in read_hf(str(tmp_path)).samples]
    assert error.value.code == "dataset_invalid"
