"""The index of a label table that is trained on: its rows without their pixels, and which of them are used.

Shapes: C classes of the training ontology, N rows that are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import Damaged
from pipeline.datasets import base
from pipeline.files.faults import says_damage
from pipeline.files.storage import Storage
from pipeline.ontology.ontology import Ontology
from pipeline.table.labels import LABEL_SCHEMA, OK
from pipeline.table.splits import Chosen
from pipeline.table.viewed import iter_viewed
from pipeline.table.views import TableView
from pipeline.training.loop.protocols import IGNORED

READERS = 16
"""Threads that read parts, or masks of truth, at a time."""

_MANIFESTS = "manifest"
_INDEX = ("id", "status", "height", "width", "segments", "quality")

Ids = npt.NDArray[np.int32]


@contextlib.contextmanager
def opened(storage: Storage, part: str) -> Iterator[pq.ParquetFile]:
    """Open a part.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    try:
        with (
            storage.arrow_filesystem().open_input_file(storage.path(part)) as source,
            pq.ParquetFile(source) as file,
        ):
            yield file
    except (pa.ArrowException, OSError) as error:
        if not says_damage(error):
            raise
        raise Damaged(
            "table_damaged",
            f"{storage.uri_of(part)} cannot be read: {' '.join(str(error).split())}",
            f"Run: maskmill verify {storage.uri.removesuffix('/labels')} --repair",
        ) from error


def read_index(storage: Storage, part: str, view: TableView | None) -> tuple[pa.Table, int]:
    """Read the index columns of a part, as the view has them, and the stored size of its maps in bytes."""
    with opened(storage, part) as file:
        lacking = {"id", "uri", "sha256", "status", "mask", "confidence", "segments", "quality"} - set(
            file.schema_arrow.names
        )
        if lacking:
            raise Damaged(
                "table_damaged",
                f"{storage.uri_of(part)} has no column {', '.join(sorted(lacking))}.",
                "Give the --output of maskmill label.",
            )
        size = sum(
            column.total_uncompressed_size
            for group in range(file.metadata.num_row_groups)
            for number in range(file.metadata.num_columns)
            if (column := file.metadata.row_group(group).column(number)).path_in_schema.endswith(".bytes")
        )
        if view is None:
            return file.read(list(_INDEX), use_threads=False), size
    seen = iter_viewed(storage, _INDEX, view, names=[part])
    return pa.Table.from_batches(seen, pa.schema([LABEL_SCHEMA.field(name) for name in _INDEX])), size


