"""Compare a label table with true label maps, in this process or on Ray.

The unit of work is one file of the table, scored by ``score_part``. It returns integer counts, so the sum
does not depend on the number or order of the workers.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from models.errors import Damaged, FailedWork, MaskMillError, WrongUse
from pipeline.cluster.disks import Landmarks, files_of_table
from pipeline.cluster.mapping import on_ray
from pipeline.datasets.base import Dataset, LeftOut, Sample
from pipeline.files.images import MAX_PIXELS
from pipeline.files.storage import Storage, canonical_uri
from pipeline.metrics.statistics import SegmentationStatistics
from pipeline.table.corrections import Corrections, corrected_rows
from pipeline.table.labels import (
    MAP_TOO_LARGE,
    OK,
    is_large,
    iter_batches,
    large_map,
    refuse_doubled,
    table_files,
)
from pipeline.table.viewed import decode_maps
from pipeline.table.views import TableView

MOST_IDS = 12
"""How many ids of the truth a message names."""
SIZE_DIFFERS = "mask_invalid"
"""Status of an image whose label map and truth differ in size."""
_REASONS = {
    SIZE_DIFFERS: "image whose truth has another size",
    MAP_TOO_LARGE: "image too large to be compared",
}
_UNREAD = ("mask_invalid", "dataset_invalid", "too_large")
"""Codes of truth that is too large to be read."""


@dataclass(frozen=True)
class ImageScore:
    """Score of one image.

    Attributes:
        name: name of the sample.
        part: file of the label table with its labels.
        miou: mean IoU over the classes in its truth or prediction, in [0, 1]; None if all of its truth is
            ignored.
        counts: pixels by class, int64 (K, 4), of the classes that occur: id, true pixels, predicted ones
            whose truth is not ignored, and those where both agree. Sums over images are the margins and the
            diagonal of the confusion matrix.
        digest: SHA-256 of name, encoded image and truth; see ``image_digest``.
    """

    name: str
    part: str
    miou: float | None
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 4), np.int64), compare=False)
    digest: bytes = bytes(32)


@dataclass
class Evaluation:
    """Result of comparing a label table with the truth.

    Attributes:
        statistics: sums over all compared images.
        images: their scores, in the order of the dataset.
        missing: names of samples without a row.
        failed: number of rows without usable labels, by status.
        examples: the first such row, by status.
        others: rows whose image is not in the dataset.
        truth_ids: pixels by id in the truth of all compared images, ignored ones included.
    """

    statistics: SegmentationStatistics
    images: list[ImageScore] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    others: LeftOut | None = None
    truth_ids: Counter[int] = field(default_factory=Counter)

    def left_out(self) -> tuple[LeftOut, ...]:
        """What was not compared, by reason."""
        failed = [
            LeftOut(_REASONS.get(status, f"image with status {status}"), count, (self.examples[status],))
            for status, count in sorted(self.failed.items())
        ]
        missing = [LeftOut.of("image without a row in the table", self.missing)] if self.missing else []
        return (*failed, *missing, *([self.others] if self.others else []))

    @property
    def ignored_share(self) -> float:
        """Share of the truth's pixels that are ignored, in [0, 1]; 0 without any."""
        total = self.truth_ids.total()
        return 1 - int(self.statistics.confusion.sum()) / total if total else 0.0


@dataclass(frozen=True)
class Plan:
    """The rows to compare, matched to samples.

    Attributes:
        storage: folder with the table's files.
        samples: the sample by row id.
        parts: files with at least one such row.
        missing: names of samples without a row.
        others: rows whose image is not among the samples.
    """

    storage: Storage
    samples: dict[int, Sample]
    parts: list[str]
    missing: list[str]
    others: LeftOut | None


def image_digest(name: str, image: bytes, truth: npt.NDArray[Any]) -> bytes:
    """SHA-256 (32 bytes) of what one image is measured on, wherever it lies.

    Args:
        name: of the sample.
        image: SHA-256 of the encoded image, as its row in the table has it.
        truth: integer (H, W), the ids that are compared.
    """
    # Lengths first, so that no two different samples are the same bytes.
    head = f"{len(name.encode())} {len(image)} {truth.shape[0]} {truth.shape[1]} {name}".encode()
    return hashlib.sha256(head + image + truth.astype("<u2").tobytes()).digest()


