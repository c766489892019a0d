"""The format of the label table: its columns, and how rows are made, encoded and read.

To add a column, add it to ``LABEL_SCHEMA``, ``NEWER_COLUMNS`` and ``ok_row``; failed rows have null there.

``labels`` (H, W) has class ids and the ignore index, as uint8 for up to 254 classes, else uint16.
``confidence`` uint8 (H, W) is round(255 p), with p the probability of the chosen class.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import Damaged, FailedWork, MaskMillError
from pipeline.corpus.spill import ROWS_AT_ONCE, Spill, spans
from pipeline.files.faults import says_damage
from pipeline.files.storage import Storage, open_storage
from pipeline.table.statistics import Confidence, Labels, QualityScore, quality_of, segments, softmin
from pipeline.table.strips import png_size

#: The layout of Hugging Face's ``Image`` feature, for ``datasets`` and viewers.
IMAGE_TYPE: Final = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SEGMENT_TYPE: Final = pa.struct(
    [
        ("class_id", pa.int32()),
        ("area", pa.int64()),
        ("mean_confidence", pa.float32()),
        ("bbox", pa.list_(pa.int32(), 4)),
    ]
)
#: One row per image, including failures.
LABEL_SCHEMA: Final = pa.schema(
    [
        ("id", pa.int64()),
        ("uri", pa.string()),
        ("sha256", pa.binary(32)),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("mask", IMAGE_TYPE),
        ("confidence", IMAGE_TYPE),
        ("segments", pa.list_(SEGMENT_TYPE)),
        ("quality", pa.float32()),
        ("agreement", pa.float32()),  # mean of the next
        ("segment_agreement", pa.list_(pa.float32())),  # see ``pipeline.table.statistics.agreement``
        ("version", pa.string()),  # size and time of change, or ETag, of the file: see ``file_version``
    ]
)
#: Columns that tables of older versions lack; readers get null.
NEWER_COLUMNS: Final = ("agreement", "segment_agreement", "version")
REQUIRED_COLUMNS: Final = tuple(name for name in LABEL_SCHEMA.names if name not in NEWER_COLUMNS)
#: The record of the table: classes, recipe, weights, versions, counts.
DATASET_FILE: Final = "dataset.json"
#: Pixels of a map that is decoded whole: Pillow's limit for images. Larger ones are read in strips.
MOST_DECODED: Final = 178_956_970
#: ``status`` of a labelled image; any other value is an error code.
OK: Final = "ok"
#: Code of labelled images whose maps are too large for what is done with them: they are left out of it.
MAP_TOO_LARGE: Final = "map_too_large"

_MAX_ERROR_LENGTH = 500
_FILES = "labels"


# --- codecs ---


def encode_mask(labels: Labels) -> bytes:
    """Encode as a grey PNG: 8 bits for uint8, 16 bits for uint16."""
    _check_map(labels, (np.uint8, np.uint16))
    import cv2

    # Runs are long, and rows resemble the row above. Run-length encoding of vertical differences is the
    # fastest strategy, and compresses better than the default one (benchmarks/png_codecs.py).
    return _encode(labels, cv2.IMWRITE_PNG_STRATEGY_RLE)


def decode_mask(data: bytes) -> Labels:
    """Inverse of ``encode_mask``.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    decoded = _decode(data, "mask")
    if decoded.ndim != 2 or decoded.dtype not in (np.uint8, np.uint16):
        raise _unreadable("mask", f"{decoded.dtype} of shape {decoded.shape} is not a map of class ids")
    return decoded


def encode_confidence(confidence: Confidence) -> bytes:
    """Encode as a grey 8-bit PNG."""
    _check_map(confidence, (np.uint8,))
    import cv2

    # The map is smooth, so use differences and the default strategy at its fastest level.
    return _encode(confidence, cv2.IMWRITE_PNG_STRATEGY_DEFAULT)


