"""Training samples from a label table: images, the teacher's labels, and truth where a method may know it.

An index of the table (no pixels) is built once and sent to every loader; images, masks and confidences are
read per sample. A table is a set of Parquet files, its *parts*, which can only be read column by column, so
an epoch is shuffled in windows: the parts are shuffled, then the rows of as many parts as a loader can cache
(``WINDOW_BYTES``). A loader thus reads a part once per epoch, not once per row.

Shapes: C classes of the training ontology, N images, S T sides of a crop.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from models.errors import Damaged, MaskMillError, WrongUse
from pipeline.datasets import base
from pipeline.evaluation import tables as evaluation
from pipeline.files import images
from pipeline.files.fetch import fetch, max_bytes
from pipeline.files.storage import Storage, open_storage
from pipeline.labelling.recipes import table_recipe
from pipeline.ontology.ontology import Ontology
from pipeline.table.labels import MOST_DECODED, refuse_doubled, table_files
from pipeline.table.record import read_table_record
from pipeline.table.splits import Chosen
from pipeline.table.statistics import Confidence, Labels
from pipeline.table.viewed import decode_maps
from pipeline.table.views import TableView
from pipeline.training.loop.protocols import GUESS, IGNORED, Sample
from pipeline.training.samples.augment import MEAN_COLOUR, AugmentSettings, augment
from pipeline.training.samples.index import (
    READERS,
    Ids,
    Rows,
    byte_ranges,
    class_ids,
    opened,
    read_index,
    repeat_factors,
    true_classes,
)

WINDOW_BYTES = 96 << 20
"""Stored size of the masks and confidences of one shuffling window. A loader caches twice as much."""

FILL: Mapping[str, int] = {"labels": IGNORED, "teacher": IGNORED, "confidence": 0}
"""What lies beside an image that is smaller than the crop."""


class Whole(NamedTuple):
    """A sample before augmentation: its id, the image uint8 (H, W, 3), and the maps (H, W) of its columns."""

    id: int
    image: npt.NDArray[np.uint8]
    maps: dict[str, npt.NDArray[Any]]


def columns(image: npt.NDArray[np.uint8], maps: Mapping[str, npt.NDArray[Any]], row_id: int) -> Sample:
    """The columns of a sample, from its crop."""
    return {
        "image": np.ascontiguousarray(image.transpose(2, 0, 1)),
        **maps,
        "id": np.array(row_id, np.int64),
    }


@dataclass(frozen=True, eq=False)
class TableSamples:
    """``pipeline.training.loop.protocols.Samples`` over a label table; see ``open_table_samples``.

    Columns of a sample: ``image`` uint8 (3, S, T) RGB; ``labels`` int32 (S, T): known class id, ``GUESS`` or
    ``IGNORED``; ``teacher`` int32 (S, T): the table's class if that is hidden, else ``IGNORED``;
    ``confidence`` uint8 (S, T): from the table; ``id`` int64 (): of the table's row.

    Attributes:
        augment: how to augment and crop.
        num_classes: C.
        hidden: bool (C,): classes whose truth must not be seen.
        left_out: number of rows that are not used, by reason.
        storage: of the table's parts.
        parts: names of the parts.
        part: int32 (N,), ascending: part of each sample.
        row: int32 (N,): row of each sample in its part.
        ids: int64 (N,): id of each sample's row.
        part_bytes: int64: size of the masks and confidences of each part, uncompressed.
        teacher: int32: maps the ids of the table, or of its view, to training ids, ``IGNORED`` if they are
            not hidden.
        view: through which the table's labels are seen; None leaves them as they are.
        second: samples of another teacher's table of these images, annotation-free: pixels on which the two
            differ have no teacher. An image that it lacks keeps its labels.
        window_bytes: bounds the parts whose rows are shuffled together.
    """

    augment: AugmentSettings
    num_classes: int
    hidden: npt.NDArray[np.bool_]
    left_out: dict[str, int]
    storage: Storage
    parts: tuple[str, ...]
    part_bytes: npt.NDArray[np.int64]
    part: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    ids: npt.NDArray[np.int64]
    _ranges: npt.NDArray[np.int64] | None  # (N, 2): offset and length within the URI, -1 for all of it
    _repeats: npt.NDArray[np.float32] | None  # (N,)
    pixels: npt.NDArray[np.int64]  # (C,): the teacher's
    teacher: Ids
    _true: Ids | None  # by id of the truth
    _dataset: base.Dataset | None
    _samples: tuple[base.Sample, ...]  # N where there is truth
    _max_pixels: int
    view: TableView | None = None
    second: TableSamples | None = None
    window_bytes: int = WINDOW_BYTES

    @property
    def num_images(self) -> int:
        """N, the number of distinct samples."""
        return len(self.part)

    def class_frequencies(self) -> npt.NDArray[np.float64]:
        """Share of each class in the teacher's labels: (C,), with sum 1, or 0 if there are none; whatever
        ``second`` says of them.
        """
        return np.asarray(self.pixels / max(int(self.pixels.sum()), 1), dtype=np.float64)

    def order(self, epoch: int, seed: int) -> npt.NDArray[np.int64]:
        """Indices of one epoch; see ``Samples.order``.

        With repeat-factor sampling, an image with factor r occurs floor(r) times per epoch, and once more
        with probability r - floor(r).
        """
        rng = np.random.default_rng((seed, epoch))
        if self._repeats is None:
            counts = np.ones(self.num_images, np.int64)
        else:
            counts = np.floor(self._repeats + rng.random(self.num_images)).astype(np.int64)
        starts = np.searchsorted(self.part, np.arange(len(self.parts) + 1))
        order: list[npt.NDArray[np.int64]] = []
        window: list[npt.NDArray[np.int64]] = []
        size = 0
        for part in rng.permutation(len(self.parts)).tolist():
            rows = np.arange(starts[part], starts[part + 1])
            if window and size + self.part_bytes[part] > self.window_bytes:
                order.append(rng.permutation(np.concatenate(window)))
                window, size = [], 0
            window.append(np.repeat(rows, counts[rows]))
            size += int(self.part_bytes[part])
        if window:
            order.append(rng.permutation(np.concatenate(window)))
        return np.concatenate([np.empty(0, np.int64), *order])

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """Read and augment one sample; see ``Samples.load``.

        Raises:
            MaskMillError: a code of ``pipeline.files.images.ERROR_CODES``; ``image_invalid`` if the image is
                not the one that was labelled; ``table_damaged``; ``mask_invalid``; errors of reading truth.
        """
        found = self.read(index)
        image, maps = augment(
            found.image,
            found.maps,
            fill=FILL,
            settings=self.augment,
            rng=rng,
            categories=("labels", "teacher"),
        )
        self._check(maps["labels"])
        return columns(image, maps, found.id)

    def read(self, index: int) -> Whole:
        """Read one sample whole, before augmentation; see ``load``."""
        row = self.read_row(index)
        image = self.read_image(index, row)
        size = image.shape[:2]
        mask, confidence = self.maps(row)
        teacher = self.teacher[mask]
        if self.second is not None:
            teacher = self.second.confirmed(row, teacher)
        maps: dict[str, npt.NDArray[Any]] = {"teacher": teacher, "confidence": confidence}
        if self._dataset is None or self._true is None:
            maps["labels"] = np.full(size, GUESS, np.int32)
        else:
            maps["labels"] = self._true[self._dataset.truth(self._samples[index])]
        different = [f"{name} {values.shape}" for name, values in maps.items() if values.shape != size]
        if different:
            raise WrongUse(
                "mask_invalid",
                f"{row['uri']} has {size[0]} x {size[1]} pixels, but {', '.join(different)}.",
                "Label the images anew, or give the truth that belongs to them.",
            )
        return Whole(row["id"], image, maps)

    def confirmed(self, row: dict[str, Any], labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Labels of a row of another table of the same images, ``IGNORED`` where this one has another class.

        Args:
            row: of the other table, from ``read_row``.
            labels: its classes (H, W), training ids.

        Raises:
            MaskMillError: ``mask_invalid`` if the tables differ in its size, ``image_invalid`` if they are of
                different images of that id; ``table_damaged``.
        """
        found = np.flatnonzero(self.ids == row["id"])
        if not len(found):
            return labels
        own = self.read_row(int(found[0]))
        if len({own["sha256"], row["sha256"]} - {None}) > 1:
            raise WrongUse(
                "image_invalid",
                f"{row['uri']} was another image when {self.storage.uri} was made.",
                "Label the images anew, with both teachers.",
            )
        others = self.teacher[self.maps(own)[0]]
        if others.shape != labels.shape:
            raise WrongUse(
                "mask_invalid",
                f"{row['uri']} has {others.shape[0]} x {others.shape[1]} pixels in {self.storage.uri}, and "
                f"{labels.shape[0]} x {labels.shape[1]} in the other table.",
                "Label the images anew, with both teachers.",
            )
        return np.where(others == labels, labels, IGNORED).astype(np.int32)

    def blank(self) -> Sample:
        """A sample whose pixels are all ignored; its ``id`` is -1."""
        size = self.augment.crop
        colour = np.array(MEAN_COLOUR, np.uint8)[:, None, None]
        return {
            "image": np.broadcast_to(colour, (3, *size)).copy(),
            "teacher": np.full(size, IGNORED, np.int32),
            "confidence": np.zeros(size, np.uint8),
            "labels": np.full(size, IGNORED, np.int32),
            "id": np.array(-1, np.int64),
        }

    def _check(self, labels: npt.NDArray[Any]) -> None:
        """Last guard: no truth of a hidden class leaves this module."""
        known = labels[labels >= 0]
        if self.hidden[known].any():
            raise RuntimeError(f"truth of hidden classes in a sample: {np.unique(known[self.hidden[known]])}")

    def read_image(self, index: int, row: dict[str, Any]) -> npt.NDArray[np.uint8]:
        """Read the image of a row, uint8 (H, W, 3) RGB.

        Raises:
            MaskMillError: ``image_invalid`` if its bytes have changed; errors of ``fetch`` and
                ``images.decode``.
        """
        start, length = (0, -1) if self._ranges is None else self._ranges[index].tolist()
        try:
            data = fetch(
                row["uri"],
                start=max(start, 0),
                length=None if length < 0 else length,
                max_bytes=max_bytes(self._max_pixels),
            )
            if row["sha256"] is not None and hashlib.sha256(data).digest() != row["sha256"]:
                raise WrongUse(
                    "image_invalid",
                    f"{row['uri']} is not the image that was labelled: its bytes have changed.",
                    "Put the old image back, or label the new ones into a new output.",
                )
            return images.decode(data, max_pixels=self._max_pixels)
        except images.ImageError as error:
            remedy = (
                "Give the right to read it, or label copies on a disk: tables do not hold signatures."
                if error.code == "permission"
                else "Put the image back where it was labelled."
            )
            raise WrongUse(error.code, f"{row['uri']}: {error.message}", remedy) from error

    def read_row(self, index: int) -> dict[str, Any]:
        """Read id, uri, sha256, mask and confidence of a sample.

        Raises:
            MaskMillError: ``table_damaged``.
        """
        table = self._cache(self.parts[self.part[index]])
        row = int(self.row[index])
        return {name: table[name][row].as_py() for name in table.column_names}

    def maps(self, row: dict[str, Any]) -> tuple[Labels, Confidence]:
        """Class ids and confidence (H, W) of a row from ``read_row``, as the view has them.

        Raises:
            MaskMillError: ``table_damaged``.
        """
        return decode_maps(row["mask"], row["confidence"], self.view)

    @cached_property
    def _cache(self) -> _PartCache:
        return _PartCache(self.storage, 2 * self.window_bytes)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _PartCache:
    """LRU cache of a table's parts, limited in bytes; always holds at least one part."""

    def __init__(self, storage: Storage, capacity: int) -> None:
        self._storage, self._capacity = storage, capacity
        self._tables: OrderedDict[str, pa.Table] = OrderedDict()

    def __call__(self, part: str) -> pa.Table:
        """Return the part's columns id, uri, sha256, mask and confidence, the last two as bytes.

        Raises:
            MaskMillError: ``table_damaged``.
        """
        if part not in self._tables:
            self._tables[part] = self._read(part)
            while len(self._tables) > 1 and self._bytes() > self._capacity:
                self._tables.popitem(last=False)
        self._tables.move_to_end(part)
        return self._tables[part]

    def _bytes(self) -> int:
        return sum(table.nbytes for table in self._tables.values())

    def _read(self, part: str) -> pa.Table:
        columns = ["id", "uri", "sha256", "mask.bytes", "confidence.bytes"]
        with opened(self._storage, part) as file:
            found = file.read(columns, use_threads=False)
        for name in ("mask", "confidence"):
            values = pa.chunked_array([chunk.field("bytes") for chunk in found[name].chunks], pa.binary())
            found = found.set_column(found.column_names.index(name), name, values)
        return found.combine_chunks()