def class_lookup(
    predicted: Sequence[str], true: Sequence[str], *, ignore_index: int
) -> npt.NDArray[np.uint16]:
    """Map the ids of a label table to those of the truth, by class name.

    Args:
        predicted: class names of the table, by id.
        true: class names of the dataset, by id.
        ignore_index: the table's id of uncertain pixels.

    Returns:
        uint16 (K,), with K above every id of the table. Ids without a counterpart, including
        ``ignore_index``, map to 65535 (no class).

    Raises:
        MaskMillError: ``classes_differ`` if the table lacks a true class.
    """
    lacking = [name for name in true if name not in predicted]
    if lacking:
        raise WrongUse(
            "classes_differ",
            f"The labels have no class {', '.join(map(repr, lacking[:8]))}"
            f"{f' and {len(lacking) - 8} more' if len(lacking) > 8 else ''}; they have "
            f"{', '.join(predicted[:8])}{', …' if len(predicted) > 8 else ''}.",
            "Measure the classes that both have: --common; or say which class is which: --mapping FILE.",
        )
    lookup = np.full(max(len(predicted), ignore_index + 1), 65535, np.uint16)
    position = {name: index for index, name in enumerate(true)}
    for index, name in enumerate(predicted):
        lookup[index] = position.get(name, 65535)
    return lookup


def plan(table: Storage | str, samples: Sequence[Sample]) -> Plan:
    """Match rows to samples by URI, or by file stem if no URI matches.

    Raises:
        MaskMillError: ``table_damaged``; ``image_invalid`` if nothing matches or a stem is ambiguous.
    """
    storage, parts = table_files(table)
    if not parts:
        raise Damaged(
            "table_damaged",
            f"There is no label table in {storage.uri}.",
            "Give the --output of maskmill label.",
        )
    rows: list[tuple[str, int, str]] = []
    for part in parts:
        for batch in iter_batches(storage, ["id", "uri"], batch_size=65_536, names=[part]):
            rows += [(row["uri"], row["id"], part) for row in batch.to_pylist()]
    refuse_doubled(np.array([row_id for _, row_id, _ in rows], np.int64), storage)
    by_uri = {canonical_uri(sample.image): sample for sample in samples if sample.image}
    matched = [(row_id, part, by_uri[uri]) for uri, row_id, part in rows if uri in by_uri]
    if not matched:
        matched = _by_stem(rows, samples)
    if not matched:
        raise WrongUse(
            "image_invalid",
            f"None of the {len(rows):,} images of {storage.uri} is among the {len(samples):,} of the "
            f"benchmark: {PurePosixPath(rows[0][0]).name if rows else 'no rows'} here, "
            f"{samples[0].name if samples else 'no images'} there.",
            "Give the table that was made from the benchmark's images, or the right --split.",
        )
    taken = {sample.name for _, _, sample in matched}
    by_id = {row_id: sample for row_id, _, sample in matched}
    others = [uri for uri, row_id, _ in rows if row_id not in by_id]
    return Plan(
        storage,
        by_id,
        sorted({part for _, part, _ in matched}),
        [sample.name for sample in samples if sample.name not in taken],
        LeftOut.of("row of the table whose image is not in the dataset", others) if others else None,
    )


def _by_stem(
    rows: Iterable[tuple[str, int, str]], samples: Sequence[Sample]
) -> list[tuple[int, str, Sample]]:
    by_stem = {PurePosixPath(sample.name).name: sample for sample in samples}
    if len(by_stem) < len(samples):
        return []
    matched, seen = [], set()
    for uri, row_id, part in rows:
        stem = PurePosixPath(uri).stem
        if stem not in by_stem:
            continue
        if stem in seen:
            raise WrongUse(
                "image_invalid",
                f"Several rows of the table are called {stem}, and none has the benchmark's own path.",
                "Label the benchmark's folder itself, so that paths agree.",
            )
        seen.add(stem)
        matched.append((row_id, part, by_stem[stem]))
    return matched


