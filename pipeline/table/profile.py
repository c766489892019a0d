"""What a label table holds, as figures: classes, which of them stand together, quality, failures.

One pass over the columns, some thousand rows at a time; no mask is read, unless a view changes the labels.
Memory grows with the classes and, by eight bytes an image, with the rows, whose ids must differ.

N rows of a batch, S segments of them, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.files.storage import Storage
from pipeline.table.labels import OK, Counts, refuse_doubled
from pipeline.table.record import TableRecord
from pipeline.table.statistics import QualityScore
from pipeline.table.viewed import iter_viewed
from pipeline.table.views import TableView

FINE = 1000
"""Bins that are counted, for quantiles."""
COARSE = 20
"""Bins that are told."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_PAIRED = 512
"""Classes up to which it is counted which stand together: a table of 512 x 512 numbers."""
_ROWS = 4096

Counted = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass
class Spread:
    """How numbers in [0, 1] are spread.

    Attributes:
        bins: how many are in each of ``FINE`` bins of equal width.
        total: their sum.
    """

    bins: Counted = field(default_factory=lambda: np.zeros(FINE, np.int64))
    total: float = 0.0

    def add(self, values: npt.NDArray[np.floating]) -> None:
        """Count numbers (N,); NaN, which is none, is left out."""
        values = values[np.isfinite(values)].astype(np.float64)
        self.bins += np.bincount((values * FINE).astype(np.int64).clip(0, FINE - 1), minlength=FINE)
        self.total += float(values.sum())

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return int(self.bins.sum())

    @property
    def mean(self) -> float | None:
        """Of the numbers; None without any."""
        return self.total / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """The number below which a share of them is, within 1 / ``FINE``; None without any."""
        if not self.count:
            return None
        sums = np.cumsum(self.bins)
        at = int(np.searchsorted(sums, share * self.count))
        before = int(sums[at - 1]) if at else 0
        return float((at + (share * self.count - before) / self.bins[at]) / FINE)

    def share_from(self, value: float) -> float:
        """Share of the numbers that are ``value`` or more, within what is in one bin; 0 without any."""
        at = min(int(value * FINE), FINE - 1)
        return int(self.bins[at:].sum()) / self.count if self.count else 0.0

    def histogram(self) -> list[int]:
        """How many are in each of ``COARSE`` bins of equal width."""
        return [int(part.sum()) for part in np.split(self.bins, COARSE)]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        quantiles = {f"{share:g}": self.quantile(share) for share in QUANTILES}
        return {
            "count": self.count,
            "mean": self.mean,
            "quantiles": quantiles,
            "histogram": self.histogram(),
        }


