from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from models.errors import MaskMillError
from pipeline.corpus.manifest import stable_id
from pipeline.datasets.base import MaskDataset
from pipeline.datasets.pairs import open_pairs
from pipeline.evaluation.images import set_digest
from pipeline.evaluation.tables import SIZE_DIFFERS, class_lookup, evaluate_table, plan, read_labels
from pipeline.files.storage import canonical_uri
from pipeline.ontology.ontology import Ontology
from pipeline.table.labels import LABEL_SCHEMA, failed_row, ok_row

NAMES = ("sky", "grass", "cat")
COUNT = 10


class Made:
    """Images, truth and a label table of three files, from random numbers."""

    def __init__(self, root: Path) -> None:
        rng = np.random.default_rng(0)
        self.root, self.table = root, root / "table"
        self.truth: dict[str, np.ndarray] = {}
        self.labels: dict[str, np.ndarray] = {}
        self.confidence: dict[str, np.ndarray] = {}
        self.rows = []
        for folder in ("images", "masks"):
            (root / folder).mkdir()
        for index in range(COUNT):
            name = f"p{index}"
            shape = (int(rng.integers(5, 30)), int(rng.integers(5, 30)))
            truth = rng.choice([0, 1, 2, 255], shape).astype(np.uint8)
            labels = np.where(rng.random(shape) < 0.6, truth, rng.integers(0, 3, shape)).astype(np.uint8)
            labels[labels == 255] = 0
            labels[rng.random(shape) < 0.1] = 255
            confidence = rng.integers(0, 256, shape).astype(np.uint8)
            Image.fromarray(rng.integers(0, 255, (*shape, 3)).astype(np.uint8)).save(self.image(name))
            Image.fromarray(truth).save(root / "masks" / f"{name}.png")
            self.truth[name], self.labels[name], self.confidence[name] = truth, labels, confidence
            uri = canonical_uri(str(self.image(name)))
            known = {"id": stable_id(uri), "uri": uri, "sha256": bytes(32)}
            size = {"height": shape[0], "width": shape[1]}
            self.rows.append(ok_row(**known, **size, labels=labels, confidence=confidence, ignore_index=255))
        self.write()

    def image(self, name: str) -> Path:
        return self.root / "images" / f"{name}.png"

    def write(self) -> None:
        folder = self.table / "labels"
        folder.mkdir(parents=True, exist_ok=True)
        for part in range(3):
            pq.write_table(
                pa.Table.from_pylist(self.rows[part::3], schema=LABEL_SCHEMA), folder / f"{part}.parquet"
            )

    def dataset(self) -> MaskDataset:
        return open_pairs(
            str(self.root), ontology=Ontology.from_dict({"name": "three", "classes": list(NAMES)})
        )

    def evaluate(self, **options: object):
        return evaluate_table(
            str(self.table), self.dataset(), **{"class_names": NAMES, "ignore_index": 255, **options}
        )


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def expected(made: Made, names: list[str]) -> np.ndarray:
    truth = np.concatenate([made.truth[name].ravel() for name in names])
    labels = np.concatenate([made.labels[name].ravel() for name in names])
    known = truth != 255
    counts = confusion_matrix(truth[known], np.minimum(labels[known], 3), labels=[0, 1, 2, 3])
    return counts[:3]


def test_the_sum_over_all_files_is_what_scikit_learn_counts(made: Made) -> None:
    found = made.evaluate()
    assert (found.statistics.confusion == expected(made, list(made.truth))).all()
    assert [image.name for image in found.images] == sorted(made.truth)
    assert not found.missing and not found.failed
    one = made.evaluate(class_names=NAMES).images[0]
    counts = expected(made, ["p0"])
    union = counts.sum(1) + counts[:, :3].sum(0) - np.diag(counts)
    assert one.miou == pytest.approx(np.mean(np.diag(counts) / union))


