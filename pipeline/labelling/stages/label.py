"""The second stage: decoded images become maps of labels and confidence."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from models.errors import FailedWork
from pipeline.files.images import ImageError, ImageSettings
from pipeline.files.large.opening import local_file, open_picture
from pipeline.files.logs import run_log
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
from pipeline.labelling.labeller import Labeller, Prediction
from pipeline.labelling.stages.columns import CHUNK_BYTES, DECODED, KNOWN, LABELLED
from pipeline.table.strips import MapTooLarge, MapWriter

_GIVE_UP_AFTER = 16


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
        columns = {name: table[name].to_pylist() for name in DECODED.names if name != "pixels"}
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
                if size >= CHUNK_BYTES:
                    yield pa.Table.from_pylist(rows, schema=LABELLED)
                    rows, size = [], 0
        if rows and large:
            yield pa.Table.from_pylist(rows, schema=LABELLED)
            rows = []
        for index in large:
            start = time.perf_counter()
            row = _common_fields(columns, index)
            place = (columns["address"][index], columns["offset"][index] or 0, columns["length"][index])
            with self._one_large:
                row |= self._large_alone(columns["id"][index], *place) if careful else self._large(*place)
            crashed |= row["status"] == CRASHED
            row |= {"label_s": time.perf_counter() - start, "batches": 1.0}
            done = pa.Table.from_pylist([row], schema=LABELLED)
            del row  # its maps may take hundreds of megabytes
            yield done
        if not crashed:
            self._attempts.end(key)
        if rows:
            yield pa.Table.from_pylist(rows, schema=LABELLED)

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
        except ImageError as error:
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
    row = {name: columns[name][index] for name in (*KNOWN, "decode_s", "fetch_s")}
    return dict.fromkeys(LABELLED.names) | row | {"label_s": 0.0, "batches": 0.0}


def _batched(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
