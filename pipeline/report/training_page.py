"""The page of a training run: curves, pictures of results, and commands to run next.

What is on it for a student is in ``student_page``, for CLIPSeg and its baselines in ``clipseg_page``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.files import write_file
from pipeline.metrics.names import is_share
from pipeline.report import charts
from pipeline.report.page import render, setting, setting_rows
from pipeline.report.pictures import picture_uri

PAGE, SHEET = "report.html", "preview.png"
"""Names of the page and of the picture next to it."""
SHOWN = 12
"""Images or samples on a page."""
_THUMBNAIL = 320


@dataclass(frozen=True)
class Card:
    """Pictures of one image, side by side.

    Attributes:
        name: name below the pictures.
        pictures: captions and uint8 (H, W, 3); missing ones leave the last columns empty.
    """

    name: str
    pictures: Sequence[tuple[str, np.ndarray]]


@dataclass(frozen=True)
class Score:
    """Scores of a model on a set of images, for comparison with others.

    Attributes:
        name: of the model.
        miou: mean IoU, 0 to 1.
        ious: of each class, None where it is undefined.
    """

    name: str
    miou: float
    ious: Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class TrainingPage:
    """Content of the page.

    Attributes:
        title: heading.
        toy: whether the model is a toy.
        training: from the record: ``iterations``, ``seconds``, ``samples_per_second``, ``data_wait``,
            ``failed_samples``, ``stopped``; all but the first may be missing.
        samples: plural noun for the training samples.
        tiles: names and values at the top.
        cards: pictures.
        note: a sentence about the pictures.
        classes: names and colours ("#rrggbb").
        scores: where truth is known, from the baseline model to the newest.
        names: of the classes in ``scores``.
        curves: keys of ``metrics.jsonl`` and the titles of their charts.
        curves_note: a sentence about the charts.
        marks: steps with a dashed line in the charts.
        data: names and values of the training data.
        files: descriptions and paths of the files.
        commands: purposes and commands to run next.
        settings: all settings, nested.
    """

    title: str
    toy: bool
    training: Mapping[str, Any]
    samples: str
    tiles: Sequence[tuple[str, str]]
    cards: Sequence[Card]
    note: str = ""
    classes: Sequence[tuple[str, str]] = ()
    scores: Sequence[Score] = ()
    names: Sequence[str] = ()
    curves: Mapping[str, str]
    curves_note: str
    marks: Sequence[float] = ()
    data: Sequence[tuple[str, str]]
    files: Sequence[tuple[str, str]]
    commands: Mapping[str, str]
    settings: Mapping[str, Any]


def write_training_page(path: Path, page: TrainingPage, lines: Sequence[Mapping[str, Any]]) -> Path:
    """Write the page, replacing an older one atomically.

    Args:
        path: the HTML file.
        page: its content.
        lines: records of ``metrics.jsonl``.
    """
    curves = _curves(page, lines)
    text = render(
        "training.html",
        page=page,
        tiles=_tiles(page),
        columns=max((len(card.pictures) for card in page.cards), default=1),
        cards=[{"name": card.name, "pictures": _pictures(card)} for card in page.cards],
        gains=_gains(page.scores, page.names),
        curves=curves,
        # As few empty places in the last row as possible.
        curve_columns=min((4, 3), key=lambda columns: -len(curves) % columns),
        facts=[
            (title, rows)
            for title, rows in (("Data", page.data), ("Time", _time(page)), ("Where things are", page.files))
            if rows
        ],
        settings=setting_rows(page.settings),
    )
    write_file(path, text.encode())
    return path


def write_page_and_sheet(
    folder: Path, page: TrainingPage, sheet: Image.Image | None, lines: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Write ``SHEET``, if there is one, and ``PAGE`` into a folder; return their paths, the page last."""
    written = []
    if sheet is not None:
        sheet.save(folder / SHEET)
        written.append(str(folder / SHEET))
    return [*written, str(write_training_page(folder / PAGE, page, lines))]


def shown(value: Any) -> str:
    """A value of a record, for people: a number with thousands separators, lists and mappings in words."""
    return f"{value:,}" if type(value) is int else setting(value)


def _tiles(page: TrainingPage) -> list[tuple[str, str]]:
    training, tiles = page.training, [*page.tiles]
    tiles.append(("steps", f"{training['iterations']:,}"))
    if training.get("seconds"):
        tiles.append(("time of training", _duration(training["seconds"])))
    return tiles


def _time(page: TrainingPage) -> list[tuple[str, str]]:
    training, rows = page.training, []
    if training.get("seconds"):
        rows.append(("a step", f"{training['seconds'] / max(1, training['iterations']):.3g} s"))
    if training.get("samples_per_second"):
        rows.append((f"{page.samples} a second", f"{training['samples_per_second']:.1f}"))
    if training.get("data_wait") is not None:
        rows.append((f"waiting for {page.samples}", f"{100 * training['data_wait']:.0f} % of the time"))
    if training.get("failed_samples"):
        rows.append((f"{page.samples} that could not be loaded", f"{training['failed_samples']:,}"))
    return rows


def _duration(seconds: float) -> str:
    return f"{seconds / 60:,.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def _pictures(card: Card) -> list[dict[str, Any]]:
    return [
        {"caption": caption, "uri": uri, "width": width, "height": height}
        for caption, picture in card.pictures
        for uri, width, height in [picture_uri(_large(picture), longest=_THUMBNAIL)]
    ]


def _large(picture: np.ndarray) -> np.ndarray:
    """Enlarge small pictures by an integer factor, so that browsers do not blur them."""
    factor = _THUMBNAIL // max(picture.shape[:2])
    return picture.repeat(factor, 0).repeat(factor, 1) if factor > 1 else picture


def _gains(scores: Sequence[Score], names: Sequence[str]) -> list[dict[str, Any]]:
    """One row per class: IoU of each model, and the gain of the last over the first in points."""
    if not scores:
        return []
    rows = []
    for index, name in enumerate(names):
        values = [score.ious[index] for score in scores]
        first, last = values[0], values[-1]
        gain = 0.0 if first is None or last is None else round(100 * (last - first), 1)
        rows.append(
            {
                "name": name,
                "values": values,
                "gain": f"{gain:+.1f}" if gain else "",
                "trend": "up" if gain > 0 else "down",
            }
        )
    return rows


def _curves(page: TrainingPage, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    curves = []
    for key, title in page.curves.items():
        scale, unit = (100.0, ", %") if is_share(key) else (1.0, "")
        points = [
            charts.Point(float(line["step"]), scale * float(line[key]))
            for line in lines
            if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])
        ]
        if len(points) > 1:
            chart = charts.trace(points, label=title + unit, marks=page.marks)
            curves.append({"title": title + unit, "chart": chart})
    return curves
