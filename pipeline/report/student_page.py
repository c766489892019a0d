"""The page of a student: beside its teacher, and beside the truth if that is known.

Shapes: H W pixels of an image.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from pipeline.datasets.base import Dataset
from pipeline.evaluation.tables import plan
from pipeline.files import images
from pipeline.files.fetch import fetch
from pipeline.files.storage import is_remote
from pipeline.metrics.names import percent
from pipeline.ontology.ontology import Ontology
from pipeline.report.pictures import colorize, contact_sheet, overlay
from pipeline.report.training_page import SHOWN, Card, Score, TrainingPage, shown, write_page_and_sheet
from pipeline.table.labels import is_large, iter_rows
from pipeline.table.record import read_table_record
from pipeline.table.viewed import decode_maps
from pipeline.table.views import TableView
from pipeline.trained import student as student_folder
from pipeline.trained.student import StudentRecord
from pipeline.training.samples.index import class_ids

ON_SHEET = 6
"""Images on the contact sheet."""
_CURVES = {
    "loss": "loss",
    "agreement": "agreement with the teacher",
    "guessed": "share of pixels with a label",
    "guess_confidence": "mean confidence of the guesses",
    "drift": "drift of the predicted classes",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
}
_LOOKED_AT = 400  # candidate rows for examples: a table may hold millions


@dataclass(frozen=True)
class Example:
    """An image and its labels.

    Attributes:
        name: of the image.
        image: uint8 (H, W, 3).
        teacher: integer (H, W) class ids; ids without a colour are grey.
        student: integer (H, W).
        truth: integer (H, W), None where it is not known.
    """

    name: str
    image: np.ndarray
    teacher: np.ndarray
    student: np.ndarray
    truth: np.ndarray | None = None


def student_page(
    record: StudentRecord, examples: Sequence[Example], *, scores: Sequence[Score] = (), note: str = ""
) -> TrainingPage:
    """The page of a student.

    Args:
        record: record of the student.
        examples: images to show.
        scores: of the teacher, then of the student, if truth is known.
        note: a sentence about the examples and scores.
    """
    teacher, palette = record.teacher["weights"], record.ontology.palette()
    counts = record.teacher.get("counts", {})
    parts = dict.fromkeys((record.config["decoder"], record.config["backbone"]))
    guided = record.recipe.get("selftrain", {}).get("guided", (0, 0))[1]
    return TrainingPage(
        title=f"Student of {teacher['model']}",
        toy=teacher["model"] == "toyclip",
        training=record.training,
        samples="crops",
        tiles=[
            *((f"mIoU of the {score.name}", f"{percent(score.miou)} %") for score in scores),
            ("student", ", ".join(parts)),
        ],
        cards=[_student_card(example, palette) for example in examples],
        note=note,
        classes=[
            (name, "#{:02x}{:02x}{:02x}".format(*color))
            for name, color in zip(record.ontology.names, palette.tolist(), strict=True)
        ],
        scores=scores,
        names=record.ontology.names,
        curves=_CURVES,
        curves_note="By step; the dashed line is where the student began to learn from its own guesses.",
        marks=[guided] if guided > 0 else [],
        data=[
            ("labels", str(record.teacher.get("labels", ""))),
            *([("known labels", str(known["labels"]))] if (known := record.teacher.get("known")) else []),
            *([("view of the labels", "; ".join(said))] if (said := record.teacher.get("view_says")) else []),
            *((name, shown(counts[name])) for name in ("images", "labelled", "failed") if counts.get(name)),
            ("classes", shown(record.ontology.num_classes)),
            *([("without truth", ", ".join(unseen))] if (unseen := record.training.get("unseen")) else []),
        ],
        files=[
            ("folder", record.uri),
            ("student", f"{student_folder.WEIGHTS_FILE}, {student_folder.RECORD_FILE}"),
            ("curves as numbers", "metrics.jsonl"),
            ("checkpoints to resume from", "checkpoints/"),
        ],
        commands=student_commands(record.uri),
        settings={"recipe": record.recipe, "teacher": teacher, "versions": record.versions},
    )


def student_sheet(examples: Sequence[Example], record: StudentRecord) -> Image.Image:
    """Rows of image, truth if known, teacher and student."""
    palette, chosen = record.ontology.palette(), examples[:ON_SHEET]
    toy = record.teacher["weights"]["model"] == "toyclip"
    rows = [("images", [example.image for example in chosen])]
    truths = [example.truth for example in chosen if example.truth is not None]
    if len(truths) == len(chosen):
        rows.append(("truth", [colorize(truth, palette) for truth in truths]))
    rows.append(("teacher (pseudo-labels)", [colorize(example.teacher, palette) for example in chosen]))
    rows.append(("student", [colorize(example.student, palette) for example in chosen]))
    caption = "toy world: a student trained on pseudo-labels of the bundled toy CLIP" if toy else ""
    return contact_sheet(rows, names=record.ontology.names, palette=palette, caption=caption)


def _student_card(example: Example, palette: np.ndarray) -> Card:
    maps = [] if example.truth is None else [("truth", example.truth)]
    maps += [("teacher", example.teacher), ("student", example.student)]
    painted = [(caption, overlay(example.image, labels, palette)) for caption, labels in maps]
    return Card(example.name, [("image", example.image), *painted])


def write_student_page(
    record: StudentRecord,
    lines: Sequence[Mapping[str, Any]],
    *,
    labels: str,
    truth: Dataset | None = None,
    view: TableView | None = None,
    scores: Sequence[Score] = (),
    note: str = "",
    count: int = SHOWN,
) -> list[str]:
    """Write the page and the contact sheet into the student's folder.

    Args:
        record: record of the student.
        lines: records of ``metrics.jsonl``.
        labels: label table with the images and the teacher's labels.
        truth: of the same images, if known.
        view: of the table that the student learned from.
        scores: see ``student_page``.
        note: see ``student_page``.
        count: number of images to show.

    Returns:
        The files, the page last; none if the folder is not local.
    """
    if is_remote(record.uri):
        return []
    examples = find_examples(record, labels=labels, truth=truth, view=view, count=count)
    sheet = student_sheet(examples, record) if examples else None
    return write_page_and_sheet(
        Path(record.uri), student_page(record, examples, scores=scores, note=note), sheet, lines
    )


def student_commands(output: str) -> dict[str, str]:
    """Commands for a student, by purpose."""
    folder = shlex.quote(output)
    return {
        "Label with it": f"maskmill label --model {folder} --images DIR --output OUT",
        "Measure it": f"maskmill evaluate --model {folder} --dataset NAME --root DIR",
        "See it": f"maskmill serve --model {folder}",
    }


def find_examples(
    record: StudentRecord, *, labels: str, truth: Dataset | None, view: TableView | None = None, count: int
) -> list[Example]:
    """Images of a label table with the teacher's, the student's and the true labels; deterministic.

    Skips images that can no longer be read.
    """
    from models.device import best_device, native_precision
    from pipeline.labelling.labeller import LabellerSettings
    from pipeline.labelling.student import StudentLabeller

    true_rows = plan(labels, truth.samples).samples if truth is not None else {}
    teacher = _teacher_ids(labels, record.ontology, view)
    settings = LabellerSettings(
        num_classes=record.ontology.num_classes,
        ignore_index=record.ontology.ignore_index,
        precision=native_precision(best_device()),
    )
    labeller = StudentLabeller(settings, uri=record.uri)
    found: list[Example] = []
    for row in _chosen_rows(labels):
        sample = true_rows.get(row["id"])
        image = None if truth is not None and sample is None else _image(row, record)
        if image is None:
            continue
        true = None
        if truth is not None and sample is not None:
            ids = class_ids(truth.class_names, record.ontology, truth.ignore_index)
            true = _paintable(ids[truth.truth(sample)])
        found.append(
            Example(
                PurePosixPath(row["uri"]).name,
                image,
                _paintable(teacher[decode_maps(row["mask"]["bytes"], row["confidence"]["bytes"], view)[0]]),
                labeller.label([images.fit(image, record.labelling)], [image.shape[:2]])[0].labels,
                true,
            )
        )
        if len(found) == count:
            break
    return found


def _chosen_rows(labels: str) -> list[dict[str, Any]]:
    """Labelled rows from the start of a table, in an order independent of how it was written."""
    rows = []
    for row in iter_rows(labels, ["id", "uri", "status", "sha256", "mask", "confidence"]):
        if row["status"] == "ok" and not is_large(row["mask"]["bytes"]):
            rows.append(row)
        if len(rows) == _LOOKED_AT:
            break
    return sorted(rows, key=lambda row: hashlib.sha256(PurePosixPath(row["uri"]).name.encode()).digest())


def _image(row: Mapping[str, Any], record: StudentRecord) -> np.ndarray | None:
    """The image that was labelled; None if it cannot be read or has changed."""
    try:
        data = fetch(row["uri"])
        if hashlib.sha256(data).digest() != row["sha256"]:
            return None
        return images.decode(data, max_pixels=record.labelling.max_pixels)
    except images.ImageError:
        return None


def _teacher_ids(labels: str, ontology: Ontology, view: TableView | None) -> np.ndarray:
    """Map table ids to student ids, as in training; negative for classes that the student lacks."""
    known = read_table_record(labels).ontology if view is None else view.ontology
    return class_ids(known.names, ontology, known.ignore_index, words=known.prompts())


def _paintable(ids: np.ndarray) -> np.ndarray:
    """Ids for display: negative ones become 65535, which has no colour."""
    return np.where(ids < 0, 65535, ids).astype(np.uint16)
