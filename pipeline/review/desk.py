"""What a reviewer works on: the images of a queue, their labels, and what is saved of them.

Shapes: H W pixels of an image.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, cast
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.errors import FailedWork, WrongUse
from pipeline.evaluation.truth import find_truth
from pipeline.files.storage import Storage, open_storage
from pipeline.ontology.ontology import Ontology
from pipeline.report.pictures import overlay_borders
from pipeline.review.agreement import Agreement, agreement
from pipeline.review.queue import Entry, Queue
from pipeline.review.saving import Decision, Saved, Saves
from pipeline.table.changed import Images
from pipeline.table.embedding import read_labelled
from pipeline.table.labels import OK, decode_mask, table_files
from pipeline.table.record import read_table_record
from pipeline.table.rows import Place, find_rows, images_of, read_row
from pipeline.table.statistics import Labels

SHOWN_SIDE: Final = 2048
"""Long side of an image on the page, in pixels; masks keep their size."""
THUMBNAIL: Final = 320
_ROW = ("id", "uri", "sha256", "status", "height", "width", "mask", "segments", "version")


@dataclass(frozen=True)
class Desk:
    """An opened queue; see ``open_desk``. Thread-safe.

    Attributes:
        queue: the images, in order.
        ontology: classes of the table.
        saves: what people said.
    """

    queue: Queue
    ontology: Ontology
    saves: Saves
    _folder: Storage
    _places: dict[int, Place]
    _images: Images
    _entries: dict[int, Entry] = field(repr=False)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The images that the table still has."""
        return tuple(entry for entry in self.queue.entries if entry.id in self._places)

    def row(self, row_id: int) -> dict[str, Any]:
        """The row of an image of the queue.

        Raises:
            MaskMillError: ``name_unknown`` if it is not in the queue; ``input_missing`` if its row has no
                labels any more.
        """
        place = self._places.get(row_id)
        if place is None:
            raise WrongUse(
                "name_unknown", f"There is no image {row_id} in this queue.", "Load the page again."
            )
        try:
            row = read_row(self._folder, place, _ROW)
        except IndexError:
            row = {"id": None}
        if row["id"] != row_id or row["status"] != OK:
            raise FailedWork(
                "input_missing",
                "The label table has changed since this queue was opened.",
                "Start maskmill serve --review again. What is saved is safe.",
            )
        return row

    def labels(self, row: dict[str, Any]) -> Labels:
        """Labels (H, W) of a row, as the table has them."""
        return decode_mask(row["mask"]["bytes"])

    def picture(self, row: dict[str, Any], side: int = SHOWN_SIDE) -> npt.NDArray[np.uint8]:
        """The image, (h, w, 3), with a long side of at most ``side``.

        Raises:
            MaskMillError: ``input_missing`` if it is not there as it was labelled.
        """
        image = read_labelled(row, self._images)
        if isinstance(image, str):
            raise FailedWork("input_missing", f"The image cannot be shown: {image}.", "Put it back.")
        return _within(image, side)

    def thumbnail(self, row: dict[str, Any], saved: Saved | None) -> npt.NDArray[np.uint8]:
        """Labels over the image, (h, w, 3): those that were saved, else those of the table."""
        labels = self.labels(row) if saved is None or saved.mask is None else decode_mask(saved.mask)
        image = read_labelled(row, self._images)
        photo = None if isinstance(image, str) else _within(image, THUMBNAIL)
        factor = min(1.0, THUMBNAIL / max(labels.shape))
        size = (
            photo.shape[:2]
            if photo is not None
            else tuple(max(1, round(length * factor)) for length in labels.shape)
        )
        rows = ((np.arange(size[0]) + 0.5) * labels.shape[0] / size[0]).astype(np.intp)
        columns = ((np.arange(size[1]) + 0.5) * labels.shape[1] / size[1]).astype(np.intp)
        return overlay_borders(labels[rows[:, None], columns[None, :]], photo, self.ontology.palette())

    def save(
        self, row_id: int, decision: Decision, mask: bytes | None, *, reviewer: str, follows: str | None
    ) -> Saved:
        """Save what a person says of an image; see ``pipeline.review.saving.Saves.save``.

        Args:
            row_id: of the image.
            decision: what was said.
            mask: painted labels; see ``encode_page_mask``. Only of a painting.
            reviewer: who.
            follows: tag of the save that this one replaces.

        Raises:
            MaskMillError: ``mask_invalid`` for a mask of another size, or with values that are no class.
        """
        if (mask is not None) != (decision == "painted"):
            raise WrongUse(
                "mask_invalid",
                "A mask belongs to what is painted, and to nothing else.",
                "Send decision and mask together.",
            )
        row = self.row(row_id)
        labels: Labels | None = None
        if decision == "accepted":
            labels = self.labels(row)
        elif mask is not None:
            labels = decode_page_mask(mask, (row["height"], row["width"]), self.ontology)
        return self.saves.save(
            row,
            decision,
            labels,
            reviewer=reviewer,
            follows=follows,
            ignore_index=self.ontology.ignore_index,
        )

    def agreement(self) -> list[Agreement]:
        """How well reviewers agree with the truth of the honeypots that they have seen."""
        known = [entry.id for entry in self.entries if entry.known]
        if self.queue.truth is None or not known:
            return []
        truth = find_truth(self.queue.truth, open_storage(self.queue.table), self.ontology)
        saves = self.saves.read_all(row_id for row_id in known if row_id in truth.places)
        shown = {row_id: self.labels(self.row(row_id)) for row_id in saves}
        return agreement(truth, saves, shown, acceptable=self.queue.acceptable)