def open_table_samples(
    table: str,
    *,
    ontology: Ontology,
    augment: AugmentSettings,
    truth: base.Dataset | None = None,
    unseen_ids: Sequence[int] = (),
    repeat_threshold: float = 0.0,
    min_quality: float = 0.0,
    void_from_truth: bool = False,
    view: TableView | None = None,
    second: TableSamples | None = None,
    chosen: Chosen | None = None,
    leave_out: npt.NDArray[np.int64] | None = None,
    manifests: str | None = None,
) -> TableSamples:
    """Index a label table for training.

    The arguments decide which pixels are known and which are to be guessed:

    - no truth: everything is to be guessed (annotation-free);
    - truth and ``void_from_truth``: the same, but pixels that the truth ignores are ignored, as in the
      reference;
    - truth and ``unseen_ids``: the unseen classes are to be guessed, the others are known (zero-shot,
      transductive);
    - truth alone: everything is known (supervised).

    Classes of table, truth and training are matched by name, those of the table also by synonym. Classes
    missing from the training ontology become ``IGNORED``; table and truth may lack classes.

    Args:
        table: output of a labelling run: a path or URI.
        ontology: training classes; samples use its ids.
        augment: how to augment and crop.
        truth: label maps of the table's images, matched by URI or file name as in ``maskmill evaluate``; rows
            without truth are left out.
        unseen_ids: classes whose truth is never used.
        repeat_threshold: t of repeat-factor sampling (Gupta et al., "LVIS", 2019): an image occurs
            max(1, sqrt(t / f)) times per epoch on average, where f is the share of images with the rarest of
            its classes, by the teacher's labels for hidden classes and by truth for known ones (which
            reads all truth once); 0 uses each image once.
        min_quality: minimum quality score of a row, in [0, 1].
        void_from_truth: see above.
        view: of the table. What the index says of an image is then computed from its masks, which are all
            read once.
        second: see ``TableSamples``.
        chosen: use only these images of it.
        leave_out: ids of images that people have rejected.
        manifests: the table beside which the manifests are, if not this one.

    Raises:
        MaskMillError: ``input_missing``; ``table_damaged``; ``classes_differ`` if table or truth share no
            class with the training; ``image_invalid`` from ``pipeline.evaluation.tables.plan``;
            ``wrong_use``; ``too_few_images`` if no row is left.
    """
    count = ontology.num_classes
    hidden = _hidden(count, truth is not None, unseen_ids, void_from_truth)
    record = read_table_record(table)
    root, known = open_storage(table), record.ontology if view is None else view.ontology
    storage, parts = table_files(root)
    if not parts:
        raise Damaged(
            "table_damaged", f"There are no labels in {root.uri}.", "Give the --output of maskmill label."
        )
    teacher = class_ids(known.names, ontology, known.ignore_index, words=known.prompts())
    if hidden.any() and not np.isin(teacher, np.flatnonzero(hidden)).any():
        raise _no_common_class(f"the labels in {root.uri}", known.names, ontology, hidden)
    pixels_of = teacher
    teacher = np.where((teacher >= 0) & hidden[np.maximum(teacher, 0)], teacher, IGNORED).astype(np.int32)

    work = None if truth is None else evaluation.plan(storage, truth.samples)
    # An image above it was labelled in windows, and is not decoded whole here either.
    max_pixels = table_recipe(record).images.max_pixels
    rows = Rows(count, chosen, leave_out, min(max_pixels, MOST_DECODED))
    with ThreadPoolExecutor(READERS) as pool:
        for number, found in enumerate(pool.map(lambda part: read_index(storage, part, view), parts)):
            rows.add(number, found, pixels_of, min_quality, None if work is None else work.samples)
    if not rows.kept:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in rows.left_out.items())
        raise WrongUse(
            "too_few_images",
            f"No row of {root.uri} can be trained on: {reasons or 'it has none'}.",
            "Label more images, lower min_quality, or give the truth of these images.",
        )
    ids = np.concatenate(rows.ids)
    refuse_doubled(ids, storage)
    samples = () if work is None else tuple(work.samples[row_id] for row_id in ids.tolist())
    true = None
    if truth is not None:
        true = class_ids(truth.class_names, ontology, truth.ignore_index)
        if (true < 0).all():
            raise _no_common_class(f"the truth of {truth.name}", truth.class_names, ontology)
        marked = set(true.tolist())
        unmarked = [
            name for number, name in enumerate(ontology.names) if hidden[number] and number not in marked
        ]
        if unseen_ids and unmarked:
            raise WrongUse(
                "classes_differ",
                f"The truth of {truth.name} has no class {', '.join(unmarked)}, so it does not say where to "
                "guess it: nothing would be learned about it.",
                "Mark these pixels in the masks with an id of their own, or train annotation-free.",
            )
        true = np.where((true >= 0) & hidden[np.maximum(true, 0)], GUESS, true).astype(np.int32)
    repeats = None
    if repeat_threshold > 0:
        image, present = rows.present()
        guessed = hidden[present]
        pairs = np.stack([image[guessed], present[guessed]], 1)
        if truth is not None and true is not None and not hidden.all():
            pairs = np.concatenate([pairs, true_classes(truth.reader(), samples, true)])
        repeats = repeat_factors(np.unique(pairs, axis=0), len(ids), count, repeat_threshold)
    return TableSamples(
        augment=augment,
        num_classes=count,
        hidden=hidden,
        left_out=rows.left_out,
        storage=storage,
        parts=tuple(parts),
        part_bytes=np.array(rows.part_bytes, np.int64),
        part=np.concatenate(rows.part).astype(np.int32),
        row=np.concatenate(rows.row).astype(np.int32),
        ids=ids,
        _ranges=byte_ranges(root if manifests is None else open_storage(manifests), ids),
        _repeats=repeats,
        pixels=rows.pixels,
        teacher=teacher,
        _true=true,
        _dataset=None if truth is None else truth.reader(),
        _samples=samples,
        _max_pixels=max_pixels,
        view=view,
        second=second,
    )


