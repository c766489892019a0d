"""The format of the label table: its columns, and how rows are made, encoded and read.

To add a column, add it to ``LABEL_SCHEMA`` and to ``ok_row``; failed rows have null there.

``labels`` (H, W) has class ids and the ignore index, as uint8 for up to 254 classes, else uint16.
``confidence`` uint8 (H, W) is round(255 p), with p the probability of the chosen class.
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
from pipeline.files.faults import says_damage
from pipeline.files.storage import Storage, open_storage
from pipeline.table.statistics import Confidence, Labels, quality, segments

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
    ]
)
#: The record of the table: classes, recipe, weights, versions, counts.
DATASET_FILE: Final = "dataset.json"
#: ``status`` of a labelled image; any other value is an error code.
OK: Final = "ok"

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


# --- rows ---


def ok_row(
    *, id: int, uri: str, sha256: bytes, height: int, width: int,
    labels: Labels, confidence: Confidence, ignore_index: int,
) -> dict[str, Any]:  # fmt: skip
    """Row of a labelled image.

    ``sha256`` is the 32-byte digest of the encoded image; height and width apply after EXIF orientation.
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
    for batch in _batches(table, columns, batch_size):
        yield from batch.to_pylist()


def read_ids(table: Storage | str | os.PathLike[str]) -> npt.NDArray[np.int64]:
    """Ids of all rows, in file order, including duplicates.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    parts = [batch.column("id").to_numpy() for batch in _batches(table, ["id"], 65_536)]
    return np.concatenate([np.empty(0, np.int64), *parts])


def summarise(table: Storage | str | os.PathLike[str]) -> dict[str, Any]:
    """Summarise a label table in bounded memory, as plain JSON values.

    Returns:
        ``images``, ``labelled`` and ``failed``; ``status``: rows per status, most frequent first; ``errors``:
        an example message per code; ``pixels`` of labelled images and ``ignored_pixels`` among them;
        ``class_pixels`` and ``class_images`` by class id (as a string); ``mean_quality``, None without
        labelled images.

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
    """The folder of a table's Parquet files, and their sorted names, which are empty without a table."""
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
        except (pa.ArrowException, OSError) as error:
            if not says_damage(error):
                raise
            raise _bad_table(storage.uri_of(name), " ".join(str(error).split())) from None


def _bad_table(uri: str, why: str) -> MaskMillError:
    return Damaged(
        "table_damaged",
        f"{uri} is not part of a label table: {why}",
        "Run the same labelling command again, which repairs what a crash left; or give the right folder.",
    )