def decode_confidence(data: bytes) -> Confidence:
    """Inverse of ``encode_confidence``.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    decoded = _decode(data, "confidence")
    if decoded.ndim != 2 or decoded.dtype != np.uint8:
        raise _unreadable("confidence", f"{decoded.dtype} of shape {decoded.shape} is not a confidence map")
    return decoded


def is_large(png: bytes) -> bool:
    """Whether a map has more pixels than ``MOST_DECODED``."""
    height, width = png_size(png) or (0, 0)
    return height * width > MOST_DECODED


def large_map(height: int, width: int, most: int | None = None) -> str:
    """Why an image is left out, in words.

    Args:
        height, width: of the image.
        most: pixels that it may have; None for ``MOST_DECODED``.
    """
    most = MOST_DECODED if most is None else most
    return f"{width:,} x {height:,} pixels are more than can be taken whole here ({most:,})"


def _encode(array: npt.NDArray[Any], strategy: int) -> bytes:
    import cv2  # releases the GIL and is several times as fast as Pillow here

    flags = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, strategy]
    if hasattr(cv2, "IMWRITE_PNG_FILTER"):  # older versions choose a filter per row, which is slower
        flags += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
    done, data = cv2.imencode(".png", np.ascontiguousarray(array), flags)
    assert done
    return bytes(data)


def _decode(data: bytes, what: str) -> npt.NDArray[Any]:
    import cv2

    if not _chunks_fit(data):
        raise _unreadable(what, "not a whole PNG")
    if is_large(data):
        height, width = png_size(data) or (0, 0)
        raise FailedWork(
            MAP_TOO_LARGE,
            f"A {what} cannot be decoded: {large_map(height, width)}.",
            "Labelling, verify, report and show take such images; pipeline.table.strips.read_strips reads "
            "their maps. For the rest, cut them first.",
        )
    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise _unreadable(what, " ".join(str(error).split())) from None
    if decoded is None:
        raise _unreadable(what, "not a whole PNG")
    array: npt.NDArray[Any] = np.asarray(decoded)
    return array


def _chunks_fit(data: bytes) -> bool:
    """Whether the chunks of a PNG end within it. OpenCV takes memory for what a chunk claims, up to 4 GB."""
    if not data.startswith(b"\x89PNG"):
        return True
    at = 8
    while at + 8 <= len(data) and data[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return at <= len(data)


def _check_map(array: npt.NDArray[Any], kinds: Sequence[type]) -> None:
    assert array.ndim == 2 and array.size and array.dtype.type in kinds, (array.shape, array.dtype)


def _unreadable(what: str, why: str) -> MaskMillError:
    return Damaged(
        "table_damaged", f"a {what} cannot be decoded: {why}", "Label the image again into a new output."
    )


# --- rows ---


def ok_row(
    *, id: int, uri: str, sha256: bytes, height: int, width: int,
    labels: Labels, confidence: Confidence, ignore_index: int, version: str | None = None,
    agreement: Sequence[float] | None = None, score: QualityScore = "classes",
) -> dict[str, Any]:  # fmt: skip
    """Row of a labelled image.

    ``sha256`` is the 32-byte digest of the encoded image; height and width apply after EXIF orientation;
    ``version`` is that of the file as it was read (``pipeline.files.fetch.file_version``); ``agreement`` of
    each segment with a second reading, None if there was none; ``score`` what ``quality`` holds.
    """
    assert labels.shape == confidence.shape == (height, width), (labels.shape, confidence.shape)
    found = segments(labels, confidence, ignore_index=ignore_index)
    assert agreement is None or len(agreement) == len(found), (agreement, found)
    return encoded_row(
        id=id,
        uri=uri,
        sha256=sha256,
        height=height,
        width=width,
        mask=encode_mask(labels),
        confidence=encode_confidence(confidence),
        segments=found,
        quality=quality_of(found)
        if score == "classes"
        else softmin(confidence, labels, ignore_index=ignore_index),
        agreement=agreement,
        version=version,
    )


def encoded_row(
    *, id: int, uri: str, sha256: bytes, height: int, width: int,
    mask: bytes, confidence: bytes, segments: list[dict[str, Any]], quality: float,
    agreement: Sequence[float] | None = None, version: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """``ok_row`` from maps that are PNGs already (``pipeline.table.strips``)."""
    return {
        "id": id,
        "uri": uri,
        "sha256": sha256,
        "height": height,
        "width": width,
        "status": OK,
        "error": None,
        "mask": {"bytes": mask, "path": None},
        "confidence": {"bytes": confidence, "path": None},
        "segments": segments,
        "quality": quality,
        "agreement": sum(agreement) / len(agreement) if agreement else None,
        "segment_agreement": agreement,
        "version": version,
    }


def failed_row(
    *, id: int, uri: str, status: str, error: str | None,
    sha256: bytes | None = None, height: int | None = None, width: int | None = None,
    version: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Row of an image that could not be labelled; unknown values are null.

    Args:
        status: stable error code.
        error: message for humans, truncated to 500 characters.
    """
    assert status and status != OK
    if error is not None and len(error) > _MAX_ERROR_LENGTH:
        error = error[: _MAX_ERROR_LENGTH - 1] + "…"
    return dict.fromkeys(LABEL_SCHEMA.names) | {
        "id": id,
        "uri": uri,
        "sha256": sha256,
        "height": height,
        "width": width,
        "status": status,
        "error": error,
        "version": version,
    }


# --- reading ---


