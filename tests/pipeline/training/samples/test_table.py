"""Samples from real label tables on toy scenes: what is known, guessed, hidden, and in what order."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from models.errors import MaskMillError
from pipeline.corpus.manifest import build_manifest, write_manifest
from pipeline.datasets.toy import open_toyworld
from pipeline.files.storage import Storage, open_storage
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology
from pipeline.table.labels import LABEL_SCHEMA, failed_row, ok_row
from pipeline.table.record import TableRecord, write_table_record
from pipeline.table.views import View
from pipeline.toyworld import scenes as toyworld
from pipeline.training.loop.protocols import GUESS, IGNORED
from pipeline.training.samples.augment import AugmentSettings
from pipeline.training.samples.index import repeat_factors
from pipeline.training.samples.table import TableSamples, open_table_samples

SIZE = 48
TOY = load_ontology("toyworld")
PLAIN = AugmentSettings(
    scale=(SIZE, SIZE), ratio_range=(1.0, 1.0), crop=(SIZE, SIZE), max_category_share=1.0, flip=0.0,
    photometric=False,
)  # fmt: skip
SEED = 3


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def teacher_of(index: int) -> tuple[np.ndarray, np.ndarray]:
    """The table's labels of a scene: its truth upside down, and a confidence ramp."""
    labels = toyworld.scene(SEED, index, SIZE).labels[::-1].copy()
    labels[:4] = 255
    confidence = np.broadcast_to(np.arange(SIZE, dtype=np.uint8) + 100, (SIZE, SIZE)).copy()
    return labels, confidence


def write_table(
    root: Storage, uris: Sequence[str], data: Sequence[bytes], *, part: int = 4, ontology: Ontology = TOY,
    ids: Sequence[int] | None = None, quality: Sequence[float] | None = None,
) -> None:  # fmt: skip
    """A label table of scenes 0 to n - 1, with a failed row at the end of each part."""
    rows: list[dict[str, Any]] = []
    for index, (uri, encoded) in enumerate(zip(uris, data, strict=True)):
        labels, confidence = teacher_of(index)
        row = ok_row(
            id=index if ids is None else ids[index], uri=uri, sha256=hashlib.sha256(encoded).digest(),
            height=SIZE, width=SIZE, labels=labels, confidence=confidence, ignore_index=255,
        )  # fmt: skip
        rows.append(row if quality is None else row | {"quality": quality[index]})
    filesystem = root.arrow_filesystem()
    filesystem.create_dir(root.path("labels"), recursive=True)
    for start in range(0, len(rows), part):
        failed = failed_row(id=10_000 + start, uri=f"/gone-{start}.png", status="not_found", error="no file")
        table = pa.Table.from_pylist([*rows[start : start + part], failed], schema=LABEL_SCHEMA)
        name = root.path(f"labels/part-{start:04d}-0.parquet")
        pq.write_table(table, name, filesystem=filesystem)
    recipe = {"name": "r", "max_pixels": 10_000}
    weights = {"model": "toyclip", "pretrained": "bundled", "fingerprint": "0"}
    write_table_record(root, TableRecord(ontology=ontology, recipe=recipe, weights=weights))


def make(folder: Path, count: int, **options: Any) -> str:
    """Write scenes as files, and their table."""
    (folder / "images").mkdir(parents=True)
    uris, data = [], []
    for index in range(count):
        path = folder / "images" / f"scene_{index:06d}.png"
        data.append(png(toyworld.scene(SEED, index, SIZE).image))
        path.write_bytes(data[-1])
        uris.append(str(path))
    write_table(open_storage(folder / "table"), uris, data, **options)
    return str(folder / "table")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(tmp_path_factory.mktemp("toy"), 10)


@pytest.fixture(scope="module")
def truth() -> Any:
    return open_toyworld(split=f"seed-{SEED}", count=10, size=SIZE)


def opened(table: str, **options: Any) -> TableSamples:
    return open_table_samples(table, **({"ontology": TOY, "augment": PLAIN} | options))


def sample(samples: TableSamples, index: int, seed: int = 0) -> dict[str, Any]:
    return samples.load(index, np.random.default_rng(seed))


