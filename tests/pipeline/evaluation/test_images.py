from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import MaskMillError
from pipeline.evaluation.images import read_images, set_digest, write_images
from pipeline.evaluation.results import (
    EVALUATION_FILE,
    IMAGES_FILE,
    Compared,
    ComparedClass,
    EvaluationResult,
    MeasuredDataset,
    MeasuredModel,
    conditions_digest,
    evaluation_result,
    read_results,
    write_result,
)
from pipeline.evaluation.tables import Evaluation, ImageScore, image_digest
from pipeline.files.storage import open_storage
from pipeline.metrics.statistics import SegmentationStatistics
from pipeline.table.views import View

CLASSES = 4


def evaluated(count: int = 9, seed: int = 0) -> Evaluation:
    """Random images, counted pixel by pixel."""
    rng = np.random.default_rng(seed)
    total = Evaluation(SegmentationStatistics.zero(CLASSES))
    for index in range(count):
        truth = rng.choice([0, 1, 3, 255], (6, 7)).astype(np.uint8)
        labels = rng.choice([0, 1, 2, 255], (6, 7)).astype(np.uint8)
        known = truth != 255
        rows = [
            (id, (truth == id).sum(), (labels[known] == id).sum(), ((truth == id) & (labels == id)).sum())
            for id in range(CLASSES)
            if (truth == id).any() or (labels[known] == id).any()
        ]
        name = f"p{index}"
        total.images.append(
            ImageScore(name, "0.parquet", 0.5, np.array(rows, np.int64), image_digest(name, b"image", truth))
        )
        total.statistics = total.statistics + SegmentationStatistics.of(truth, labels, None, CLASSES)
    return total


def written(folder: Path, evaluation: Evaluation) -> EvaluationResult:
    result = evaluation_result(
        evaluation,
        title="t",
        protocol="custom",
        dataset=MeasuredDataset(
            name="pairs",
            images=len(evaluation.images),
            content=set_digest(image.digest for image in evaluation.images),
        ),
        model=MeasuredModel(),
        names=[f"c{id}" for id in range(CLASSES)],
        colors=np.zeros((CLASSES, 3), np.uint8),
        groups=[None] * CLASSES,
        published=[],
        worst=[],
        best=[],
        conditions="ab",
    )
    write_images(open_storage(folder), evaluation.images)
    write_result(folder, result)
    return result


def read(folder: Path):
    ((storage, result),) = read_results(folder)
    assert isinstance(result, EvaluationResult)
    return read_images(storage, result)


def test_the_counts_of_images_come_back_and_add_up_to_the_confusion_matrix(tmp_path: Path) -> None:
    evaluation = evaluated()
    written(tmp_path, evaluation)
    found = read(tmp_path)
    assert found is not None and found.names == tuple(f"p{index}" for index in range(9))
    confusion = evaluation.statistics.confusion
    assert np.array_equal(found.truth.sum(0), confusion.sum(1))
    assert np.array_equal(found.predicted.sum(0), confusion[:, :-1].sum(0))
    assert np.array_equal(found.correct.sum(0), np.diag(confusion))
    for at, image in enumerate(evaluation.images):
        dense = np.zeros((CLASSES, 3), np.int64)
        dense[image.counts[:, 0]] = image.counts[:, 1:]
        assert np.array_equal(found.truth[at], dense[:, 0])
        assert np.array_equal(found.predicted[at], dense[:, 1])
        assert np.array_equal(found.correct[at], dense[:, 2])


def test_thousands_of_images_are_written_in_groups(tmp_path: Path) -> None:
    one = evaluated(1)
    many = Evaluation(SegmentationStatistics.zero(CLASSES))
    for index in range(5000):
        image = one.images[0]
        many.images.append(ImageScore(f"{index:04}", image.part, None, image.counts, image.digest))
    counted = one.statistics
    many.statistics = dataclasses.replace(counted, images=5000, confusion=counted.confusion * 5000)
    written(tmp_path, many)
    assert pq.ParquetFile(tmp_path / IMAGES_FILE).num_row_groups == 2
    found = read(tmp_path)
    assert found is not None and len(found.names) == 5000 and (found.truth == found.truth[0]).all()


def test_results_of_older_versions_are_read_without_counts(tmp_path: Path) -> None:
    written(tmp_path, evaluated())
    record = json.loads((tmp_path / EVALUATION_FILE).read_text())
    for new in ("conditions", "labelling"):
        del record[new]
    for new in ("content", "has_truth"):
        del record["dataset"][new]
    (tmp_path / EVALUATION_FILE).write_text(json.dumps(record))
    # They left the list of what was to be labelled under the same name.
    pq.write_table(pa.table({"uri": ["/a.png"]}), tmp_path / IMAGES_FILE)
    assert read(tmp_path) is None
    (tmp_path / IMAGES_FILE).unlink()
    assert read(tmp_path) is None