def score_part(
    part: str,
    *,
    plan: Plan,
    dataset: Dataset,
    lookup: npt.NDArray[np.uint16],
    background_below: float,
    boundary: bool,
    view: TableView | None = None,
    corrections: Corrections | None = None,
) -> Evaluation:
    """Compare the rows of one file with the truth.

    Args:
        part: one of ``plan.parts``.
        plan: the matched rows.
        dataset: provides the truth.
        lookup: id of the truth by id of the labels, or of their view; 65535 is no class.
        background_below: pixels with a lower confidence, in [0, 1], count as class 0.
        boundary: also count for boundary IoU.
        view: see the labels through it.
        corrections: what people say of the labels, which counts instead of them.

    Raises:
        MaskMillError: from reading the truth.
    """
    num_classes = len(dataset.class_names)
    outcome = Evaluation(SegmentationStatistics.zero(num_classes))
    columns = ["id", "uri", "sha256", "status", "error", "height", "width", "mask", "confidence"]
    batches = iter_batches(plan.storage, columns, batch_size=16, names=[part])
    for row in (row for batch in batches for row in batch.to_pylist()):
        sample = plan.samples.get(row["id"])
        if sample is None:
            continue
        if corrections is not None:
            row = corrections.corrected(row)
        if row["status"] != OK:
            outcome.failed[row["status"]] += 1
            outcome.examples.setdefault(row["status"], f"{sample.name}: {row['error']}")
            continue
        truth = _truth(dataset, sample, row)
        if isinstance(truth, str):
            outcome.failed[MAP_TOO_LARGE] += 1
            outcome.examples.setdefault(MAP_TOO_LARGE, f"{sample.name}: {truth}")
            continue
        labels, confidence = _decoded(row, background_below, view)
        if labels.shape != truth.shape:
            outcome.failed[SIZE_DIFFERS] += 1
            sizes = f"{sample.name}: labels {_size(labels)}, truth {_size(truth)} pixels"
            outcome.examples.setdefault(SIZE_DIFFERS, sizes)
            continue
        pixels = np.bincount(truth.ravel())
        outcome.truth_ids.update({int(found): int(pixels[found]) for found in np.flatnonzero(pixels)})
        one = SegmentationStatistics.of(
            truth,
            lookup[labels],
            confidence,
            num_classes,
            dataset.ignore_index,
            boundary,
        )
        outcome.statistics = outcome.statistics + one
        outcome.images.append(
            ImageScore(
                sample.name,
                part,
                one.miou if math.isfinite(one.miou) else None,
                _class_counts(one.confusion),
                image_digest(sample.name, row["sha256"] or b"", truth),
            )
        )
    return outcome


def _truth(dataset: Dataset, sample: Sample, row: Mapping[str, Any]) -> npt.NDArray[Any] | str:
    """The truth of a row; or why there is none for an image so large that one of the maps is not decoded.

    Raises:
        MaskMillError: as ``Dataset.truth``.
    """
    if is_large(row["mask"]["bytes"]):
        return large_map(row["height"], row["width"])
    try:
        return dataset.truth(sample)
    except MaskMillError as error:
        if error.code in _UNREAD and row["height"] * row["width"] > MAX_PIXELS:
            return error.message
        raise


def _class_counts(confusion: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """See ``ImageScore.counts``."""
    truth, predicted = confusion.sum(1), confusion[:, :-1].sum(0)
    present = np.flatnonzero(truth + predicted)
    return np.stack(
        [present, truth[present], predicted[present], np.diag(confusion)[present]], axis=1, dtype=np.int64
    )


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]} x {array.shape[1]}"


def _decoded(
    row: dict[str, Any], background_below: float, view: TableView | None
) -> tuple[np.ndarray, np.ndarray]:
    labels, confidence = decode_maps(row["mask"]["bytes"], row["confidence"]["bytes"], view)
    if background_below:
        labels[confidence < 255 * background_below] = 0
    return labels, confidence