@dataclass
class Profile:
    """What a label table holds; see the module.

    Attributes:
        names: of the classes, C.
        score: what ``quality`` is.
        counts: of rows, classes and failures.
        quality: of the labelled images.
        agreement: of a second reading with the labels, of the images that have one.
        confidence: sum of the confidence of each class's pixels (C,).
        segments: how the mean confidence of its segments is spread, (C, ``COARSE``).
        together: images with both classes (C, C), with one on the diagonal; None of too many classes.
    """

    names: tuple[str, ...]
    score: QualityScore = "classes"
    counts: Counts = field(default_factory=Counts)
    quality: Spread = field(default_factory=Spread)
    agreement: Spread = field(default_factory=Spread)
    confidence: Floats = field(init=False)
    segments: Counted = field(init=False)
    together: Counted | None = field(init=False)

    def __post_init__(self) -> None:
        classes = len(self.names)
        self.confidence = np.zeros(classes)
        self.segments = np.zeros((classes, COARSE), np.int64)
        self.together = np.zeros((classes, classes), np.int64) if classes <= MOST_PAIRED else None

    def count(self, rows: pa.RecordBatch) -> None:
        """Add rows with ``Counts.COLUMNS``, and ``agreement`` if it is there."""
        self.counts.count(rows)
        labelled = rows.filter(pc.equal(rows["status"], OK))
        self.quality.add(labelled["quality"].to_numpy(zero_copy_only=False))
        if "agreement" in rows.schema.names:
            self.agreement.add(labelled["agreement"].to_numpy(zero_copy_only=False).astype(np.float64))
        segments = labelled["segments"]
        owner = np.repeat(np.arange(len(labelled)), segments.value_lengths().fill_null(0).to_numpy())
        flat = segments.flatten()
        ids, areas, sure = (
            flat.field(name).to_numpy(zero_copy_only=False)
            for name in ("class_id", "area", "mean_confidence")
        )
        known = ids < len(self.names)
        ids, areas, sure, owner = ids[known], areas[known], sure[known].astype(np.float64), owner[known]
        self.confidence += np.bincount(ids, areas * sure, len(self.names))
        bins = (sure * COARSE).astype(np.int64).clip(0, COARSE - 1)
        np.add.at(self.segments, (ids, bins), 1)
        if self.together is not None:
            present = np.zeros((len(labelled), len(self.names)), np.float32)
            present[owner, ids] = 1
            self.together += (present.T @ present).astype(np.int64)

    @property
    def class_pixels(self) -> Counted:
        """Pixels of each class, (C,)."""
        return _by_id(self.counts.to_dict()["class_pixels"], len(self.names))

    @property
    def class_images(self) -> Counted:
        """Images with each class, (C,)."""
        return _by_id(self.counts.to_dict()["class_images"], len(self.names))

    @property
    def shares(self) -> dict[str, float]:
        """Share of each class in the pixels that have one, by name; empty without any."""
        pixels = self.class_pixels
        total = int(pixels.sum())
        return dict(zip(self.names, (pixels / total).tolist(), strict=True)) if total else {}

    @property
    def mean_quality(self) -> float | None:
        """Of the labelled images; None without any."""
        return self.quality.mean

    @property
    def failed_share(self) -> float:
        """Share of the images without labels; 0 without images."""
        found = self.counts.to_dict()
        return found["failed"] / found["images"] if found["images"] else 0.0

    @property
    def ignored_share(self) -> float:
        """Share of the pixels that have no class; 0 without pixels."""
        found = self.counts.to_dict()
        return found["ignored_pixels"] / found["pixels"] if found["pixels"] else 0.0

    def pairs(self) -> list[tuple[int, int, int]]:
        """Two classes and the images with both, most images first; none of too many classes."""
        if self.together is None:
            return []
        first, second = np.nonzero(np.triu(self.together, 1))
        images = self.together[first, second]
        order = np.lexsort((second, first, -images))
        return [(int(first[at]), int(second[at]), int(images[at])) for at in order]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        found = self.counts.to_dict()
        pixels, images, labelled = self.class_pixels, self.class_images, found["labelled"]
        total = int(pixels.sum())
        classes = [
            {
                "id": number,
                "name": name,
                "pixels": int(pixels[number]),
                "pixel_share": pixels[number] / total if total else 0.0,
                "images": int(images[number]),
                "image_share": images[number] / labelled if labelled else 0.0,
                "mean_confidence": self.confidence[number] / pixels[number] if pixels[number] else None,
                "segment_confidence": self.segments[number].tolist(),
            }
            for number, name in enumerate(self.names)
        ]
        together = [
            {"classes": [self.names[one], self.names[two]], "images": images}
            for one, two, images in self.pairs()
        ]
        names = ("images", "labelled", "failed", "status", "errors", "pixels", "ignored_pixels")
        return {
            **{name: found[name] for name in names},
            "classes": classes,
            "together": together,
            "quality": {"score": self.score, **self.quality.to_dict()},
            "agreement": self.agreement.to_dict() if self.agreement.count else None,
        }


def _by_id(counts: dict[str, int], classes: int) -> Counted:
    return np.array([counts.get(str(number), 0) for number in range(classes)], np.int64)


def profile_table(
    table: Storage,
    record: TableRecord,
    view: TableView | None = None,
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Profile:
    """Look through a label table.

    Args:
        table: the output of a labelling run.
        record: of the table.
        view: see the labels through it; every mask is then decoded.
        progress: called with the rows that were read, and how many there are.

    Raises:
        MaskMillError: ``table_damaged``, also if an image has several rows.
    """
    ontology = record.ontology if view is None else view.ontology
    found = Profile(ontology.names, record.quality if view is None else "classes")
    # The second reading was compared with the labels as they are stored.
    columns = ["id", *Counts.COLUMNS, *(["agreement"] if view is None else [])]
    ids = [np.empty(0, np.int64)]
    for batch in iter_viewed(table, columns, view, batch_size=_ROWS):
        ids.append(batch["id"].to_numpy())
        found.count(batch)
        done = found.counts.images
        progress(done, max(done, record.counts.get("images", 0)))
    refuse_doubled(np.concatenate(ids), table)
    return found