class Rows:
    """Builds the index of a table, part by part."""

    def __init__(
        self,
        num_classes: int,
        chosen: Chosen | None,
        leave_out: npt.NDArray[np.int64] | None,
        max_pixels: int,
    ) -> None:
        self._chosen, self._leave_out, self._max_pixels = chosen, leave_out, max_pixels
        self.ids: list[npt.NDArray[np.int64]] = []
        self.part: list[npt.NDArray[np.int64]] = []
        self.row: list[npt.NDArray[np.int64]] = []
        self.part_bytes: list[int] = []
        self.pixels = np.zeros(num_classes, np.int64)
        self.left_out: dict[str, int] = {}
        self.kept = 0
        self._image: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
        self._class: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]

    def add(
        self,
        number: int,
        found: tuple[pa.Table, int],
        lookup: Ids,
        min_quality: float,
        joined: dict[int, base.Sample] | None,
    ) -> None:
        """Add the usable rows of a part."""
        table, size = found
        self.part_bytes.append(size)
        ids = table["id"].to_numpy()
        keep = np.ones(len(ids), np.bool_)
        status = np.array(table["status"].to_pylist(), object)
        quality = table["quality"].to_numpy(zero_copy_only=False)
        height, width = (table[name].fill_null(0).to_numpy().astype(np.int64) for name in ("height", "width"))
        chosen = self._chosen
        elsewhere = np.zeros(len(ids), np.bool_) if chosen is None else ~chosen.keep(ids)
        for reason, bad in (
            (f"not in the part {chosen.part if chosen is not None else ''}", elsewhere),
            ("rejected by people", np.isin(ids, [] if self._leave_out is None else self._leave_out)),
            (f"of more than {self._max_pixels:,} pixels", height * width > self._max_pixels),
            ("not labelled", status != OK),
            (f"of quality below {min_quality:g}", np.nan_to_num(quality) < min_quality),
            ("without truth", np.array([joined is not None and row not in joined for row in ids.tolist()])),
        ):
            lost = int(np.count_nonzero(keep & bad.astype(np.bool_)))
            if lost:
                self.left_out[reason] = self.left_out.get(reason, 0) + lost
            keep &= ~bad.astype(np.bool_)
        rows = np.flatnonzero(keep)
        segments = table["segments"].combine_chunks().take(pa.array(rows))
        owner = np.repeat(np.arange(len(rows)), segments.value_lengths().fill_null(0).to_numpy())
        flat = segments.flatten()
        classes = lookup[flat.field("class_id").to_numpy(zero_copy_only=False).astype(np.int64)]
        areas = flat.field("area").to_numpy(zero_copy_only=False).astype(np.int64)
        known = classes >= 0
        np.add.at(self.pixels, classes[known], areas[known])
        self._image.append(owner[known] + self.kept)
        self._class.append(classes[known].astype(np.int64))
        self.ids.append(ids[rows])
        self.part.append(np.full(len(rows), number))
        self.row.append(rows)
        self.kept += len(rows)

    def present(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Image and class of every segment that the teacher found."""
        return np.concatenate(self._image), np.concatenate(self._class)


def repeat_factors(
    pairs: npt.NDArray[np.integer[Any]], num_images: int, num_classes: int, threshold: float
) -> npt.NDArray[np.float32]:
    """Repeat factors of Gupta et al. (2019), appendix B: maximum of 1 and sqrt(t / f) of the image's classes.

    Args:
        pairs: (n, 2): image and a class in it, each pair once.
        num_images: N.
        num_classes: C.
        threshold: t, the share of images below which a class is repeated.

    Returns:
        (N,), each >= 1.
    """
    share = np.bincount(pairs[:, 1], minlength=num_classes) / num_images
    factor = np.maximum(1.0, np.sqrt(threshold / np.where(share > 0, share, np.inf)))
    repeats = np.ones(num_images)
    np.maximum.at(repeats, pairs[:, 0], factor[pairs[:, 1]])
    return repeats.astype(np.float32)


def class_ids(
    names: Sequence[str], ontology: Ontology, ignore_index: int, words: Sequence[Sequence[str]] = ()
) -> Ids:
    """Lookup table from the ids of a file to those of ``ontology``, or ``IGNORED``.

    Args:
        names: class names by id in the file.
        ontology: target of the mapping.
        ignore_index: of the file.
        words: name and synonyms by id in the file.
    """
    own = {name.casefold(): number for number, name in enumerate(ontology.names)}
    synonyms = {
        word.casefold(): number for number, prompts in enumerate(ontology.prompts()) for word in prompts
    }
    # Cover every value of a mask; values that are not a class are ignored.
    lookup = np.full(max(256, len(names), ignore_index + 1), IGNORED, np.int32)
    for number, name in enumerate(names):
        found = own.get(name.casefold())
        if found is None and words:
            same = (synonyms.get(name.casefold()), *(own.get(word.casefold()) for word in words[number]))
            found = next((other for other in same if other is not None), None)
        lookup[number] = IGNORED if found is None else found
    return lookup


def true_classes(dataset: base.Dataset, samples: Sequence[base.Sample], true: Ids) -> npt.NDArray[np.int64]:
    """Image and class of everything in the truth, without hidden classes: (n, 2)."""

    def classes(sample: base.Sample) -> npt.NDArray[np.int64]:
        found = np.unique(true[np.flatnonzero(np.bincount(dataset.truth(sample).ravel()))])
        return found[found >= 0].astype(np.int64)

    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(classes, samples))
    image = np.repeat(np.arange(len(found)), [len(one) for one in found])
    return np.stack([image, np.concatenate([np.empty(0, np.int64), *found])], 1)


def byte_ranges(root: Storage, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
    """Offset and length (N, 2) of images within larger files, from the manifests next to the table."""
    wanted = ["id", "offset", "length"]
    ranges = None
    filesystem = root.arrow_filesystem()
    for name in root.list(_MANIFESTS):
        if not name.endswith(".parquet"):
            continue
        with filesystem.open_input_file(root.path(name)) as source, pq.ParquetFile(source) as file:
            if not set(wanted) <= set(file.schema_arrow.names):
                continue
            found = file.read(wanted)
        if ranges is None:
            ranges = np.full((len(ids), 2), -1, np.int64)
            order = np.argsort(ids)
        named = found["id"].to_numpy()
        at = np.searchsorted(ids, named, sorter=order)
        hit = np.flatnonzero(at < len(ids))
        hit = hit[ids[order[at[hit]]] == named[hit]]
        values = np.stack(
            [found[column].fill_null(-1).to_numpy(zero_copy_only=False) for column in wanted[1:]], 1
        )
        ranges[order[at[hit]]] = values[hit]
    return ranges
