"""The pictures and the page that a trained student gets: some images labelled by it, beside its teacher."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from models.device import best_device, native_precision
from pipeline.datasets.base import Dataset
from pipeline.evaluation.tables import Plan, plan
from pipeline.files import images
from pipeline.files.storage import is_remote
from pipeline.labelling.student import StudentLabeller
from pipeline.ontology.ontology import Ontology
from pipeline.report.student_page import Example, preview_sheet, student_page
from pipeline.report.training_page import PAGE, SHEET, Score, write_training_page
from pipeline.table.labels import decode_mask, iter_rows
from pipeline.table.record import read_table_record
from pipeline.trained.student import StudentRecord
from pipeline.training.samples.table import class_ids

EXAMPLES = 12
_LOOKED_AT = 400  # rows of a table that examples are chosen from: a table may hold millions


def write_pages(
    record: StudentRecord,
    lines: Sequence[Mapping[str, Any]],
    *,
    labels: str,
    truth: Dataset | None = None,
    scores: Sequence[Score] = (),
    note: str = "",
    count: int = EXAMPLES,
) -> list[str]:
    """Write the page and the sheet beside the student.

    Args:
        record: of the student.
        lines: of ``metrics.jsonl``.
        labels: label table to take images and the teacher's labels from.
        truth: of the same images, where it is known.
        scores: see ``pipeline.report.training_page``.
        note: see there.
        count: images to show.

    Returns:
        The files, the page last; none where the student is not in a local folder.
    """
    if is_remote(record.uri):
        return []
    examples = find_examples(record, labels=labels, truth=truth, count=count)
    folder, written = Path(record.uri), []
    if examples:
        toy = record.teacher["weights"]["model"] == "toyclip"
        sheet = preview_sheet(
            examples, names=record.ontology.names, palette=record.ontology.palette(),
            caption="toy world: a student trained on pseudo-labels of the bundled toy CLIP" if toy else "",
        )  # fmt: skip
        sheet.save(folder / SHEET)
        written.append(str(folder / SHEET))
    page = student_page(record, examples, scores=scores, note=note, commands=student_commands(record.uri))
    return [*written, str(write_training_page(folder / PAGE, page, lines))]


def student_commands(output: str) -> dict[str, str]:
    """What to do with a student, by purpose."""
    folder = shlex.quote(output)
    return {
        "Label with it": f"maskmill label --model {folder} --images DIR --output OUT",
        "Measure it": f"maskmill evaluate --model {folder} --dataset NAME --root DIR",
        "See it": f"maskmill serve --model {folder}",
    }


def find_examples(record: StudentRecord, *, labels: str, truth: Dataset | None, count: int) -> list[Example]:
    """Images of a label table, the same at every call, with the teacher's, the student's and true labels.

    Images that cannot be read any more are passed over.
    """
    rows = []
    for row in iter_rows(labels, ["id", "uri", "status", "sha256", "mask"]):
        if row["status"] == "ok":
            rows.append(row)
        if len(rows) == _LOOKED_AT:
            break
    rows.sort(key=lambda row: hashlib.sha256(PurePosixPath(row["uri"]).name.encode()).digest())
    true_rows: Plan | None = plan(labels, truth.samples) if truth is not None else None
    teacher = _teacher_ids(labels, record.ontology)
    true = None
    if truth is not None:
        true = class_ids(truth.class_names, record.ontology, truth.ignore_index)
    labeller = StudentLabeller(
        uri=record.uri,
        thresholds=[0.0] * record.ontology.num_classes,
        precision=native_precision(best_device()),
        batch_size=1,
        ignore_index=record.ontology.ignore_index,
    )
    found: list[Example] = []
    for row in rows:
        if len(found) == count:
            break
        sample = true_rows.samples.get(row["id"]) if true_rows is not None else None
        if true_rows is not None and sample is None:
            continue
        try:
            data = images.fetch(row["uri"])
            if hashlib.sha256(data).digest() != row["sha256"]:
                continue
            image = images.decode(data, max_pixels=record.labelling.max_pixels)
        except images.ImageError:
            continue
        height, width = image.shape[:2]
        settings = record.labelling
        size = images.target_size(height, width, scale=settings.scale, keep_ratio=settings.keep_ratio)
        seen = images.resize(image, size, method=settings.resize)
        found.append(
            Example(
                PurePosixPath(row["uri"]).name,
                image,
                _shown(teacher[decode_mask(row["mask"]["bytes"])]),
                labeller.label([seen], [(height, width)])[0].labels,
                _shown(true[truth.truth(sample)])
                if truth is not None and true is not None and sample is not None
                else None,
            )
        )
    return found


def _teacher_ids(labels: str, ontology: Ontology) -> np.ndarray:
    """Ids of the table → ids of the student, as in training; what the student does not know is negative."""
    known = Ontology.from_record(read_table_record(labels)["ontology"])
    return class_ids(known.names, ontology, known.ignore_index, words=known.prompts())


def _shown(ids: np.ndarray) -> np.ndarray:
    """Ids for a picture: what is no class becomes 65535, which has no colour."""
    return np.where(ids < 0, 65535, ids).astype(np.uint16)