def test_failed_missing_and_resized_images_are_counted_and_left_out(made: Made) -> None:
    first = made.rows[0]
    made.rows[0] = failed_row(
        **{key: first[key] for key in ("id", "uri", "sha256", "height", "width")},
        status="unreadable",
        error="truncated",
    )
    del made.rows[1]
    small = made.labels["p2"][:-1]
    kept = {key: made.rows[1][key] for key in ("id", "uri", "sha256", "width")}
    made.rows[1] = ok_row(
        **kept, height=len(small), labels=small, confidence=made.confidence["p2"][:-1], ignore_index=255
    )
    made.write()
    found = made.evaluate()
    assert found.missing == ["p1"]
    assert dict(found.failed) == {"unreadable": 1, SIZE_DIFFERS: 1}
    height, width = made.truth["p2"].shape
    sizes = f"labels {height - 1} x {width}, truth {height} x {width} pixels"
    assert list(map(str, found.left_out())) == [
        f"1 × image whose truth has another size (p2: {sizes})",
        "1 × image with status unreadable (p0: truncated)",
        "1 × image without a row in the table (p1)",
    ]
    assert (found.statistics.confusion == expected(made, [f"p{i}" for i in range(3, COUNT)])).all()


def test_images_too_large_to_be_compared_are_counted_and_left_out(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = {name: labels.size for name, labels in made.labels.items()}
    large = max(pixels, key=lambda name: pixels[name])
    most = sorted(pixels.values())[-2]
    height, width = made.labels[large].shape
    monkeypatch.setattr("pipeline.table.labels.MOST_DECODED", most)
    found = made.evaluate()
    assert dict(found.failed) == {"map_too_large": 1}
    (told,) = map(str, found.left_out())
    assert told.startswith(f"1 × image too large to be compared ({large}: {width} x {height} pixels")
    assert (found.statistics.confusion == expected(made, [name for name in pixels if name != large])).all()
    # The same where it is the truth that is too large to be read.
    monkeypatch.undo()
    monkeypatch.setattr("pipeline.formats.masks.MAX_PIXELS", most)
    with pytest.raises(MaskMillError, match="exceeds the limit"):
        made.evaluate()
    monkeypatch.setattr("pipeline.evaluation.tables.MAX_PIXELS", most)
    again = made.evaluate()
    assert dict(again.failed) == {"map_too_large": 1}
    assert (again.statistics.confusion == found.statistics.confusion).all()


def test_rows_of_other_images_are_counted(made: Made) -> None:
    for name in ("p3", "p4"):
        made.image(name).unlink()
        (made.root / "masks" / f"{name}.png").unlink()
    found = made.evaluate()
    (others,) = found.left_out()
    uris = sorted(canonical_uri(str(made.image(name))) for name in ("p3", "p4"))
    assert others.count == 2 and sorted(others.examples) == uris


def test_ignored_pixels_are_counted_by_id(made: Made) -> None:
    found = made.evaluate()
    truth = np.concatenate([mask.ravel() for mask in made.truth.values()])
    assert found.truth_ids == {id_: int((truth == id_).sum()) for id_ in (0, 1, 2, 255)}
    assert found.ignored_share == pytest.approx(np.mean(truth == 255))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda truth: np.full_like(truth, 255), r"all pixels of 10 images are ignored \(ids found: 255\)"),
        (lambda truth: truth[:-1], r"10 × image whose truth has another size \(p0: labels"),
    ],
)
def test_no_compared_pixel_is_an_error(made: Made, change, says: str) -> None:
    for name, truth in made.truth.items():
        Image.fromarray(change(truth)).save(made.root / "masks" / f"{name}.png")
    with pytest.raises(MaskMillError, match=says) as caught:
        made.evaluate()
    assert caught.value.code == "too_few_images" and caught.value.exit_status == 1


def test_unsure_pixels_become_background_where_a_protocol_says_so(made: Made) -> None:
    for name, labels in made.labels.items():
        labels[made.confidence[name] < 255 * 0.4] = 0
    found = made.evaluate(background_below=0.4)
    assert (found.statistics.confusion == expected(made, list(made.truth))).all()


def test_labels_in_another_order_are_matched_by_name(made: Made) -> None:
    found = made.evaluate(class_names=("cat", "dog", "sky", "grass"))
    # 0 sky → 2, 1 grass → 3 (never predicted), 2 cat → 0; the table's 1 is a dog: no class here.
    truth = np.concatenate([t.ravel() for t in made.truth.values()])
    labels = np.concatenate([t.ravel() for t in made.labels.values()])
    meant = np.select([labels == 0, labels == 2], [2, 0], 3)
    known = truth != 255
    counts = confusion_matrix(truth[known], meant[known], labels=[0, 1, 2, 3])[:3]
    assert (found.statistics.confusion == counts).all()


