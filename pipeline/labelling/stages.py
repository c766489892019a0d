"""The stages of the labelling flow as callables on Arrow tables: decode, label, write. Imports no Ray.

Images travel between stages as raw bytes and a shape, which Arrow passes between processes without a copy.
Rows carry the seconds that each stage spent on them, which the last stage reports.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from models.errors import FailedWork
from pipeline.corpus.manifest import ADDRESS
from pipeline.files import corruptions, images
from pipeline.files.faults import explain
from pipeline.files.fetch import fetch, file_version, local_path, max_bytes
from pipeline.files.images import ImageSettings
from pipeline.files.large.opening import local_file, open_picture
from pipeline.files.logs import run_log
from pipeline.files.storage import Storage
from pipeline.labelling.attempts import (
    CRASHED,
    IMAGE_DEATHS,
    PART_DEATHS,
    AttemptBook,
    Attempts,
    Turns,
    crashed_row,
    part_key,
)
from pipeline.labelling.labeller import Labeller, Prediction, label_dtype
from pipeline.table import labels
from pipeline.table.committed import LABELS_DIR, RELABELLED_DIR, write_part
from pipeline.table.lease import refuse_other_holder
from pipeline.table.statistics import QualityScore, quality_of
from pipeline.table.strips import MapTooLarge, MapWriter

_T = TypeVar("_T")
_R = TypeVar("_R", bound=Sized)
_CHUNK_BYTES = 64 << 20
_FETCHES_AHEAD = 16
_AHEAD_BYTES = 256 << 20
_GIVE_UP_AFTER = 16
_LARGE_FILE = 64 << 20  # bytes; of a local file above, the header is read before the rest
_HEAD = 64

_KNOWN = ("id", "uri", "sha256", "height", "width", "status", "error", "version")
_DECODED = pa.schema(
    [
        *(labels.LABEL_SCHEMA.field(name) for name in _KNOWN),
        ("pixels", pa.binary()),
        ("network_height", pa.int32()),
        ("network_width", pa.int32()),
        ("decode_s", pa.float32()),
        ("fetch_s", pa.float32()),
        # Where a large image is, which has no pixels here: its windows are read when it is labelled.
        ("address", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
    ]
)
_LABELLED = pa.schema(
    [
        *(labels.LABEL_SCHEMA.field(name) for name in _KNOWN),
        ("labels", pa.binary()),
        ("confidence", pa.binary()),
        labels.LABEL_SCHEMA.field("segment_agreement"),
        ("decode_s", pa.float32()),
        ("fetch_s", pa.float32()),
        ("label_s", pa.float32()),
        ("batches", pa.float32()),
        # Of a large image, encoded already.
        ("maps", pa.struct([("mask", pa.binary()), ("confidence", pa.binary())])),
        ("segments", labels.LABEL_SCHEMA.field("segments").type),
        ("softmin", pa.float32()),
    ]
)
_WRITTEN = pa.schema(
    [
        ("done", pa.int64()),
        ("failures", pa.list_(pa.string())),
        ("decode_s", pa.float64()),
        ("label_s", pa.float64()),
        ("encode_s", pa.float64()),
        ("fetch_s", pa.float64()),
        ("write_s", pa.float64()),
        ("batches", pa.float64()),
        ("written", pa.int64()),
    ]
)
_SPENT = ("decode_s", "fetch_s", "label_s", "batches", "encode_s")
FILE_BYTES = 16 << 20
"""A file of the table need not be larger."""


@dataclass(frozen=True)
class _Fetched:
    """A file's content, or why there is none; ``version`` as ``file_version`` told it before.

    Attributes:
        large: it is to be read in windows, not here.
    """

    version: str | None
    data: bytes = b""
    error: images.ImageError | None = None
    large: bool = False

    def __len__(self) -> int:
        return len(self.data)


class Decode:
    """(id, uri) → decoded, resized images; an image that fails becomes a row with an error code."""

    def __init__(self, settings: ImageSettings, attempts: Attempts | None = None) -> None:
        self._settings = settings
        self._attempts = attempts or AttemptBook()

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        images.use_one_thread()
        rows: list[dict[str, Any]] = []
        size = 0
        entries = table.to_pylist()
        key = part_key("decode", table["id"].to_numpy())
        careful, crashed = self._attempts.begin(key) >= PART_DEATHS, False
        with ThreadPoolExecutor(_FETCHES_AHEAD) as pool:
            fetched: Iterator[Callable[[], _Fetched]] = (
                (functools.partial(self._fetch, entry) for entry in entries)
                if careful
                else (future.result for future in prefetch(pool, self._fetch, entries, _FETCHES_AHEAD))
            )
            for entry, fetch in zip(entries, fetched, strict=True):
                start = time.perf_counter()
                row = self._alone(entry, fetch) if careful else self._row(entry, fetch)
                crashed |= row["status"] == CRASHED
                row["decode_s"] = time.perf_counter() - start
                row["fetch_s"] = row["fetch_s"] or 0.0
                rows.append(row)
                size += len(row["pixels"] or b"")
                if size >= _CHUNK_BYTES:
                    yield pa.Table.from_pylist(rows, schema=_DECODED)
                    rows, size = [], 0
        if not crashed:
            self._attempts.end(key)
        if rows:
            yield pa.Table.from_pylist(rows, schema=_DECODED)

    def _fetch(self, entry: dict[str, Any]) -> _Fetched:
        address = entry.get(ADDRESS) or entry["uri"]
        # The version first: of a file that changes meanwhile it is the older one, and the change is found
        # later.
        version = file_version(address)
        start, length = entry.get("offset") or 0, entry.get("length")
        most = max_bytes(self._settings.max_pixels)
        try:
            if self._windows and self._is_large_file(address, start, length):
                return _Fetched(version, large=True)
            data = fetch(address, start=start, length=length, max_bytes=most)
        except images.ImageError as error:
            if self._windows and error.code == "too_many_bytes" and _begins_as_image(address, start):
                return _Fetched(version, large=True)
            return _Fetched(version, error=error)
        return _Fetched(version, data)

    @property
    def _windows(self) -> bool:
        """Whether large images are labelled in windows. Corruptions are of whole images."""
        return self._settings.large_window > 0 and not self._settings.corruption

    def _is_large_file(self, address: str, start: int, length: int | None) -> bool:
        """Whether a local file holds an image above the limit, of which then only the header is read."""
        path = local_path(address) if start == 0 and length is None else None
        try:
            if path is None or not path.is_file() or path.stat().st_size < _LARGE_FILE:
                return False
        except OSError:  # fetch tells
            return False
        return images.exceeds(path, self._settings.max_pixels)

    def _alone(self, entry: dict[str, Any], fetch: Callable[[], _Fetched]) -> dict[str, Any]:
        """The row of an image of a part that killed processes."""
        key = f"decode {entry['id']}"
        if self._attempts.begin(key) >= IMAGE_DEATHS:
            known = {"id": entry["id"], "uri": entry["uri"]}
            return dict.fromkeys(_DECODED.names) | known | crashed_row("decode")
        row = self._row(entry, fetch)
        self._attempts.end(key)
        return row

    def _row(self, entry: dict[str, Any], fetch: Callable[[], _Fetched]) -> dict[str, Any]:
        settings = self._settings
        row_id = entry["id"]
        row: dict[str, Any] = dict.fromkeys(_DECODED.names) | {"id": row_id, "uri": entry["uri"]}
        try:
            start = time.perf_counter()
            fetched = fetch()
            row["fetch_s"] = time.perf_counter() - start
            row["version"] = fetched.version
            if fetched.error is not None:
                raise fetched.error
            if fetched.large:
                return row | _large(entry)
            row["sha256"] = hashlib.sha256(fetched.data).digest()
            image = images.decode(fetched.data, max_pixels=settings.max_pixels)
        except images.ImageError as error:
            if (
                error.code == "too_large"
                and self._windows
                and images.exceeds(fetched.data, settings.max_pixels)
            ):
                return row | _large(entry)
            return row | {"status": error.code, "error": error.message}
        if settings.corruption:
            # Seeded by the image's id, so that its noise is reproducible.
            name, level = corruptions.parse(settings.corruption)
            image = corruptions.corrupt(image, name, level, seed=row_id % 2**64)  # ids are signed
        height, width = image.shape[:2]
        resized = images.fit(image, settings)
        return row | {
            "status": "ok",
            "height": height,
            "width": width,
            "pixels": np.ascontiguousarray(resized).tobytes(),
            "network_height": resized.shape[0],
            "network_width": resized.shape[1],
        }


def _begins_as_image(address: str, start: int) -> bool:
    try:
        return images.looks_like_image(fetch(address, start=start, length=_HEAD, max_bytes=_HEAD))
    except images.ImageError:
        return False


def _large(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "status": "ok",
        "address": entry.get(ADDRESS) or entry["uri"],
        "offset": entry.get("offset"),
        "length": entry.get("length"),
    }


class Label:
    """Decoded images → raw label and confidence maps, on one actor.

    Args:
        make_labeller: builds the Labeller.
        attempts: which parts and images have killed processes.
        run_id: this run, for the log.
        image_settings: for large images, which are read and labelled here in windows.
        ignore_index: id of uncertain pixels.
    """

    def __init__(
        self,
        make_labeller: Callable[[], Labeller],
        attempts: Attempts | None = None,
        run_id: str = "",
        image_settings: ImageSettings | None = None,
        ignore_index: int = 255,
    ) -> None:
        began = time.perf_counter()
        self._labeller = make_labeller()
        run_log(run_id).info("label: model ready in %.1f s", time.perf_counter() - began)
        self._attempts = attempts or AttemptBook()
        self._turns = Turns()
        self._run_id = run_id
        self._image_settings = image_settings or ImageSettings()
        self._ignore_index = ignore_index
        self._one_large = threading.Lock()  # whose memory is bounded, but not small
        self._succeeded = self._failed = 0

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        columns = {name: table[name].to_pylist() for name in _DECODED.names if name != "pixels"}
        pixels = table["pixels"]
        rows: list[dict[str, Any]] = []
        buckets: dict[tuple[int, int], list[int]] = {}
        large: list[int] = []
        for index, status in enumerate(columns["status"]):
            if status == "ok" and columns["address"][index] is not None:
                large.append(index)
            elif status == "ok":
                shape = columns["network_height"][index], columns["network_width"][index]
                buckets.setdefault(shape, []).append(index)
            else:
                rows.append(_common_fields(columns, index))
        size = 0
        key = part_key("label", table["id"].to_numpy())
        careful, crashed = self._attempts.begin(key) >= PART_DEATHS, False
        for (height, width), members in sorted(buckets.items()):
            for chosen in _batched(members, self._labeller.batch_size):
                batch = [
                    np.frombuffer(pixels[index].as_buffer(), np.uint8).reshape(height, width, 3)
                    for index in chosen
                ]
                sizes = [(columns["height"][index], columns["width"][index]) for index in chosen]
                start = time.perf_counter()
                outcomes: Sequence[Prediction | Exception | None]
                if careful:
                    ids = [columns["id"][index] for index in chosen]
                    outcomes = [self._alone(*one) for one in zip(ids, batch, sizes, strict=True)]
                else:
                    with self._turns.together():
                        outcomes = self._outcomes(batch, sizes)
                label_s = (time.perf_counter() - start) / len(chosen)
                for index, outcome in zip(chosen, outcomes, strict=True):
                    row = _common_fields(columns, index) | {"label_s": label_s, "batches": 1 / len(chosen)}
                    if isinstance(outcome, Prediction):
                        row["labels"] = outcome.labels.tobytes()
                        row["confidence"] = outcome.confidence.tobytes()
                        row["segment_agreement"] = outcome.agreement
                        size += len(row["labels"]) + len(row["confidence"])
                    elif outcome is None:
                        row |= crashed_row("label")
                        crashed = True
                    else:
                        row |= {
                            "status": "label_failed",
                            "error": f"{type(outcome).__name__}: {outcome}"[:500],
                        }
                    rows.append(row)
                if size >= _CHUNK_BYTES:
                    yield pa.Table.from_pylist(rows, schema=_LABELLED)
                    rows, size = [], 0
        if rows and large:
            yield pa.Table.from_pylist(rows, schema=_LABELLED)
            rows = []
        for index in large:
            start = time.perf_counter()
            row = _common_fields(columns, index)
            place = (columns["address"][index], columns["offset"][index] or 0, columns["length"][index])
            with self._one_large:
                row |= self._large_alone(columns["id"][index], *place) if careful else self._large(*place)
            crashed |= row["status"] == CRASHED
            row |= {"label_s": time.perf_counter() - start, "batches": 1.0}
            done = pa.Table.from_pylist([row], schema=_LABELLED)
            del row  # its maps may take hundreds of megabytes
            yield done
        if not crashed:
            self._attempts.end(key)
        if rows:
            yield pa.Table.from_pylist(rows, schema=_LABELLED)

    def _large_alone(self, row_id: int, *place: Any) -> dict[str, Any]:
        """``_large`` for an image of a part that killed processes."""
        key = f"label {row_id}"
        with self._turns.alone():
            if self._attempts.begin(key) >= IMAGE_DEATHS:
                return crashed_row("label")
            fields = self._large(*place)
            self._attempts.end(key)
        return fields

    def _large(self, address: str, start: int, length: int | None) -> dict[str, Any]:
        """Read and label a large image in windows; the fields of its row."""
        try:
            # What reads and labels has gone when the maps are whole: their PNGs are as large.
            maps, known = self._maps(address, start, length)
            encoded = maps.finish()
            self._succeeded += 1
            return {
                **known,
                "maps": {"mask": encoded["mask"], "confidence": encoded["confidence"]},
                "segments": encoded["segments"],
                "softmin": encoded["softmin"],
            }
        except images.ImageError as error:
            return {"status": error.code, "error": error.message}
        except OSError as error:
            return {"status": "unreadable", "error": f"{type(error).__name__}: {error}"}
        except MapTooLarge as error:
            return {"status": "too_large", "error": str(error)}
        except Exception as error:
            self._give_up(error)
            return {"status": "label_failed", "error": f"{type(error).__name__}: {error}"[:500]}

    def _maps(self, address: str, start: int, length: int | None) -> tuple[MapWriter, dict[str, Any]]:
        """Both maps of a large image, and what is known of it."""
        settings, log = self._image_settings, run_log(self._run_id)
        with (
            local_file(address, start=start, length=length) as (path, digest),
            open_picture(path, band=settings.large_window) as picture,
        ):
            height, width = picture.height, picture.width
            log.info("label: %s has %d x %d pixels: in windows", address, width, height)
            maps: MapWriter | None = None
            for strip in self._labeller.label_picture(picture, settings):
                maps = maps or MapWriter(height, width, strip.labels.dtype, ignore_index=self._ignore_index)
                maps.add(strip.labels, strip.confidence)
                log.info("label: %d rows of %s", strip.top + len(strip.labels), address)
            assert maps is not None, "an image has at least one strip"
            return maps, {"sha256": digest, "height": height, "width": width}

    def _alone(self, row_id: int, image: np.ndarray, size: tuple[int, int]) -> Prediction | Exception | None:
        """The outcome for an image of a part that killed processes; None if the image does."""
        key = f"label {row_id}"
        # Other threads would die of it as well, and would be blamed.
        with self._turns.alone():
            if self._attempts.begin(key) >= IMAGE_DEATHS:
                return None
            (outcome,) = self._outcomes([image], [size])
            self._attempts.end(key)
        return outcome

    def _outcomes(
        self, batch: list[np.ndarray], sizes: list[tuple[int, int]]
    ) -> Sequence[Prediction | Exception]:
        """A prediction or an error per image: one bad image must not fail its batch."""
        try:
            predictions = self._labeller.label(batch, sizes)
        except Exception as error:
            if len(batch) > 1:
                return [self._outcomes([image], [size])[0] for image, size in zip(batch, sizes, strict=True)]
            self._give_up(error)
            return [error]
        self._succeeded += len(batch)
        return predictions

    def _give_up(self, error: Exception) -> None:
        """Count an image that could not be labelled.

        Raises:
            MaskMillError: ``labelling_failed`` if all fail: then the images are not the cause, and a million
                of them would fail as well.
        """
        self._failed += 1
        if not self._succeeded and self._failed >= _GIVE_UP_AFTER:
            raise FailedWork(
                "labelling_failed",
                f"None of {self._failed} images could be labelled: {type(error).__name__}: {error}",
                "Correct what the error names (for lack of memory: a smaller batch_size or scale).",
            ) from error


def _common_fields(columns: dict[str, list[Any]], index: int) -> dict[str, Any]:
    row = {name: columns[name][index] for name in (*_KNOWN, "decode_s", "fetch_s")}
    return dict.fromkeys(_LABELLED.names) | row | {"label_s": 0.0, "batches": 0.0}


class Write:
    """Raw maps → a committed part of the label table, and one row of statistics.

    Args:
        storage: the output.
        run_id: this run, which must still hold the lease of the output.
        ignore_index: id of uncertain pixels.
        num_classes: C, including background.
        score: what the column ``quality`` of the table holds.
        replacing: ids of rows that are in the table, int64 (n,). Their new rows wait in ``relabelled/``.
    """

    def __init__(
        self,
        storage: Storage,
        run_id: str,
        *,
        ignore_index: int,
        num_classes: int,
        score: QualityScore = "classes",
        replacing: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.storage = storage
        self.run_id = run_id
        self.ignore_index = ignore_index
        self._score = score
        self._replacing = np.empty(0, np.int64) if replacing is None else replacing
        self._dtype = label_dtype(num_classes)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode and commit; see ``commit``."""
        return self.commit(self.encode(table))

    def encode(self, table: pa.Table) -> pa.Table:
        """Rows of the label table, and in columns of their own what they took."""
        start = time.perf_counter()
        rows = pa.Table.from_pylist([self._row(row) for row in table.to_pylist()], schema=labels.LABEL_SCHEMA)
        each = (time.perf_counter() - start) / max(1, rows.num_rows)
        for name in _SPENT[:-1]:
            rows = rows.append_column(name, table[name].combine_chunks())
        return rows.append_column(_SPENT[-1], pa.array([each] * rows.num_rows, pa.float32()))

    def commit(self, table: pa.Table) -> pa.Table:
        """Write rows from ``encode`` to as many files as ``FILE_BYTES`` asks for.

        Returns:
            One row of statistics.

        Raises:
            MaskMillError: ``output_in_use`` if another run has taken over the lease; what the storage says.
        """
        start = time.perf_counter()
        rows = table.select(labels.LABEL_SCHEMA.names)
        old = np.isin(rows["id"].to_numpy(), self._replacing)
        try:
            refuse_other_holder(self.storage, self.run_id)
            for folder, chosen in ((LABELS_DIR, ~old), (RELABELLED_DIR, old)):
                if chosen.any():
                    # ``filter`` copies the maps.
                    part = rows if chosen.all() else rows.filter(pa.array(chosen))
                    for piece in _files(part):
                        write_part(self.storage, piece, folder)
        except OSError as error:
            # Told here, while the error still knows its path.
            raise explain(error, self.storage.uri) or error from error
        write_s = time.perf_counter() - start
        spent = {name: sum(table[name].to_pylist()) for name in _SPENT}
        report: dict[str, Any] = {
            **spent,
            "done": rows.num_rows,
            "failures": [status for status in rows["status"].to_pylist() if status != labels.OK],
            "encode_s": spent["encode_s"] + write_s,
            "write_s": write_s,
            "written": rows.nbytes,
        }
        run_log(self.run_id).info("write: %d rows, %d failed", rows.num_rows, len(report["failures"]))
        return pa.Table.from_pylist([report], schema=_WRITTEN)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        known = {name: row[name] for name in ("id", "uri", "sha256", "height", "width", "version")}
        if row["status"] != labels.OK:
            return labels.failed_row(**known, status=row["status"], error=row["error"])
        if row.get("maps") is not None:
            found = quality_of(row["segments"]) if self._score == "classes" else row["softmin"]
            return labels.encoded_row(**known, **row["maps"], segments=row["segments"], quality=found)
        shape = row["height"], row["width"]
        return labels.ok_row(
            **known,
            labels=np.frombuffer(row["labels"], self._dtype).reshape(shape),
            confidence=np.frombuffer(row["confidence"], np.uint8).reshape(shape),
            ignore_index=self.ignore_index,
            agreement=row["segment_agreement"],
            score=self._score,
        )