def test_an_empty_class_and_an_image_without_truth(tmp_path: Path) -> None:
    evaluation = evaluated(3)
    nothing = ImageScore("void", "0.parquet", None, digest=bytes(32))
    evaluation.images.append(nothing)
    written(tmp_path, evaluation)
    found = read(tmp_path)
    assert found is not None and found.names[-1] == "void" and not found.truth[-1].any()


def change(column: str, value: Callable[[list], list]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        table = pq.read_table(file)
        position = table.column_names.index(column)
        changed = pa.array(value(table[column].to_pylist()), table.schema.field(column).type)
        pq.write_table(table.set_column(position, table.schema.field(column), changed), file)

    return apply


@pytest.mark.parametrize(
    ("injure", "why"),
    [
        (Path.unlink, "missing"),
        (lambda file: file.write_bytes(b""), "does not hold"),
        (lambda file: file.write_bytes(file.read_bytes()[:-40]), "does not hold"),
        (lambda file: pq.write_table(pa.table({"uri": ["/a.png"]}), file), "columns"),
        (lambda file: pq.write_table(pq.read_table(file).slice(1), file), "8 rows for 9 images"),
        (change("name", lambda names: ["p0", *names[:-1]]), "twice"),
        (change("class_id", lambda ids: [[9, *ids[0][1:]], *ids[1:]]), "names a class"),
        (change("class_id", lambda ids: [[-1, *ids[0][1:]], *ids[1:]]), "names a class"),
        (change("truth", lambda lists: [lists[0][:-1], *lists[1:]]), "differ in length"),
        (change("correct", lambda lists: [[-1, *lists[0][1:]], *lists[1:]]), "negative"),
        (change("truth", lambda lists: [[1 + lists[0][0], *lists[0][1:]], *lists[1:]]), "true pixels"),
        (
            change("predicted", lambda lists: [[1 + lists[0][0], *lists[0][1:]], *lists[1:]]),
            "predicted pixels",
        ),
        (change("correct", lambda lists: [[1 + lists[0][0], *lists[0][1:]], *lists[1:]]), "correct pixels"),
        (change("digest", lambda digests: [bytes(32), *digests[1:]]), "not those of the result"),
    ],
)
def test_what_does_not_belong_to_the_result_is_not_believed(
    tmp_path: Path, injure: Callable[[Path], object], why: str
) -> None:
    written(tmp_path, evaluated())
    injure(tmp_path / IMAGES_FILE)
    with pytest.raises(MaskMillError) as caught:
        read(tmp_path)
    assert caught.value.code == "file_damaged" and why in caught.value.message


@given(st.permutations(range(6)))
def test_the_digest_of_a_set_does_not_depend_on_its_order(order: list[int]) -> None:
    digests = [image.digest for image in evaluated(6).images]
    assert set_digest(digests[at] for at in order) == set_digest(digests)
    assert set_digest(digests[:-1]) != set_digest(digests)


def test_the_digest_of_an_image_depends_on_all_that_is_compared_and_on_nothing_else() -> None:
    truth = np.arange(6, dtype=np.uint8).reshape(2, 3)
    known = image_digest("a", b"image", truth)
    assert image_digest("a", b"image", truth.astype(np.uint16)) == known
    assert image_digest("a", b"image", np.asfortranarray(truth)) == known
    other = truth.copy()
    other[0, 0] = 1
    differing = [
        image_digest("b", b"image", truth),
        image_digest("a", b"Image", truth),
        image_digest("a", b"image", other),
        image_digest("a", b"image", truth.reshape(3, 2)),
        image_digest("a image", b"", truth),
    ]
    assert len({known, *differing}) == 1 + len(differing)


def test_conditions_are_those_that_change_figures() -> None:
    known = conditions_digest("custom", ["a", "b"], ignore_index=255)
    dog = ComparedClass(name="dog", labels=("puppy",), truth=("dog",))
    match = Compared(classes=(dog,), only_labels=("x",), only_truth=("y",), others="ignored")
    differing = [
        conditions_digest("seed", ["a", "b"], ignore_index=255),
        conditions_digest("custom", ["b", "a"], ignore_index=255),
        conditions_digest("custom", ["a", "b"], ignore_index=254),
        conditions_digest("custom", ["a", "b"], ignore_index=255, background_below=0.5),
        conditions_digest("custom", ["a", "b"], ignore_index=255, corruption="jpeg_compression:3"),
        conditions_digest("custom", ["a", "b"], ignore_index=255, view=View(threshold=0.5)),
        conditions_digest("custom", ["a", "b"], ignore_index=255, compared=match),
        conditions_digest(
            "custom", ["a", "b"], ignore_index=255, compared=match.model_copy(update={"others": "background"})
        ),
    ]
    assert len({known, *differing}) == 1 + len(differing)
    renamed = match.model_copy(
        update={"classes": (dog.model_copy(update={"labels": ("hound",)}),), "only_labels": ()}
    )
    assert conditions_digest("custom", ["a", "b"], ignore_index=255, compared=renamed) == differing[6]