def open_desk(queue: Queue) -> Desk:
    """Open a queue, and make its table of corrections if there is none.

    Raises:
        MaskMillError: ``input_missing``, ``table_damaged``; ``output_differs``; ``file_damaged`` if none of
            its images is in the table.
    """
    record = read_table_record(queue.table)
    table = open_storage(queue.table)
    ids = [entry.id for entry in queue.entries]
    places = find_rows(table, ids)
    if ids and not places:
        raise WrongUse(
            "file_damaged",
            f"{queue.table} has none of the {len(ids):,} images of this queue.",
            f"Make the queue anew: maskmill review {queue.table} --overwrite",
        )
    saves = Saves(open_storage(queue.corrections))
    saves.begin(record.ontology, table.uri)
    entries = {entry.id: entry for entry in queue.entries}
    return Desk(queue, record.ontology, saves, table_files(table)[0], places, images_of(table, ids), entries)


def image_name(uri: str) -> str:
    """What an image is called on a page."""
    return unquote(uri).rstrip("/").rsplit("/", 1)[-1]


def _within(image: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    factor = side / max(image.shape[:2])
    if factor >= 1:
        return image
    size = [max(1, round(length * factor)) for length in image.shape[1::-1]]
    return np.asarray(Image.fromarray(image).resize((size[0], size[1]), Image.Resampling.BOX))


# --- masks between server and page ---


def encode_page_mask(labels: Labels) -> bytes:
    """Labels (H, W) as the page reads them: ids as 16 bits, little-endian, row by row, then gzip.

    Not a picture: against fingerprinting, some browsers change the pixels that a page reads from one.
    """
    return gzip.compress(labels.astype("<u2").tobytes(), compresslevel=1, mtime=0)


def decode_page_mask(data: bytes, size: tuple[int, int], ontology: Ontology) -> Labels:
    """Inverse of ``encode_page_mask``, of a page that is not trusted.

    Args:
        data: the compressed ids.
        size: the expected (H, W).
        ontology: its ids and the ignore index are valid.

    Raises:
        MaskMillError: ``mask_invalid``.
    """
    wanted = 2 * size[0] * size[1]
    stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        raw = stream.decompress(data, wanted + 1)
    except zlib.error as error:
        raise _bad_mask(f"it is not compressed as it should be ({error})") from None
    if len(raw) != wanted or not stream.eof:
        raise _bad_mask(f"it has not the {size[0]} x {size[1]} pixels of the image")
    ids = np.frombuffer(raw, "<u2").reshape(size)
    strange = ids[(ids >= ontology.num_classes) & (ids != ontology.ignore_index)]
    if strange.size:
        raise _bad_mask(f"it has the value {int(strange[0])}, which is no class")
    return cast(Labels, ids.astype(ontology.mask_dtype))


def _bad_mask(why: str) -> WrongUse:
    return WrongUse("mask_invalid", f"The mask was not saved: {why}.", "Load the page again, and paint anew.")


def counted(saves: Iterable[Saved]) -> dict[str, int]:
    """How many images were accepted, rejected and painted."""
    counts = dict.fromkeys(("accepted", "rejected", "painted"), 0)
    for saved in saves:
        counts[saved.decision] += 1
    return counts
