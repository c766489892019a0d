"""What a student's training page shows: its labels beside its teacher's, and beside the truth if known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.report.sheet import colorize, contact_sheet, overlay
from pipeline.report.training_page import Card, Score, TrainingPage, thousands
from pipeline.trained.student import RECORD_FILE, WEIGHTS_FILE, StudentRecord

SHOWN = 6
"""Examples on the sheet; the page shows all of them."""
_CURVES = {
    "loss": "loss",
    "agreement": "agreement with the teacher",
    "guessed": "share of pixels with a label",
    "guess_confidence": "mean confidence of the guesses",
    "drift": "drift of the predicted classes",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
}


@dataclass(frozen=True)
class Example:
    """One image and what is made of it.

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
    record: StudentRecord,
    examples: Sequence[Example],
    *,
    scores: Sequence[Score] = (),
    note: str = "",
    commands: Mapping[str, str],
) -> TrainingPage:
    """The page of a student.

    Args:
        record: of the student.
        examples: images to show.
        scores: of the teacher first, then of the student, where truth is known.
        note: a sentence about the examples and scores.
        commands: what to run next, by purpose.
    """
    teacher, palette = record.teacher["weights"], record.ontology.palette()
    parts = dict.fromkeys((record.config["decoder"], record.config["backbone"]))
    guided = record.recipe.get("selftrain", {}).get("guided", (0, 0))[1]
    return TrainingPage(
        title=f"Student of {teacher['model']}",
        toy=teacher["model"] == "toyclip",
        training=record.training,
        samples="crops",
        tiles=[
            *((f"mIoU of the {score.name}", f"{100 * score.miou:.1f}") for score in scores),
            ("student", ", ".join(parts)),
        ],
        cards=[_card(example, palette) for example in examples],
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
            *((f"images: {status}", thousands(n)) for status, n in record.teacher.get("counts", {}).items()),
            ("classes", thousands(record.ontology.num_classes)),
            *([("without truth", ", ".join(unseen))] if (unseen := record.training.get("unseen")) else []),
        ],
        files=[
            ("folder", record.uri),
            ("student", f"{WEIGHTS_FILE}, {RECORD_FILE}"),
            ("curves as numbers", "metrics.jsonl"),
            ("to go on from", "checkpoints/"),
        ],
        commands=commands,
        settings={"recipe": record.recipe, "teacher": teacher, "versions": record.versions},
    )


def preview_sheet(
    examples: Sequence[Example], *, names: Sequence[str], palette: np.ndarray, caption: str
) -> Image.Image:
    """Images, truth if known, teacher and student in rows."""
    shown = examples[:SHOWN]
    rows = [("images", [example.image for example in shown])]
    if shown and all(example.truth is not None for example in shown):
        rows.append(("truth", [colorize(np.asarray(example.truth), palette) for example in shown]))
    rows.append(("teacher (pseudo-labels)", [colorize(example.teacher, palette) for example in shown]))
    rows.append(("student", [colorize(example.student, palette) for example in shown]))
    return contact_sheet(rows, names=names, palette=palette, caption=caption)


def _card(example: Example, palette: np.ndarray) -> Card:
    maps = [] if example.truth is None else [("truth", example.truth)]
    maps += [("teacher", example.teacher), ("student", example.student)]
    painted = [(caption, _over(example.image, labels, palette)) for caption, labels in maps]
    return Card(example.name, [("image", example.image), *painted])


def _over(image: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    known = (labels < len(palette))[..., None]
    grey = np.repeat(image.mean(2, keepdims=True), 3, axis=2)
    return np.where(known, overlay(grey, labels, palette, opacity=0.75), colorize(labels, palette)).astype(
        np.uint8
    )