def test_annotation_free(table: str) -> None:
    samples = opened(table)
    assert samples.num_images == 10 and samples.left_out == {"not labelled": 3}
    for index in range(10):
        found = sample(samples, index)
        labels, confidence = teacher_of(index)
        scene = toyworld.scene(SEED, index, SIZE)
        assert found["id"] == index and found["id"].dtype == np.int64
        assert np.array_equal(found["image"], scene.image.transpose(2, 0, 1))
        assert (found["labels"] == GUESS).all() and found["labels"].dtype == np.int32
        expected = np.where(labels == 255, IGNORED, labels.astype(np.int32))
        assert np.array_equal(found["teacher"], expected) and found["teacher"].dtype == np.int32
        assert np.array_equal(found["confidence"], confidence) and found["confidence"].dtype == np.uint8


def test_zero_shot_never_shows_an_unseen_truth(table: str, truth: Any) -> None:
    unseen = (0, 8, 13)
    samples = opened(table, truth=truth, unseen_ids=unseen)
    shown = set()
    for index in range(10):
        found = sample(samples, index)
        true = toyworld.scene(SEED, index, SIZE).labels.astype(np.int32)
        assert np.array_equal(found["labels"], np.where(np.isin(true, unseen), GUESS, true))
        shown |= set(np.unique(true))
        guessed, _ = teacher_of(index)
        expected = np.where(np.isin(guessed, unseen), guessed.astype(np.int32), IGNORED)
        assert np.array_equal(found["teacher"], expected)
    assert shown & set(unseen)  # the scenes contain unseen classes


def test_load_checks_its_result_independently(table: str, truth: Any) -> None:
    samples = opened(table, truth=truth, unseen_ids=(13,))
    # Classes that should be hidden, and that the lookup of the truth's ids lets through.
    samples = dataclasses.replace(samples, hidden=np.ones_like(samples.hidden))
    with pytest.raises(RuntimeError, match="hidden"):
        sample(samples, 0)


def test_supervised_and_void(table: str, truth: Any) -> None:
    true = toyworld.scene(SEED, 4, SIZE).labels
    known = sample(opened(table, truth=truth), 4)
    assert np.array_equal(known["labels"], true) and (known["teacher"] == IGNORED).all()
    # Truth of a class that the training lacks is void, and the rest of the truth is not used.
    present = np.unique(true).tolist()
    fewer = Ontology(name="fewer", classes=[n for i, n in enumerate(TOY.names) if i != present[0]])
    void = sample(opened(table, truth=truth, ontology=fewer, void_from_truth=True), 4)
    assert np.array_equal(void["labels"], np.where(true == present[0], IGNORED, GUESS))
    assert (void["teacher"] >= 0).any()


def test_classes_are_matched_by_name_and_synonym(table: str, truth: Any) -> None:
    other = Ontology(
        name="other",
        classes=[{"name": "pond", "synonyms": ["Water"]}, "zeppelin", {"name": "Grass"}, "brick", "sand"],
    )
    samples = opened(table, ontology=other)
    meant = {"water": 0, "grass": 2, "brick": 3, "sand": 4}
    total = Counter[int]()
    for index in range(10):
        labels, _ = teacher_of(index)
        names = [meant.get(TOY.names[value], IGNORED) if value != 255 else IGNORED for value in range(14)]
        lookup = np.full(256, IGNORED)
        lookup[:14] = names
        found = sample(samples, index)["teacher"]
        assert np.array_equal(found, lookup[labels])
        total.update(lookup[labels][lookup[labels] >= 0].tolist())
    expected = np.array([total[number] for number in range(5)]) / total.total()
    assert np.allclose(samples.class_frequencies(), expected)
    with pytest.raises(MaskMillError) as caught:
        opened(table, ontology=Ontology(name="x", classes=["car", "bus"]))
    assert caught.value.code == "classes_differ"
    with pytest.raises(MaskMillError) as caught:
        opened(table, truth=truth, ontology=other, unseen_ids=(1,))
    assert caught.value.code == "classes_differ"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"unseen_ids": (1,)}, "wrong_use"),
        ({"void_from_truth": True}, "wrong_use"),
        ({"truth": True, "unseen_ids": (1,), "void_from_truth": True}, "wrong_use"),
        ({"truth": True, "unseen_ids": (14,)}, "wrong_use"),
        ({"min_quality": 1.1}, "too_few_images"),
    ],
)
def test_wrong_options(table: str, truth: Any, options: dict[str, Any], code: str) -> None:
    if "truth" in options:
        options = options | {"truth": truth}
    with pytest.raises(MaskMillError) as caught:
        opened(table, **options)
    assert caught.value.code == code