def test_images_are_found_by_name_if_the_table_was_made_elsewhere(made: Made) -> None:
    for row in made.rows:
        row["uri"] = f"s3://elsewhere/{Path(row['uri']).stem}.jpeg"
        row["id"] = stable_id(row["uri"])
    made.write()
    assert (made.evaluate().statistics.confusion == expected(made, list(made.truth))).all()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda row: row.update(uri="/other/place.png"), "image_invalid"),
        (lambda row: row.update(uri="/other/p3.png"), "image_invalid"),  # one name for all
    ],
)
def test_a_table_of_other_images_is_refused(made: Made, change, code: str) -> None:
    for row in made.rows:
        change(row)
    made.write()
    with pytest.raises(MaskMillError) as caught:
        made.evaluate()
    assert caught.value.code == code


def test_a_class_that_the_labels_cannot_have_is_an_error() -> None:
    with pytest.raises(MaskMillError, match="'cat'") as caught:
        class_lookup(("sky", "grass"), NAMES, ignore_index=255)
    assert caught.value.code == "classes_differ"


def test_no_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MaskMillError) as caught:
        plan(str(tmp_path), [])
    assert caught.value.code == "table_damaged"


def test_label_maps_of_single_images(made: Made) -> None:
    found = made.evaluate()
    samples = {sample.name: sample for sample in made.dataset().samples}
    maps = read_labels(str(made.table), found.images[2:4], samples)
    assert list(maps) == ["p2", "p3"] or set(maps) == {"p2", "p3"}
    assert (maps["p2"] == made.labels["p2"]).all()
    assert read_labels(str(made.table), [], samples) == {}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_mask_is_named_wherever_it_is_read(
    made: Made, workers: int, shared_ray: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", shared_ray)
    (made.root / "masks/p4.png").write_bytes(b"no picture")
    with pytest.raises(MaskMillError, match=r"p4\.png") as caught:
        made.evaluate(workers=workers)
    assert caught.value.code == "dataset_invalid"


@pytest.mark.slow
def test_eight_workers_give_what_one_process_gives_bit_for_bit(
    made: Made, shared_ray: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", shared_ray)
    alone, together = made.evaluate(), made.evaluate(workers=8)
    for part in ("images", "confusion", "boundary", "calibration"):
        assert np.array_equal(getattr(alone.statistics, part), getattr(together.statistics, part)), part
    assert alone.images == together.images


def test_counts_of_images_add_up_to_the_confusion_matrix(made: Made) -> None:
    found = made.evaluate()
    summed = np.zeros((3, len(NAMES)), np.int64)
    for image in found.images:
        truth, labels = made.truth[image.name], made.labels[image.name]
        known = truth != 255
        by_hand = [
            [id, (truth == id).sum(), (labels[known] == id).sum(), ((truth == id) & (labels == id)).sum()]
            for id in range(len(NAMES))
        ]
        assert image.counts.tolist() == [row for row in by_hand if row[1] or row[2]]
        np.add.at(summed, (slice(None), image.counts[:, 0]), image.counts[:, 1:].T)
    confusion = found.statistics.confusion
    assert np.array_equal(summed, [confusion.sum(1), confusion[:, :-1].sum(0), np.diag(confusion)])


def test_the_digest_of_an_evaluation_set_is_that_of_its_content(made: Made, tmp_path: Path) -> None:
    def content(world: Made) -> str:
        return set_digest(image.digest for image in world.evaluate(boundary=False).images)

    known = content(made)
    (tmp_path / "elsewhere").mkdir()
    other = Made(tmp_path / "elsewhere")
    other.rows.reverse()
    other.write()
    assert content(other) == known
    assert other.dataset().fingerprint() == made.dataset().fingerprint()
    other.truth["p3"][0, 0] = (other.truth["p3"][0, 0] + 1) % 3
    Image.fromarray(other.truth["p3"]).save(other.root / "masks/p3.png")
    assert content(other) != known
    assert other.dataset().fingerprint() == made.dataset().fingerprint()  # of names only
