"""One page about a training run: how it went, and the student's labels beside its teacher's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.report import plots
from pipeline.report.page import put_in_place, render
from pipeline.report.sheet import colorize, contact_sheet, overlay

SHOWN = 6
"""Examples on the sheet; the page shows all of them."""
_THUMBNAIL = 320
# Figures of metrics.jsonl that get a curve, in this order; others stay in the file.
_CURVES = {
    "loss": "loss",
    "agreement": "agreement with the teacher",
    "guessed": "share of pixels with a label",
    "guess_confidence": "mean confidence of the guesses",
    "drift": "drift of the predicted classes",
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


@dataclass(frozen=True)
class Score:
    """Figures of one model on one set of images, to be shown beside those of others.

    Attributes:
        name: of the model.
        miou: mean IoU, 0 to 1.
        ious: of each class, None where it is undefined.
    """

    name: str
    miou: float
    ious: Sequence[float | None]


def write_training_page(
    path: Path,
    *,
    record: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    examples: Sequence[Example],
    names: Sequence[str],
    palette: np.ndarray,
    scores: Sequence[Score] = (),
    note: str = "",
) -> Path:
    """Write the page; an older one is replaced once the new one is whole.

    Args:
        path: of the HTML file.
        record: content of ``student.json``.
        lines: of ``metrics.jsonl``.
        examples: images to show.
        names: of the C classes.
        palette: uint8 (C, 3).
        scores: of the teacher first, then of the student, where truth is known.
        note: a sentence about the examples and scores.
    """
    training = record["training"]
    page = render(
        "training.html",
        title=f"Student of {record['teacher']['weights']['model']}",
        toy=record["teacher"]["weights"]["model"] == "toyclip",
        stopped=training.get("stopped"),
        tiles=_tiles(record, scores),
        examples=[_card(example, palette) for example in examples],
        columns=[
            "image",
            *(["truth"] if any(e.truth is not None for e in examples) else []),
            "teacher",
            "student",
        ],
        classes=[
            {"name": name, "color": "#{:02x}{:02x}{:02x}".format(*color)}
            for name, color in zip(names, palette.tolist(), strict=True)
        ],
        scores=scores,
        gains=_gains(scores, names),
        curves=_curves(lines, record["recipe"]),
        note=note,
        settings=_settings(record),
    )
    put_in_place(path, page)
    return path


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


def _tiles(record: Mapping[str, Any], scores: Sequence[Score]) -> list[tuple[str, str]]:
    training = record["training"]
    tiles = [(f"mIoU of the {score.name}", f"{100 * score.miou:.1f}") for score in scores]
    tiles.append(("steps", f"{training['iterations']:,}"))
    if training.get("seconds"):
        tiles.append(("time of training", f"{training['seconds'] / 60:.1f} min"))
    if training.get("samples_per_second"):
        tiles.append(("crops/s", f"{training['samples_per_second']:.1f}"))
    parts = dict.fromkeys((record["config"]["decoder"], record["config"]["backbone"]))
    tiles.append(("student", ", ".join(parts)))
    return tiles


def _card(example: Example, palette: np.ndarray) -> dict[str, Any]:
    maps = [example.truth] if example.truth is not None else []
    pictures = [example.image] + [
        _over(example.image, labels, palette) for labels in [*maps, example.teacher, example.student]
    ]
    captions = ["image", *(["truth"] if maps else []), "teacher", "student"]
    return {
        "name": example.name,
        "pictures": [
            {"caption": caption, "uri": uri, "width": width, "height": height}
            for caption, picture in zip(captions, pictures, strict=True)
            for uri, width, height in [plots.picture_uri(_large(picture), longest=_THUMBNAIL)]
        ],
    }


def _large(picture: np.ndarray) -> np.ndarray:
    """Small pictures enlarged by a whole factor, so that browsers do not blur them."""
    factor = _THUMBNAIL // max(picture.shape[:2])
    return picture.repeat(factor, 0).repeat(factor, 1) if factor > 1 else picture


def _over(image: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    known = (labels < len(palette))[..., None]
    grey = np.repeat(image.mean(2, keepdims=True), 3, axis=2)
    return np.where(known, overlay(grey, labels, palette, opacity=0.75), colorize(labels, palette)).astype(
        np.uint8
    )


def _gains(scores: Sequence[Score], names: Sequence[str]) -> list[dict[str, Any]]:
    """One row a class: IoU of each model, and what the last one gained over the first."""
    if not scores:
        return []
    rows = []
    for index, name in enumerate(names):
        values = [score.ious[index] for score in scores]
        first, last = values[0], values[-1]
        gain = last - first if first is not None and last is not None and len(values) > 1 else None
        rows.append({"name": name, "values": values, "gain": gain})
    return rows


def _curves(lines: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    ends = [span[1] for key, span in recipe.get("selftrain", {}).items() if key == "guided" and span[1] > 0]
    curves = []
    for key, title in _CURVES.items():
        points = [
            plots.Point(float(line["step"]), float(line[key]))
            for line in lines
            if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])
        ]
        if len(points) > 1:
            curves.append({"title": title, "chart": plots.trace(points, label=title, marks=ends)})
    return curves


def _settings(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    from pipeline.tracking.names import flatten

    shown = {
        "recipe": record["recipe"],
        "teacher": record["teacher"]["weights"],
        "versions": record["versions"],
    }
    return sorted(flatten(shown).items())