def test_rows_without_truth_or_quality_are_left_out(tmp_path: Path) -> None:
    made = make(tmp_path, 6, quality=[0.9, 0.1, 0.8, 0.2, 0.7, 0.6])
    few = open_toyworld(split=f"seed-{SEED}", count=5, size=SIZE)
    samples = opened(made, truth=few, min_quality=0.5)
    assert [int(sample(samples, i)["id"]) for i in range(samples.num_images)] == [0, 2, 4]
    assert samples.left_out == {"not labelled": 2, "of quality below 0.5": 2, "without truth": 1}


def test_images_that_were_labelled_in_windows_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = open_storage(make(tmp_path, 6))
    for name in made.list("labels"):
        rows = pq.read_table(made.path(name)).to_pylist()
        for row in rows:
            if row["id"] == 2:  # nothing of it is read
                row |= {"height": 101, "width": 100, "mask": {"bytes": b"x", "path": None}}
        pq.write_table(pa.Table.from_pylist(rows, schema=LABEL_SCHEMA), made.path(name))
    samples = opened(made.uri)
    assert samples.left_out == {"of more than 10,000 pixels": 1, "not labelled": 2}
    assert [int(sample(samples, i)["id"]) for i in range(samples.num_images)] == [0, 1, 3, 4, 5]
    monkeypatch.setattr("pipeline.training.samples.table.MOST_DECODED", SIZE * SIZE - 1)
    with pytest.raises(MaskMillError, match=f"6 of more than {SIZE * SIZE - 1:,} pixels") as caught:
        opened(made.uri)
    assert caught.value.code == "too_few_images"


def test_blank_has_the_layout_of_a_sample_and_no_weight(table: str) -> None:
    config = AugmentSettings(scale=(96, 96), crop=(40, 56))
    samples = opened(table, augment=config)
    blank, real = samples.blank(), sample(samples, 0)
    assert blank.keys() == real.keys()
    assert all((blank[k].shape, blank[k].dtype) == (v.shape, v.dtype) for k, v in real.items())
    assert (blank["labels"] == IGNORED).all() and (blank["teacher"] == IGNORED).all()


def test_the_same_generator_gives_the_same_bytes_in_any_process(table: str) -> None:
    samples = opened(table, augment=AugmentSettings(scale=(96, 48), crop=(32, 40)))
    small = len(pickle.dumps(samples))
    sample(samples, 0)  # fills its cache, which is not pickled
    assert len(pickle.dumps(samples)) == small < 10_000
    copy = pickle.loads(pickle.dumps(samples))
    for index in range(10):
        one, two = sample(samples, index, 5), sample(copy, index, 5)
        assert all(one[name].tobytes() == two[name].tobytes() for name in one)
    assert not np.array_equal(sample(samples, 0, 5)["image"], sample(samples, 0, 6)["image"])


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda path: path.unlink(), "not_found"),
        (lambda path: path.write_bytes(png(np.zeros((SIZE, SIZE, 3), np.uint8))), "image_invalid"),
        (lambda path: path.write_bytes(path.read_bytes()[:99]), "image_invalid"),
    ],
)
def test_missing_or_changed_images(tmp_path: Path, damage: Any, code: str) -> None:
    made = make(tmp_path, 2)
    damage(tmp_path / "images" / "scene_000001.png")
    samples = opened(made)
    sample(samples, 0)
    with pytest.raises(MaskMillError) as caught:
        sample(samples, 1)
    assert caught.value.code == code and "scene_000001.png" in str(caught.value)


def test_truth_of_another_size(table: str) -> None:
    other = open_toyworld(split=f"seed-{SEED}", count=10, size=2 * SIZE)
    with pytest.raises(MaskMillError) as caught:
        sample(opened(table, truth=other, unseen_ids=(1,)), 0)
    assert caught.value.code == "mask_invalid"


def test_folders_without_a_table(tmp_path: Path) -> None:
    with pytest.raises(MaskMillError) as caught:
        opened(str(tmp_path))
    assert caught.value.code == "input_missing"
    made = make(tmp_path, 3)
    part = next((tmp_path / "table" / "labels").iterdir())
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(MaskMillError) as caught:
        opened(made)
    assert caught.value.code == "table_damaged" and part.name in str(caught.value)
    part.unlink()
    with pytest.raises(MaskMillError, match="no labels") as caught:
        opened(made)
    assert caught.value.code == "table_damaged"


