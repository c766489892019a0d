"""``images.parquet``: the counts of every image, beside ``evaluation.json``.

From them anyone can measure a part of the images, or how sure a difference between two models is
(``pipeline.metrics.paired``). A row holds only the classes that occur in the image, so that 171 classes of
100,000 images are some 20 MB. It is checked against the confusion matrix before it is believed.

N images, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import Damaged, MaskMillError
from pipeline.evaluation.results import IMAGES_FILE, EvaluationResult
from pipeline.evaluation.tables import ImageScore
from pipeline.files.faults import says_damage
from pipeline.files.storage import Storage

IMAGES_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("digest", pa.binary(32), nullable=False),
        pa.field("miou", pa.float64()),
        *(
            pa.field(name, pa.list_(pa.field("item", kind, nullable=False)), nullable=False)
            for name, kind in (
                ("class_id", pa.int32()),
                ("truth", pa.int64()),
                ("predicted", pa.int64()),
                ("correct", pa.int64()),
            )
        ),
    ]
)
_COUNTS = ("truth", "predicted", "correct")
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class ImageCounts:
    """The counts of an evaluation by image.

    Attributes:
        names: N, sorted.
        truth: pixels by class in the truth, int64 (N, C).
        predicted: pixels that were given to the class, where the truth is not ignored, int64 (N, C).
        correct: pixels where both agree, int64 (N, C).
        evaluation_set: see ``set_digest``.
    """

    names: tuple[str, ...]
    truth: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    correct: npt.NDArray[np.int64]
    evaluation_set: str


def set_digest(digests: Iterable[bytes]) -> str:
    """SHA-256 (hex) of a set of images with their truth, in any order; see ``image_digest``."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def write_images(storage: Storage, images: Sequence[ImageScore]) -> None:
    """Write ``images.parquet``, some thousand rows at a time."""
    with storage.new_file(IMAGES_FILE) as file:
        _write(file, images)


def _write(file: IO[bytes], images: Iterable[ImageScore]) -> None:
    rest = iter(images)
    with pq.ParquetWriter(file, IMAGES_SCHEMA, write_page_checksum=True) as writer:
        while some := list(islice(rest, _ROWS)):
            ends = np.cumsum([0, *(len(image.counts) for image in some)])
            flat = np.concatenate([np.empty((0, 4), np.int64), *(image.counts for image in some)])
            columns: dict[str, pa.Array] = {
                "name": pa.array([image.name for image in some], pa.string()),
                "digest": pa.array([image.digest for image in some], pa.binary(32)),
                "miou": pa.array([image.miou for image in some], pa.float64()),
            }
            for at, name in enumerate(("class_id", *_COUNTS)):
                kind = IMAGES_SCHEMA.field(name).type
                values = pa.array(flat[:, at]).cast(kind.value_type)
                columns[name] = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values, type=kind)
            writer.write_table(pa.table(columns, IMAGES_SCHEMA))


def read_images(storage: Storage, result: EvaluationResult) -> ImageCounts | None:
    """Read ``images.parquet``; None beside a result of an older version, which may have a list of that name.

    Args:
        storage: the folder of the result.
        result: its ``evaluation.json``, with which the counts must agree.

    Raises:
        MaskMillError: ``file_damaged`` if it cannot be read, is not what this module writes, or belongs to
            another result.
    """
    if result.dataset.content is None:
        return None
    try:
        with storage.open_file(IMAGES_FILE) as file:
            found = _read(file, storage, result)
    except FileNotFoundError:
        raise _damaged(storage, "the file is missing") from None
    except (OSError, pa.ArrowException) as error:
        if not says_damage(error):
            raise
        raise _damaged(storage, " ".join(str(error).split())) from error
    confusion = np.array(result.confusion, np.int64).reshape(len(result.classes), -1)
    for what, sums, expected in (
        ("true pixels", found.truth.sum(0), confusion.sum(1)),
        ("predicted pixels", found.predicted.sum(0), confusion[:, :-1].sum(0)),
        ("correct pixels", found.correct.sum(0), np.diag(confusion)),
    ):
        if not np.array_equal(sums, expected):
            raise _damaged(storage, f"its {what} are not those of the confusion matrix")
    if found.evaluation_set != result.dataset.content:
        raise _damaged(storage, "its images are not those of the result")
    return found


def _read(file: IO[bytes], storage: Storage, result: EvaluationResult) -> ImageCounts:
    classes = len(result.classes)
    with pq.ParquetFile(file, page_checksum_verification=True) as table:
        if not table.schema_arrow.equals(IMAGES_SCHEMA):
            raise _damaged(storage, "its columns are other ones")
        # Before memory is taken for as many rows as the file claims to have.
        if table.metadata.num_rows != result.images.evaluated:
            raise _damaged(
                storage, f"it has {table.metadata.num_rows:,} rows for {result.images.evaluated:,} images"
            )
        counts = np.zeros((3, table.metadata.num_rows, classes), np.int64)
        names: list[str] = []
        digests: list[bytes] = []
        for batch in table.iter_batches(_ROWS):
            _take(batch, counts, len(names), storage)
            names += batch.column("name").to_pylist()
            digests += batch.column("digest").to_pylist()
    if len(set(names)) < len(names):
        raise _damaged(storage, "an image is there twice")
    order = sorted(range(len(names)), key=names.__getitem__)
    truth, predicted, correct = counts[:, order]
    return ImageCounts(tuple(names[at] for at in order), truth, predicted, correct, set_digest(digests))


def _take(batch: pa.RecordBatch, counts: npt.NDArray[np.int64], start: int, storage: Storage) -> None:
    """Add the lists of some rows to the counts (3, N, C)."""
    lists = [batch.column(name) for name in ("class_id", *_COUNTS)]
    lengths = lists[0].value_lengths().to_numpy()
    ids, *values = (column.flatten().to_numpy() for column in lists)
    if any(not np.array_equal(column.value_lengths().to_numpy(), lengths) for column in lists[1:]):
        raise _damaged(storage, "its lists differ in length")
    if len(ids) and not 0 <= ids.min() <= ids.max() < counts.shape[2]:
        raise _damaged(storage, "it names a class that the result does not have")
    rows = start + np.repeat(np.arange(batch.num_rows), lengths)
    for at, value in enumerate(values):
        if len(value) and value.min() < 0:
            raise _damaged(storage, "a count is negative")
        np.add.at(counts[at], (rows, ids), value)


def _damaged(storage: Storage, why: str) -> MaskMillError:
    return Damaged(
        "file_damaged",
        f"{storage.uri_of(IMAGES_FILE)} does not hold the counts of this result: {why}.",
        "Run maskmill evaluate again.",
    )
