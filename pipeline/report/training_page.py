"""The page that every training leaves: how it went, pictures of what came of it, and what to do with it.

What is trained says what is on it: ``pipeline.report.student_page``, ``pipeline.report.clipseg_page``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.report import plots
from pipeline.report.page import put_in_place, render
from pipeline.tracking.names import flatten

PAGE, SHEET = "report.html", "preview.png"
"""Names of the page and of the picture beside it."""
_THUMBNAIL = 320


@dataclass(frozen=True)
class Card:
    """Pictures of one image, side by side.

    Attributes:
        name: beneath them.
        pictures: captions and uint8 (H, W, 3); a card with fewer than others leaves its last columns empty.
    """

    name: str
    pictures: Sequence[tuple[str, np.ndarray]]


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


@dataclass(frozen=True, kw_only=True)
class TrainingPage:
    """What is on the page.

    Attributes:
        title: of the page.
        toy: whether it is about the toy world.
        training: of the record: ``iterations``, ``seconds``, ``samples_per_second``, ``data_wait``,
            ``failed_samples``, ``stopped``; all but the first may be missing.
        samples: what one of them is called, in the plural.
        tiles: figures at the top, by name.
        cards: pictures.
        note: a sentence about them.
        classes: their colours, "#rrggbb" by name.
        scores: where truth is known, of the first model that is compared to the last.
        names: of the classes in ``scores``.
        curves: titles of the figures of ``metrics.jsonl`` that are drawn, by key.
        curves_note: a sentence about them.
        marks: steps at which they have a dashed line.
        data: what was trained on, by name.
        files: what is where, by name.
        commands: what to run next, by purpose.
        settings: every setting, nested.
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
    """Write the page; an older one is replaced once the new one is whole.

    Args:
        path: of the HTML file.
        page: what is on it.
        lines: of ``metrics.jsonl``.
    """
    text = render(
        "training.html",
        page=page,
        tiles=_tiles(page),
        columns=max((len(card.pictures) for card in page.cards), default=1),
        cards=[{"name": card.name, "pictures": _pictures(card)} for card in page.cards],
        gains=_gains(page.scores, page.names),
        curves=_curves(page, lines),
        facts=[
            (title, rows)
            for title, rows in (("Data", page.data), ("Time", _time(page)), ("Where things are", page.files))
            if rows
        ],
        settings=sorted(flatten(dict(page.settings)).items()),
    )
    put_in_place(path, text)
    return path


def thousands(count: Any) -> str:
    """A number for people; anything else as it is."""
    return f"{count:,}" if isinstance(count, int) else str(count)


def _tiles(page: TrainingPage) -> list[tuple[str, str]]:
    training, tiles = page.training, [*page.tiles]
    tiles.append(("steps", f"{training['iterations']:,}"))
    if training.get("seconds"):
        tiles.append(("time of training", _duration(training["seconds"])))
    if training.get("samples_per_second"):
        tiles.append((f"{page.samples}/s", f"{training['samples_per_second']:.1f}"))
    return tiles


def _time(page: TrainingPage) -> list[tuple[str, str]]:
    training = page.training
    rows = [("steps", f"{training['iterations']:,}")]
    if training.get("seconds"):
        rows.append(("training", _duration(training["seconds"])))
        rows.append(("a step", f"{training['seconds'] / max(1, training['iterations']):.3g} s"))
    if training.get("samples_per_second"):
        rows.append((f"{page.samples} a second", f"{training['samples_per_second']:.1f}"))
    if training.get("data_wait") is not None:
        rows.append((f"waiting for {page.samples}", f"{training['data_wait']:.0%} of the time"))
    if training.get("failed_samples"):
        rows.append((f"{page.samples} that could not be loaded", f"{training['failed_samples']:,}"))
    return rows


def _duration(seconds: float) -> str:
    return f"{seconds / 60:,.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def _pictures(card: Card) -> list[dict[str, Any]]:
    return [
        {"caption": caption, "uri": uri, "width": width, "height": height}
        for caption, picture in card.pictures
        for uri, width, height in [plots.picture_uri(_large(picture), longest=_THUMBNAIL)]
    ]


def _large(picture: np.ndarray) -> np.ndarray:
    """Small pictures enlarged by a whole factor, so that browsers do not blur them."""
    factor = _THUMBNAIL // max(picture.shape[:2])
    return picture.repeat(factor, 0).repeat(factor, 1) if factor > 1 else picture


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


def _curves(page: TrainingPage, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    curves = []
    for key, title in page.curves.items():
        points = [
            plots.Point(float(line["step"]), float(line[key]))
            for line in lines
            if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])
        ]
        if len(points) > 1:
            curves.append({"title": title, "chart": plots.trace(points, label=title, marks=page.marks)})
    return curves