def test_exif_orientation_is_applied_as_in_labelling(tmp_path: Path) -> None:
    scene = toyworld.scene(SEED, 0, SIZE).image[:, : SIZE // 2]
    image = Image.fromarray(np.rot90(scene, 1))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to display
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    root = open_storage(tmp_path / "table")
    write_table(root, [str(path)], [path.read_bytes()])
    labels = toyworld.scene(SEED, 0, SIZE).labels[:, : SIZE // 2]
    row = ok_row(
        id=1, uri=str(path), sha256=hashlib.sha256(path.read_bytes()).digest(), height=SIZE,
        width=SIZE // 2, labels=labels, confidence=np.zeros_like(labels), ignore_index=255,
    )  # fmt: skip
    pq.write_table(
        pa.Table.from_pylist([row], schema=LABEL_SCHEMA), tmp_path / "table/labels/part-0000-0.parquet"
    )
    found = sample(opened(str(tmp_path / "table")), 0)
    assert np.array_equal(found["image"][:, :, : SIZE // 2], scene.transpose(2, 0, 1))
    assert np.array_equal(found["teacher"][:, : SIZE // 2], labels)
    assert (found["labels"][:, SIZE // 2 :] == IGNORED).all()  # padding


def tarred(folder: Path, data: Sequence[bytes]) -> tuple[Path, Path]:
    """Write a tar with images, and a list of their byte ranges."""
    shard = folder / "shard.tar"
    with tarfile.open(shard, "w") as tar:
        for index, encoded in enumerate(data):
            entry = tarfile.TarInfo(f"{index}.png")
            entry.size = len(encoded)
            tar.addfile(entry, io.BytesIO(encoded))
    with tarfile.open(shard) as tar:
        spans = [(member.offset_data, member.size) for member in tar]
    listing = folder / "list.csv"
    lines = [f"{shard},{offset},{length}" for offset, length in spans]
    listing.write_text("\n".join(["uri,offset,length", *lines]))
    return shard, listing


def test_members_of_a_tar(tmp_path: Path) -> None:
    data = [png(toyworld.scene(SEED, index, SIZE).image) for index in range(5)]
    shard, listing = tarred(tmp_path, data)
    manifest = build_manifest(listing)
    root = open_storage(tmp_path / "table")
    write_table(root, [str(shard)] * 5, data, part=2, ids=manifest["id"].to_pylist())
    (tmp_path / "table" / "manifest").mkdir()
    # Two runs labelled it; their manifests are ordered differently from the table.
    write_manifest(manifest.take([4, 0]), tmp_path / "table/manifest/one.parquet")
    write_manifest(manifest.take([3, 1, 2]), tmp_path / "table/manifest/two.parquet")
    samples = opened(str(tmp_path / "table"))
    for index in range(5):
        expected = toyworld.scene(SEED, index, SIZE).image.transpose(2, 0, 1)
        assert np.array_equal(sample(samples, index)["image"], expected)


# --- order ---


def test_an_epoch_is_every_image_once_and_another_order_each_time(table: str) -> None:
    samples = opened(table)
    orders = [samples.order(epoch, seed).tolist() for seed in (0, 1) for epoch in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert samples.order(2, 0).tolist() == orders[2]


def test_windows_keep_parts_together_and_each_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = opened(make(tmp_path, 40, part=4))
    samples = dataclasses.replace(samples, window_bytes=3 * int(samples.part_bytes.max()))
    reads = []

    class Counted(pq.ParquetFile):
        def read(self, *args: Any, **options: Any) -> pa.Table:
            reads.append(1)
            return super().read(*args, **options)

    monkeypatch.setattr(pq, "ParquetFile", Counted)
    order = samples.order(0, 0)
    assert sorted(order.tolist()) == list(range(40))
    starts = []
    for at in range(0, 36, 12):  # at least three of the ten parts fit
        starts.append(set(samples.part[order[at : at + 12]].tolist()))
    assert any(len(parts) == 3 for parts in starts) and starts[0] != {0, 1, 2}
    within = samples.part[order[:12]]
    assert (np.diff(within) != 0).sum() > 3  # rows are shuffled across the window's parts
    for index in order.tolist():
        sample(samples, index)
    assert len(reads) == 10
    shuffled = np.random.default_rng(0).permutation(40).tolist()
    for index in shuffled:
        sample(samples, index)
    assert len(reads) > 10 + 15  # without windows


def brute_force_factors(present: list[set[int]], threshold: float) -> list[float]:
    share = Counter(c for classes in present for c in classes)
    return [
        max([1.0, *(np.sqrt(threshold / (share[c] / len(present))) for c in classes)]) for classes in present
    ]


@pytest.mark.parametrize("threshold", [0.05, 0.3, 1.0])
def test_repeat_factors(threshold: float) -> None:
    rng = np.random.default_rng(0)
    often = [0.5, 0.3, 0.1, 0.05, 0.03, 0.01, 0.01]
    present = [set(rng.choice(7, rng.integers(0, 4), replace=False, p=often).tolist()) for _ in range(200)]
    pairs = np.array([(i, c) for i, classes in enumerate(present) for c in classes])
    assert np.allclose(repeat_factors(pairs, 200, 7, threshold), brute_force_factors(present, threshold))


@pytest.mark.parametrize("zero_shot", [False, True])
def test_images_with_rare_classes_are_repeated(table: str, truth: Any, zero_shot: bool) -> None:
    unseen = (6, 7, 8, 9) if zero_shot else ()
    options: dict[str, Any] = {"truth": truth, "unseen_ids": unseen} if zero_shot else {}
    samples = opened(table, repeat_threshold=1.0, **options)
    present = []
    for index in range(10):
        labels, _ = teacher_of(index)
        guessed = {int(c) for c in np.unique(labels) if c != 255 and (not zero_shot or c in unseen)}
        true = set(np.unique(toyworld.scene(SEED, index, SIZE).labels).tolist()) - set(unseen)
        present.append(guessed | true if zero_shot else guessed)
    expected = np.array(brute_force_factors(present, 1.0))
    assert expected.max() > 1.5
    epochs = [samples.order(epoch, 0) for epoch in range(400)]
    counts = np.array([np.bincount(order, minlength=10) for order in epochs])
    assert (counts >= np.floor(expected)).all() and (counts <= np.ceil(expected)).all()
    assert np.abs(counts.mean(0) - expected).max() < 5 * 0.5 / np.sqrt(400)


# --- S3 ---


def test_s3(bucket: str) -> None:
    root = open_storage(f"{bucket}/run/table")
    images = open_storage(f"{bucket}/run/images")
    data = [png(toyworld.scene(SEED, index, SIZE).image) for index in range(3)]
    for index, encoded in enumerate(data):
        images.write_bytes(f"scene_{index:06d}.png", encoded)
    uris = [images.uri_of(f"scene_{index:06d}.png") for index in range(3)]
    write_table(root, uris, data, part=2)
    samples = pickle.loads(pickle.dumps(opened(root.uri)))
    for index in range(3):
        found = sample(samples, index)
        expected = toyworld.scene(SEED, index, SIZE).image.transpose(2, 0, 1)
        assert np.array_equal(found["image"], expected)
        labels, _ = teacher_of(index)
        assert np.array_equal(found["teacher"][4:], labels[4:])


# --- views ---


def test_a_view_changes_labels_counts_and_quality_alike(table: str) -> None:
    asked = View(threshold=0.5, merge={"animal": ("zebra", "fish")}, drop=("sky",))
    view = asked.of(TOY)
    samples = opened(table, ontology=view.ontology, view=view, min_quality=0.515)
    pixels = np.zeros(view.ontology.num_classes, np.int64)
    for index in range(10):
        labels, confidence = teacher_of(index)
        expected, _ = view.apply(labels, confidence)
        assert (expected == 255)[confidence < 128].all() and (labels[expected == 255] != 255).any()
        found = sample(samples, index)
        assert np.array_equal(found["teacher"], np.where(expected == 255, IGNORED, expected.astype(np.int32)))
        pixels += np.bincount(expected.ravel(), minlength=256)[: len(pixels)]
    assert samples.class_frequencies() == pytest.approx(pixels / pixels.sum())
    # The rows themselves have a quality below 0.515: their doubtful pixels are gone from the view.
    with pytest.raises(MaskMillError, match=r"quality below 0\.515"):
        opened(table, min_quality=0.515)