def read_labels(
    table: Storage | str,
    images: Sequence[ImageScore],
    samples: Mapping[str, Sample],
    *,
    background_below: float = 0.0,
    view: TableView | None = None,
    corrections: Corrections | None = None,
) -> dict[str, np.ndarray]:
    """Read label maps by image name, in the ids of the table, or of its view.

    Args:
        table: the label table.
        images: the images to read, from its ``Evaluation``.
        samples: the dataset's samples by name.
        background_below: pixels with a lower confidence, in [0, 1], become class 0.
        view: see the labels through it.
        corrections: what people say of the labels.
    """
    work = plan(table, [samples[image.name] for image in images]) if images else None
    found: dict[str, np.ndarray] = {}
    if work is None:
        return found
    for part in work.parts:
        rows = pq.read_table(
            work.storage.path(part),
            columns=["id", "uri", "status", "mask", "confidence"],
            filters=[("id", "in", list(work.samples))],
            filesystem=work.storage.arrow_filesystem(),
        )
        for row in corrected_rows(rows.to_pylist(), corrections):
            found[work.samples[row["id"]].name] = _decoded(row, background_below, view)[0]
    return found


def _landmarks(work: Plan, dataset: Dataset) -> Landmarks:
    """Of the table and of the truth."""
    truth = [place for sample in dataset.samples for place in (sample.truth, sample.image) if place]
    return Landmarks.of(files_of_table(work.storage, work.parts, images=False)).and_of(truth)


def evaluate_table(
    table: Storage | str,
    dataset: Dataset,
    *,
    class_names: Sequence[str],
    ignore_index: int,
    background_below: float = 0.0,
    boundary: bool = True,
    view: TableView | None = None,
    corrections: Corrections | None = None,
    lookup: npt.NDArray[np.uint16] | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    notice: Callable[[str], None] = lambda _text: None,
) -> Evaluation:
    """Compare a label table with the truth.

    Args:
        table: the output of a labelling run.
        dataset: the truth.
        class_names: class names of the table, or of its view, by id.
        ignore_index: its id of uncertain pixels, which count as wrong.
        background_below: pixels with a lower confidence, in [0, 1], count as class 0.
        boundary: also count for boundary IoU.
        view: see the labels through it.
        corrections: what people say of the labels, which counts instead of them.
        lookup: id of the truth by id of the labels, or of their view, and 65535 for no class; None matches
            the classes by name.
        workers: parallel Ray tasks, on the running Ray or a temporary local one; 0 works in this process.
        progress: called with the number of images done and in total.
        notice: called with what the user should know about Ray.

    Raises:
        MaskMillError: those of ``plan`` and ``class_lookup``; ``too_few_images`` if no pixel could be.
    """
    work = plan(table, dataset.samples)
    if lookup is None:
        lookup = class_lookup(class_names, dataset.class_names, ignore_index=ignore_index)
    settings: dict[str, Any] = {
        "plan": work,
        "dataset": dataset.reader(),
        "background_below": background_below,
        "lookup": lookup,
        "boundary": boundary,
        "view": view,
        "corrections": corrections,
    }
    total = Evaluation(
        SegmentationStatistics.zero(len(dataset.class_names)), missing=work.missing, others=work.others
    )
    score = functools.partial(score_part, **settings)
    scored: Iterable[Evaluation] = (
        on_ray(score, work.parts, workers, notice=notice, landmarks=_landmarks(work, dataset))
        if workers
        else map(score, work.parts)
    )
    for found in scored:
        total.statistics = total.statistics + found.statistics
        total.images += found.images
        total.failed += found.failed
        total.examples = found.examples | total.examples
        total.truth_ids += found.truth_ids
        progress(len(total.images) + total.failed.total(), len(work.samples))
    order = {sample.name: position for position, sample in enumerate(dataset.samples)}
    total.images.sort(key=lambda image: order[image.name])
    if not total.statistics.confusion.any():
        reasons = [str(entry) for entry in total.left_out()]
        if total.images:
            ids = ", ".join(map(str, sorted(total.truth_ids)[:MOST_IDS]))
            reasons.insert(0, f"all pixels of {len(total.images):,} images are ignored (ids found: {ids})")
        raise FailedWork(
            "too_few_images",
            f"Nothing could be compared: {'; '.join(reasons)}.",
            "Give labels and truth of the same images at the same size; "
            f"{dataset.ignore_index} in the truth means ignored.",
        )
    return total
