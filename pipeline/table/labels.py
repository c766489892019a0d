"""The label table: its columns, its codecs, the statistics in its rows, and how to read it back.

Shape letters: H W pixels. ``labels`` is uint8 (up to 254 classes) or uint16 (H, W) with class ids and the
ignore index; ``confidence`` is uint8 (H, W), round(255 p) of the chosen class.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import Damaged, MaskMillError
from pipeline.files.storage import Storage, open_storage

Labels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Confidence = npt.NDArray[np.uint8]

#: The layout of Hugging Face's ``Image`` feature, which ``datasets`` and viewers open.
IMAGE_TYPE: Final = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SEGMENT_TYPE: Final = pa.struct(
    [
        ("class_id", pa.int32()),
        ("area", pa.int64()),
        ("mean_confidence", pa.float32()),
        ("bbox", pa.list_(pa.int32(), 4)),
    ]
)
#: One row per image, failures included.
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
    ]
)
#: What the table is, beside it: classes, recipe, weights, versions, counts.
DATASET_FILE: Final = "dataset.json"
#: ``status`` of a labelled image; any other is an error code.
OK: Final = "ok"

_MAX_ERROR_LENGTH = 500
_FILES = "labels"


# --- codecs ---


def encode_mask(labels: Labels) -> bytes:
    """Grey PNG of a label map (H, W): 8 bits for uint8, 16 bits for uint16."""
    _check_map(labels, (np.uint8, np.uint16))
    import cv2

    # Long runs and rows like the one above: run lengths of vertical differences are the fastest of all and
    # smaller than the general search (measured by benchmarks/png_codecs.py).
    return _encode(labels, cv2.IMWRITE_PNG_STRATEGY_RLE)


def decode_mask(data: bytes) -> Labels:
    """Label map (H, W), uint8 or uint16, of a PNG that ``encode_mask`` made.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    decoded = _decode(data, "mask")
    if decoded.ndim != 2 or decoded.dtype not in (np.uint8, np.uint16):
        raise _unreadable("mask", f"{decoded.dtype} of shape {decoded.shape} is no map of class ids")
    return decoded


def encode_confidence(confidence: Confidence) -> bytes:
    """Grey 8-bit PNG of a confidence map (H, W)."""
    _check_map(confidence, (np.uint8,))
    import cv2

    # Smooth in both directions: differences, then the general search at its quickest.
    return _encode(confidence, cv2.IMWRITE_PNG_STRATEGY_DEFAULT)


def decode_confidence(data: bytes) -> Confidence:
    """Confidence map (H, W), uint8, of a PNG that ``encode_confidence`` made.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    decoded = _decode(data, "confidence")
    if decoded.ndim != 2 or decoded.dtype != np.uint8:
        raise _unreadable("confidence", f"{decoded.dtype} of shape {decoded.shape} is no confidence map")
    return decoded


def _encode(array: npt.NDArray[Any], strategy: int) -> bytes:
    import cv2  # OpenCV releases the interpreter lock and is several times as fast as Pillow here

    flags = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, strategy]
    if hasattr(
        cv2, "IMWRITE_PNG_FILTER"
    ):  # older versions choose a filter per row: slower, otherwise the same
        flags += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
    done, data = cv2.imencode(".png", np.ascontiguousarray(array), flags)
    assert done
    return bytes(data)


def _decode(data: bytes, what: str) -> npt.NDArray[Any]:
    import cv2

    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise _unreadable(what, " ".join(str(error).split())) from None
    if decoded is None:
        raise _unreadable(what, "not a whole PNG")
    array: npt.NDArray[Any] = np.asarray(decoded)
    return array


def _check_map(array: npt.NDArray[Any], kinds: Sequence[type]) -> None:
    assert array.ndim == 2 and array.size and array.dtype.type in kinds, (array.shape, array.dtype)


def _unreadable(what: str, why: str) -> MaskMillError:
    return Damaged(
        "table_damaged", f"a {what} cannot be decoded: {why}", "Label the image again into a new output."
    )


# --- statistics of one image ---


def segments(labels: Labels, confidence: Confidence, *, ignore_index: int) -> list[dict[str, Any]]:
    """Statistics per class present.

    Args:
        labels: (H, W).
        confidence: uint8 (H, W).
        ignore_index: label that counts as none.

    Returns:
        By ascending class id: ``class_id``, ``area`` in pixels, ``mean_confidence`` in [0, 1], ``bbox`` as in
        COCO: [x, y, width, height] in pixels, covering all pixels of the class.
    """
    assert labels.shape == confidence.shape
    areas, sums = _areas_and_sums(labels, confidence)
    present = np.flatnonzero(areas)
    rank: npt.NDArray[Any] = (np.cumsum(areas > 0) - 1).astype(labels.dtype)[labels]
    tops, bottoms = _extents(rank, len(present))
    lefts, rights = _extents(rank.T, len(present))
    return [
        {
            "class_id": class_id,
            "area": int(areas[class_id]),
            "mean_confidence": float(sums[class_id] / (255 * areas[class_id])),
            "bbox": [left, top, right - left, bottom - top],
        }
        for class_id, left, top, right, bottom in zip(
            present.tolist(), lefts.tolist(), tops.tolist(), rights.tolist(), bottoms.tolist(), strict=True
        )
        if class_id != ignore_index
    ]


def _extents(rank: npt.NDArray[Any], count: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """First row of each of ``count`` ranks, and the row behind its last."""
    rows = np.zeros((len(rank), count), bool)
    rows[np.arange(len(rank))[:, None], rank] = True
    return rows.argmax(0), len(rank) - rows[::-1].argmax(0)


def _areas_and_sums(labels: Labels, confidence: Confidence) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Pixels, and sum of their confidences (0..255), by class id from 0."""
    if labels.dtype == np.uint8:
        # One count of both together takes half the time of a count and a weighted count.
        joint = np.bincount((labels.astype(np.uint16) << 8 | confidence).ravel(), minlength=1 << 16)
        joint = joint.reshape(256, 256)
        return joint.sum(1), joint @ np.arange(256)
    flat = labels.ravel()
    return np.bincount(flat), np.bincount(flat, weights=confidence.ravel())


