"""Training samples from a label table: images, the teacher's labels, and truth where a method may know it.

An index of the table (no pixels) is built once and sent to every loader; images, masks and confidences are
read per sample. A table is a set of Parquet files, its *parts*, which can only be read column by column, so
an epoch is shuffled in windows: the parts are shuffled, then the rows of as many parts as a loader can cache
(``WINDOW_BYTES``). A loader thus reads a part once per epoch, not once per row.

Shapes: C classes of the training ontology, N images, S T sides of a crop.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import Damaged, MaskMillError, WrongUse
from pipeline.datasets import base
from pipeline.evaluation import tables as evaluation
from pipeline.files import images
from pipeline.files.faults import says_damage
from pipeline.files.fetch import fetch, max_bytes
from pipeline.files.storage import Storage, open_storage
from pipeline.labelling.recipes import table_recipe
from pipeline.ontology.ontology import Ontology
from pipeline.table.labels import LABEL_SCHEMA, MOST_DECODED, OK, refuse_doubled, table_files
from pipeline.table.record import read_table_record
from pipeline.table.splits import Chosen
from pipeline.table.statistics import Confidence, Labels
from pipeline.table.viewed import decode_maps, iter_viewed
from pipeline.table.views import TableView
from pipeline.training.loop.protocols import GUESS, IGNORED, Sample
from pipeline.training.samples.augment import MEAN_COLOUR, AugmentSettings, augment

WINDOW_BYTES = 96 << 20
"""Stored size of the masks and confidences of one shuffling window. A loader caches twice as much."""

FILL: Mapping[str, int] = {"labels": IGNORED, "teacher": IGNORED, "confidence": 0}
"""What lies beside an image that is smaller than the crop."""

_MANIFESTS = "manifest"
_INDEX = ("id", "status", "height", "width", "segments", "quality")
_READERS = 16

_Ids = npt.NDArray[np.int32]


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
    teacher: _Ids
    _true: _Ids | None  # by id of the truth
    _dataset: base.Dataset | None
    _samples: tuple[base.Sample, ...]  # N where there is truth
    _max_pixels: int
    view: TableView | None = None
    window_bytes: int = WINDOW_BYTES

    @property
    def num_images(self) -> int:
        """N, the number of distinct samples."""
        return len(self.part)

    def class_frequencies(self) -> npt.NDArray[np.float64]:
        """Share of each class in the teacher's labels: (C,), with sum 1, or 0 if there are none."""
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
        maps: dict[str, npt.NDArray[Any]] = {"teacher": self.teacher[mask], "confidence": confidence}
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
        with _opened(self._storage, part) as file:
            found = file.read(columns, use_threads=False)
        for name in ("mask", "confidence"):
            values = pa.chunked_array([chunk.field("bytes") for chunk in found[name].chunks], pa.binary())
            found = found.set_column(found.column_names.index(name), name, values)
        return found.combine_chunks()


@contextlib.contextmanager
def _opened(storage: Storage, part: str) -> Iterator[pq.ParquetFile]:
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
    chosen: Chosen | None = None,
    leave_out: npt.NDArray[np.int64] | None = None,
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
        chosen: use only these images of it.
        leave_out: ids of images that people have rejected.

    Raises:
        MaskMillError: ``table_missing``; ``table_damaged``; ``classes_differ`` if table or truth share no
            class with the training; ``image_invalid`` from ``pipeline.evaluation.tables.plan``;
            ``wrong_use``; ``training_data_empty`` if no row is left.
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
    rows = _Rows(count, chosen, leave_out, min(max_pixels, MOST_DECODED))
    with ThreadPoolExecutor(_READERS) as pool:
        for number, found in enumerate(pool.map(lambda part: read_index(storage, part, view), parts)):
            rows.add(number, found, pixels_of, min_quality, None if work is None else work.samples)
    if not rows.kept:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in rows.left_out.items())
        raise WrongUse(
            "training_data_empty",
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
            pairs = np.concatenate([pairs, _true_classes(truth.reader(), samples, true)])
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
        _ranges=_byte_ranges(root, ids),
        _repeats=repeats,
        pixels=rows.pixels,
        teacher=teacher,
        _true=true,
        _dataset=None if truth is None else truth.reader(),
        _samples=samples,
        _max_pixels=max_pixels,
        view=view,
    )


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


def class_ids(
    names: Sequence[str], ontology: Ontology, ignore_index: int, words: Sequence[Sequence[str]] = ()
) -> _Ids:
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


def _no_common_class(
    what: str, names: Sequence[str], ontology: Ontology, wanted: npt.NDArray[np.bool_] | None = None
) -> MaskMillError:
    asked = [name for number, name in enumerate(ontology.names) if wanted is None or wanted[number]]
    return WrongUse(
        "classes_differ",
        f"None of the classes to train, {base.shown(asked)}, is among those of {what}: {base.shown(names)}.",
        "Label with these classes, or train with those of the table.",
    )


class _Rows:
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
        lookup: _Ids,
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


def read_index(storage: Storage, part: str, view: TableView | None) -> tuple[pa.Table, int]:
    """Read the index columns of a part, as the view has them, and the stored size of its maps in bytes."""
    with _opened(storage, part) as file:
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


def _true_classes(dataset: base.Dataset, samples: Sequence[base.Sample], true: _Ids) -> npt.NDArray[np.int64]:
    """Image and class of everything in the truth, without hidden classes: (n, 2)."""

    def classes(sample: base.Sample) -> npt.NDArray[np.int64]:
        found = np.unique(true[np.flatnonzero(np.bincount(dataset.truth(sample).ravel()))])
        return found[found >= 0].astype(np.int64)

    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(classes, samples))
    image = np.repeat(np.arange(len(found)), [len(one) for one in found])
    return np.stack([image, np.concatenate([np.empty(0, np.int64), *found])], 1)


def _byte_ranges(root: Storage, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
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
