"""How right a whole table is, by a few images with truth and the quality that all images have."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse
from pipeline.datasets.base import list_files
from pipeline.files.storage import open_storage
from pipeline.formats.masks import identity_ids, read_mask, relabel
from pipeline.metrics.confusion import confusion_matrix, mean_iou
from pipeline.ontology.ontology import Ontology
from pipeline.table.labels import OK, decode_mask, iter_batches, table_files
from pipeline.table.rows import find_rows, read_row

LEAST = 50
"""Images with truth, from which an estimate is made."""
_READERS = 8


@dataclass(frozen=True)
class Measured:
    """Images of a table that have a truth.

    Attributes:
        quality: of each, as the table has it (n,).
        miou: mean IoU of each, over the classes in its truth or its labels (n,).
    """

    quality: npt.NDArray[np.float64]
    miou: npt.NDArray[np.float64]


def measure_sample(table: str, truth: str, classes: Ontology) -> Measured:
    """Compare those images of a table for which there is a mask.

    Args:
        table: the label table.
        truth: folder of masks, named as the images: PNG, values are class ids of the table, its ignored ones
            are left out.
        classes: of the table.

    Raises:
        MaskMillError: ``dataset_missing`` without masks; ``image_invalid`` if two images have the name of one
            mask; ``too_few_images``; ``mask_invalid``; ``table_damaged``.
    """
    place = open_storage(truth)
    files = list_files(place, "", ".png", recursive=True)
    if not files:
        raise WrongUse(
            "dataset_missing",
            f"There are no mask PNGs in {place.uri}.",
            "Check the path. Masks are PNG files named as the images, whose values are class ids.",
        )
    masks = {PurePosixPath(name).name: place.uri_of(path) for name, path in files.items()}
    known = _rows_of(table, masks)
    places, folder = find_rows(table, known), table_files(table)[0]

    def measure(number: int) -> tuple[float, float] | None:
        row = read_row(folder, places[number], ["status", "mask", "quality"])
        if row["status"] != OK:
            return None
        mask = known[number]
        ids = identity_ids(classes.num_classes, ignore=classes.ignore_index)
        true = relabel(read_mask(mask), ids, classes=classes, where=mask)
        labels = decode_mask(row["mask"]["bytes"])
        if labels.shape != true.shape:
            raise WrongUse(
                "mask_invalid",
                f"{mask}: the mask has {true.shape[0]} x {true.shape[1]} pixels, the labels of the image "
                f"{labels.shape[0]} x {labels.shape[1]}.",
                "Use the masks that belong to these images; neither may have been resized.",
            )
        counts = confusion_matrix(true, labels, classes.num_classes, ignore_index=classes.ignore_index)
        return row["quality"], mean_iou(counts)

    with ThreadPoolExecutor(_READERS) as pool:
        measured = [one for one in pool.map(measure, sorted(known)) if one and np.isfinite(one[1])]
    if len(measured) < LEAST:
        raise WrongUse(
            "too_few_images",
            f"{len(measured):,} labelled images of {table} have a mask with classes in {place.uri}.",
            f"Give the masks of {LEAST} or more images, drawn by chance from the table.",
        )
    return Measured(*np.array(measured, np.float64).T)


def _rows_of(table: str, masks: dict[str, str]) -> dict[int, str]:
    """The mask by id of the row, matched by name of the file without its ending."""
    known: dict[int, str] = {}
    seen: set[str] = set()
    for batch in iter_batches(table, ["id", "uri"], batch_size=65_536):
        for number, uri in zip(batch["id"].to_pylist(), batch["uri"].to_pylist(), strict=True):
            name = PurePosixPath(uri).stem
            if name not in masks:
                continue
            if name in seen:
                raise WrongUse(
                    "image_invalid",
                    f"Several images of {table} are called {name}.",
                    "Leave their masks out, or estimate from images whose names differ.",
                )
            seen.add(name)
            known[number] = masks[name]
    return known