def quality(confidence: Confidence, labels: Labels, *, ignore_index: int, temperature: float = 0.1) -> float:
    """Label-quality score of an image: low where some of its pixels are doubtful.

    The mean of the pixels' confidences weighted by softmax((1 - confidence) / temperature), as
    ``cleanlab.segmentation.rank.get_label_quality_scores`` does with method "softmin" (Lad and Mueller,
    "Estimating label quality and errors in semantic segmentation data via any model", 2023). Computed from
    the histogram of the 256 possible values, which is exact.

    Args:
        confidence: uint8 (H, W).
        labels: (H, W).
        ignore_index: pixels with this label do not count.
        temperature: towards 0 the least confidence decides, towards infinity the plain mean.

    Returns:
        In [0, 1]; 0 for an image without any labelled pixel.
    """
    assert labels.shape == confidence.shape
    counts = np.bincount(confidence[labels != ignore_index], minlength=256)
    present = np.flatnonzero(counts)
    if not len(present):
        return 0.0
    values = present / 255
    weights = counts[present] * np.exp((values[0] - values) / temperature)
    return float(weights @ values / weights.sum())


# --- rows ---


def ok_row(
    *, id: int, uri: str, sha256: bytes, height: int, width: int,
    labels: Labels, confidence: Confidence, ignore_index: int,
) -> dict[str, Any]:  # fmt: skip
    """Row of a labelled image.

    Args:
        id: from the manifest.
        uri: from the manifest.
        sha256: 32 bytes, of the encoded image.
        height: pixels, after EXIF orientation.
        width: likewise.
        labels: (height, width).
        confidence: uint8 (height, width).
        ignore_index: label of pixels without one.
    """
    assert labels.shape == confidence.shape == (height, width), (labels.shape, confidence.shape)
    return {
        "id": id,
        "uri": uri,
        "sha256": sha256,
        "height": height,
        "width": width,
        "status": OK,
        "error": None,
        "mask": {"bytes": encode_mask(labels), "path": None},
        "confidence": {"bytes": encode_confidence(confidence), "path": None},
        "segments": segments(labels, confidence, ignore_index=ignore_index),
        "quality": quality(confidence, labels, ignore_index=ignore_index),
    }


def failed_row(
    *, id: int, uri: str, status: str, error: str | None,
    sha256: bytes | None = None, height: int | None = None, width: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Row of an image that could not be labelled.

    Args:
        id: from the manifest.
        uri: from the manifest.
        status: stable error code, not "ok".
        error: message for people; cut after 500 characters.
        sha256: if the bytes could be read.
        height: if known.
        width: if known.
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
    }


# --- reading ---