def _hidden(count: int, truth: bool, unseen: Sequence[int], void: bool) -> npt.NDArray[np.bool_]:
    """Which classes are hidden, bool (C,): the teacher guesses them, and their truth is never used."""
    if unseen and not 0 <= min(unseen) <= max(unseen) < count:
        raise WrongUse("wrong_use", f"{list(unseen)}: ids must be from 0 to {count - 1}.", "Correct the ids.")
    if (unseen or void) and not truth:
        raise WrongUse(
            "wrong_use",
            "Unseen classes and void pixels need truth.",
            "Give the truth as well.",
        )
    if unseen and void:
        raise WrongUse(
            "wrong_use",
            "void_from_truth is for training without any class's truth; with unseen classes it is implied.",
            "Leave one of them out.",
        )
    if void or not truth:
        return np.ones(count, np.bool_)
    return np.isin(np.arange(count), list(unseen))


def _no_common_class(
    what: str, names: Sequence[str], ontology: Ontology, wanted: npt.NDArray[np.bool_] | None = None
) -> MaskMillError:
    asked = [name for number, name in enumerate(ontology.names) if wanted is None or wanted[number]]
    return WrongUse(
        "classes_differ",
        f"None of the classes to train, {base.shown(asked)}, is among those of {what}: {base.shown(names)}.",
        "Label with these classes, or train with those of the table.",
    )