def _files(rows: pa.Table) -> Iterator[pa.Table]:
    """Cut rows into pieces of at least ``FILE_BYTES``, or all of them."""
    size = rows.nbytes / rows.num_rows
    count = max(1, int(rows.nbytes // FILE_BYTES))
    if count == 1:
        yield rows
        return
    step = math.ceil(max(FILE_BYTES / size, rows.num_rows / count))
    for start in range(0, rows.num_rows, step):
        yield rows.slice(start, step)


def _batched(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def prefetch(
    pool: ThreadPoolExecutor,
    work: Callable[[_T], _R],
    items: Iterable[_T],
    depth: int,
    most_bytes: int = _AHEAD_BYTES,
) -> Iterator[Future[_R]]:
    """Futures of ``work`` in order, at most ``depth`` of them pending.

    Fewer are pending once a result was so large that ``depth`` of them would have more than ``most_bytes``.
    """
    waiting: deque[Future[_R]] = deque()
    source = iter(items)
    largest = 1
    while True:
        ahead = max(1, min(depth, most_bytes // largest))
        for item in itertools.islice(source, max(0, ahead - len(waiting))):
            waiting.append(pool.submit(work, item))
        if not waiting:
            return
        future = waiting.popleft()
        yield future
        if future.exception() is None:
            largest = max(largest, len(future.result()))