def iter_rows(
    table: Storage | str | os.PathLike[str], columns: Sequence[str] | None = None, *, batch_size: int = 64
) -> Iterator[dict[str, Any]]:
    """Rows of a label table as dictionaries, file by file, with no more than ``batch_size`` in memory.

    Args:
        table: the output of a labelling run, or the folder with its Parquet files.
        columns: names to read; all by default.
        batch_size: rows read at a time.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    for batch in _batches(table, columns, batch_size):
        yield from batch.to_pylist()


def read_ids(table: Storage | str | os.PathLike[str]) -> npt.NDArray[np.int64]:
    """Ids of all rows, in file order; an id that is there twice appears twice.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    parts = [batch.column("id").to_numpy() for batch in _batches(table, ["id"], 65_536)]
    return np.concatenate([np.empty(0, np.int64), *parts])


def summarise(table: Storage | str | os.PathLike[str]) -> dict[str, Any]:
    """Counts over a label table, in bounded memory, as plain JSON values.

    Returns:
        ``images``; ``labelled`` and ``failed``; ``status`` (rows per status, most frequent first); ``errors``
        (one message per error code, as an example); ``pixels`` of labelled images, ``ignored_pixels`` among
        them; ``class_pixels`` and ``class_images`` (by class id as a string); ``mean_quality``, None without
        any labelled image.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    status: dict[str, int] = {}
    errors: dict[str, str] = {}
    pixels = 0
    areas = np.zeros(0, np.int64)
    images = np.zeros(0, np.int64)
    quality_sum, scored = 0.0, 0
    columns = ["status", "error", "height", "width", "segments", "quality"]
    for batch in _batches(table, columns, 4096):
        codes = batch.column("status").to_pylist()
        for code, error in zip(codes, batch.column("error").to_pylist(), strict=True):
            status[code] = status.get(code, 0) + 1
            if error is not None:
                errors.setdefault(code, error)
        labelled = batch.filter(pa.array([code == OK for code in codes], pa.bool_()))
        height, width = (labelled.column(n).to_numpy().astype(np.int64) for n in ("height", "width"))
        pixels += int(height @ width)
        scores = labelled.column("quality").to_numpy(zero_copy_only=False)
        quality_sum, scored = quality_sum + float(scores.sum(dtype=np.float64)), scored + len(scores)
        found = labelled.column("segments").flatten()
        ids, area = (found.field(n).to_numpy(zero_copy_only=False) for n in ("class_id", "area"))
        size = max(len(areas), int(ids.max(initial=-1)) + 1)
        areas, images = np.pad(areas, (0, size - len(areas))), np.pad(images, (0, size - len(images)))
        np.add.at(areas, ids, area)
        np.add.at(images, ids, 1)
    present = np.flatnonzero(areas).tolist()
    return {
        "images": sum(status.values()),
        "labelled": status.get(OK, 0),
        "failed": sum(status.values()) - status.get(OK, 0),
        "status": dict(sorted(status.items(), key=lambda item: (-item[1], item[0]))),
        "errors": dict(sorted(errors.items())),
        "pixels": pixels,
        "ignored_pixels": pixels - int(areas.sum()),
        "class_pixels": {str(i): int(areas[i]) for i in present},
        "class_images": {str(i): int(images[i]) for i in present},
        "mean_quality": quality_sum / scored if scored else None,
    }


def table_files(table: Storage | str | os.PathLike[str]) -> tuple[Storage, list[str]]:
    """The folder with a label table's Parquet files, and their sorted names; none if there is no table."""
    storage = table if isinstance(table, Storage) else open_storage(table)
    inner = storage.child(_FILES)
    for place in (inner, storage):
        names = [n for n in place.list() if n.endswith(".parquet") and not n.startswith((".", "_"))]
        if names:
            return place, names
    return inner, []


def _batches(
    table: Storage | str | os.PathLike[str], columns: Sequence[str] | None, batch_size: int
) -> Iterator[pa.RecordBatch]:
    storage, names = table_files(table)
    filesystem = storage.arrow_filesystem()
    for name in names:
        try:
            with filesystem.open_input_file(storage.path(name)) as source, pq.ParquetFile(source) as file:
                missing = [c for c in columns or LABEL_SCHEMA.names if c not in file.schema_arrow.names]
                if missing:
                    raise _bad_table(storage.uri_of(name), f"it has no column {', '.join(missing)}")
                yield from file.iter_batches(
                    batch_size, columns=list(columns or LABEL_SCHEMA.names), use_threads=False
                )
        except pa.ArrowException as error:
            raise _bad_table(storage.uri_of(name), " ".join(str(error).split())) from None


def _bad_table(uri: str, why: str) -> MaskMillError:
    return Damaged(
        "table_damaged",
        f"{uri} is not part of a label table: {why}",
        "Run the same labelling command again, which repairs what a crash left; or give the right folder.",
    )