def iter_rows(
    table: Storage | str | os.PathLike[str], columns: Sequence[str] | None = None, *, batch_size: int = 64
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a label table as dictionaries, with ``batch_size`` rows in memory at a time.

    Args:
        table: the output of a labelling run, or the folder with its Parquet files.
        columns: columns to read; all by default.
        batch_size: rows per batch.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    for batch in iter_batches(table, columns, batch_size=batch_size):
        yield from batch.to_pylist()


def iter_batches(
    table: Storage | str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    *,
    batch_size: int = 64,
    names: Sequence[str] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a label table in batches; see ``iter_rows``.

    Args:
        table: the output of a labelling run, or the folder with its Parquet files.
        columns: columns to read; all by default.
        batch_size: rows per batch.
        names: read only these files, relative to ``table``.
    """
    storage, files = table_files(table) if names is None else (_opened(table), list(names))
    wanted = list(columns or LABEL_SCHEMA.names)
    for name in files:
        with open_part(storage, name, wanted) as file:
            present = [column for column in wanted if column in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size, columns=present, use_threads=False):
                yield batch if len(present) == len(wanted) else _with_nulls(batch, wanted)


def read_ids(table: Storage | str | os.PathLike[str]) -> npt.NDArray[np.int64]:
    """Ids of all rows, in file order, including duplicates.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    parts = [batch.column("id").to_numpy() for batch in iter_batches(table, ["id"], batch_size=65_536)]
    return np.concatenate([np.empty(0, np.int64), *parts])


class Counts:
    """Counts of rows, which add up over parts and runs.

    Args:
        counts: start from these, as ``to_dict`` wrote them.
    """

    COLUMNS: Final = ("status", "error", "height", "width", "segments", "quality")

    def __init__(self, counts: dict[str, Any] | None = None) -> None:
        given = counts or {}
        self.status: dict[str, int] = dict(given.get("status", {}))
        self._errors: dict[str, str] = dict(given.get("errors", {}))
        self._pixels = int(given.get("pixels", 0))
        self._areas = _by_class(given.get("class_pixels", {}))
        self._images = _by_class(given.get("class_images", {}))
        self._quality = (given.get("mean_quality") or 0.0) * self.status.get(OK, 0)

    @property
    def images(self) -> int:
        """Number of rows."""
        return sum(self.status.values())

    def count(self, rows: pa.Table | pa.RecordBatch, sign: int = 1) -> None:
        """Add rows with ``COLUMNS``, or take them away with sign -1."""
        codes = rows.column("status").to_pylist()
        for code, error in zip(codes, rows.column("error").to_pylist(), strict=True):
            self.status[code] = self.status.get(code, 0) + sign
            if error is not None:
                self._errors.setdefault(code, error)
        labelled = pa.table(rows.select(list(self.COLUMNS))).filter(
            pa.array([c == OK for c in codes], pa.bool_())
        )
        height, width = (labelled[name].to_numpy().astype(np.int64) for name in ("height", "width"))
        self._pixels += sign * int(height @ width)
        self._quality += sign * float(labelled["quality"].to_numpy().sum(dtype=np.float64))
        for chunk in labelled["segments"].chunks:
            found = chunk.flatten()
            ids, area = (found.field(name).to_numpy(zero_copy_only=False) for name in ("class_id", "area"))
            self._widen(int(ids.max(initial=-1)) + 1)
            np.add.at(self._areas, ids, sign * area)
            np.add.at(self._images, ids, sign)

    def add(self, other: Counts, sign: int = 1) -> None:
        """Add other counts, or take them away with sign -1."""
        for code, number in other.status.items():
            self.status[code] = self.status.get(code, 0) + sign * number
        self._errors = other._errors | self._errors
        self._pixels += sign * other._pixels
        self._quality += sign * other._quality
        self._widen(len(other._areas))
        self._areas[: len(other._areas)] += sign * other._areas
        self._images[: len(other._images)] += sign * other._images

    def _widen(self, classes: int) -> None:
        more = max(0, classes - len(self._areas))
        self._areas, self._images = np.pad(self._areas, (0, more)), np.pad(self._images, (0, more))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: see ``summarise``."""
        status = {code: number for code, number in self.status.items() if number > 0}
        labelled, images = status.get(OK, 0), sum(status.values())
        present = np.flatnonzero(self._areas).tolist()
        return {
            "images": images,
            "labelled": labelled,
            "failed": images - labelled,
            "status": dict(sorted(status.items(), key=lambda item: (-item[1], item[0]))),
            "errors": {code: text for code, text in sorted(self._errors.items()) if code in status},
            "pixels": self._pixels,
            "ignored_pixels": self._pixels - int(self._areas.sum()),
            "class_pixels": {str(i): int(self._areas[i]) for i in present},
            "class_images": {str(i): int(self._images[i]) for i in present},
            "mean_quality": self._quality / labelled if labelled else None,
        }


def _by_class(counts: dict[str, int]) -> npt.NDArray[np.int64]:
    found = np.zeros(1 + max((int(i) for i in counts), default=-1), np.int64)
    for number, count in counts.items():
        found[int(number)] = count
    return found


def summarise(table: Storage | str | os.PathLike[str], names: Sequence[str] | None = None) -> dict[str, Any]:
    """Summarise a label table in bounded memory, as plain JSON values.

    Args:
        table: the output of a labelling run, or the folder with its Parquet files.
        names: count only these files, relative to ``table``.

    Returns:
        ``images``, ``labelled`` and ``failed``; ``status``: rows per status, most frequent first; ``errors``:
        an example message per code; ``pixels`` of labelled images and ``ignored_pixels`` among them;
        ``class_pixels`` and ``class_images`` by class id (as a string); ``mean_quality``, None without
        labelled images.

    Raises:
        MaskMillError: ``table_damaged``, also if an image has several rows.
    """
    return summarise_batches(
        iter_batches(table, ["id", *Counts.COLUMNS], batch_size=4096, names=names), table
    )


def summarise_batches(
    batches: Iterable[pa.RecordBatch], table: Storage | str | os.PathLike[str]
) -> dict[str, Any]:
    """Summarise rows with ``id`` and ``Counts.COLUMNS``; see ``summarise``.

    Args:
        batches: the rows.
        table: where they are from, for errors.
    """
    counts = Counts()
    ids = Spill(pa.schema([("id", pa.int64())]))
    for batch in batches:
        ids.add(pa.table(batch.select(["id"])))
        counts.count(batch)
    doubled = 0
    for span in spans(ids.rows, ROWS_AT_ONCE):
        found = ids.read(span)["id"].to_numpy()
        doubled += int(np.count_nonzero(found[1:] == found[:-1]))
    _refuse_doubled(doubled, _opened(table))
    return counts.to_dict()


def refuse_doubled(ids: npt.NDArray[np.int64], storage: Storage) -> None:
    """Raise ``table_damaged`` if an image has several rows, such as after a file was copied."""
    _refuse_doubled(len(ids) - len(np.unique(ids)), storage)


def _refuse_doubled(doubled: int, storage: Storage) -> None:
    if doubled:
        raise Damaged(
            "table_damaged",
            f"{doubled:,} rows of {storage.uri} are there twice, as if a file had been copied.",
            f"Run: maskmill verify {storage.uri.removesuffix(f'/{_FILES}')} --repair",
        )


def table_files(table: Storage | str | os.PathLike[str]) -> tuple[Storage, list[str]]:
    """The folder of a table's Parquet files, and their sorted names, which are empty without a table."""
    storage = _opened(table)
    inner = storage.child(_FILES)
    for place in (inner, storage):
        names = [n for n in place.list() if n.endswith(".parquet") and not n.startswith((".", "_"))]
        if names:
            return place, names
    return inner, []


def _opened(table: Storage | str | os.PathLike[str]) -> Storage:
    return table if isinstance(table, Storage) else open_storage(table)


def _with_nulls(batch: pa.RecordBatch, wanted: Sequence[str]) -> pa.RecordBatch:
    columns = [
        batch.column(name)
        if name in batch.schema.names
        else pa.nulls(batch.num_rows, LABEL_SCHEMA.field(name).type)
        for name in wanted
    ]
    return pa.RecordBatch.from_arrays(columns, names=list(wanted))


@contextlib.contextmanager
def open_part(storage: Storage, name: str, columns: Sequence[str]) -> Iterator[pq.ParquetFile]:
    """Open a file of a label table that has these columns, or lacks only ``NEWER_COLUMNS``.

    Raises:
        MaskMillError: ``table_damaged``, also while it is read.
    """
    try:
        with (
            storage.arrow_filesystem().open_input_file(storage.path(name)) as source,
            pq.ParquetFile(source, page_checksum_verification=True) as file,
        ):
            present = {*file.schema_arrow.names, *NEWER_COLUMNS}
            missing = [column for column in columns if column not in present]
            if missing:
                raise _bad_table(storage, name, f"it has no column {', '.join(missing)}")
            yield file
    except (OSError, pa.ArrowException) as error:
        if not says_damage(error):
            raise
        raise _bad_table(storage, name, " ".join(str(error).split())) from error


def _bad_table(storage: Storage, name: str, why: str) -> MaskMillError:
    root = storage.uri_of(name).rpartition("/")[0].removesuffix(f"/{_FILES}")
    return Damaged(
        "table_damaged",
        f"{storage.uri_of(name)} is no readable part of a label table: {why}",
        f"Run: maskmill verify {root} --repair (what is damaged is set aside), then label again. Or give the "
        "right folder.",
    )
