"""How right a whole table is, by a few images with truth and the quality that all images have."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse
from pipeline.evaluation.truth import Truth
from pipeline.files.storage import Storage
from pipeline.metrics.confusion import confusion_matrix, mean_iou
from pipeline.table.labels import OK, decode_mask, table_files
from pipeline.table.rows import find_rows, read_row
from pipeline.table.statistics import quality
from pipeline.table.viewed import decode_maps
from pipeline.table.views import TableView

LEAST = 50
"""Images with truth, from which an estimate is made."""
_READERS = 8


@dataclass(frozen=True)
class Measured:
    """Images of a table that have a truth.

    Attributes:
        quality: of each, as the table or the view has it (n,).
        miou: mean IoU of each, over the classes in its truth or its labels (n,).
    """

    quality: npt.NDArray[np.float64]
    miou: npt.NDArray[np.float64]


def measure_sample(table: Storage, truth: Truth, *, view: TableView | None = None) -> Measured:
    """Compare those labelled images of a table whose truth is known.

    Args:
        table: the label table.
        truth: of some of its images, in its classes.
        view: see the labels through it; classes of the truth are then merged as those of the labels are, and
            what it drops is ignored.

    Raises:
        MaskMillError: ``too_few_images``; ``mask_invalid``; ``table_damaged``.
    """
    places, folder = find_rows(table, truth.places), table_files(table)[0]
    columns = ["uri", "status", "mask", "quality", *(["confidence"] if view is not None else [])]
    classes = truth.num_classes if view is None else view.ontology.num_classes
    ignored = truth.ignore_index if view is None else view.ontology.ignore_index

    def measure(number: int) -> tuple[float, float] | None:
        row = read_row(folder, places[number], columns)
        if row["status"] != OK:
            return None
        true, score = truth.read(number), row["quality"]
        if view is None:
            labels = decode_mask(row["mask"]["bytes"])
        else:
            labels, sure = decode_maps(row["mask"]["bytes"], row["confidence"]["bytes"], view)
            true, score = view.lookup[true], quality(sure, labels, ignore_index=ignored)
        if labels.shape != true.shape:
            raise WrongUse(
                "mask_invalid",
                f"{row['uri']}: the true mask has {true.shape[0]} x {true.shape[1]} pixels, the labels "
                f"{labels.shape[0]} x {labels.shape[1]}.",
                "Use the masks that belong to these images; neither may have been resized.",
            )
        return score, mean_iou(confusion_matrix(true, labels, classes, ignore_index=ignored))

    with ThreadPoolExecutor(_READERS) as pool:
        measured = [one for one in pool.map(measure, sorted(places)) if one and np.isfinite(one[1])]
    if len(measured) < LEAST:
        raise WrongUse(
            "too_few_images",
            f"The truth of {len(measured):,} labelled images of {table.uri} is known in {truth.folder.uri}.",
            f"Give that of {LEAST} or more images, drawn by chance from the table: masks, a table of true "
            f"labels, or corrections of images by chance (maskmill review --random {LEAST}).",
        )
    return Measured(*np.array(measured, np.float64).T)
