"""The gallery of a label table: ``maskmill show``.

A self-contained HTML file: pictures are inline JPEGs, and a content security policy keeps the browser from
loading anything else. Statistics cover the whole table, read as a stream; pictures show ``limit`` rows.

Shape letters: H W pixels of the image, T U pixels of its thumbnail.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from models.errors import WrongUse
from models.files import write_file
from pipeline.files.images import ERROR_CODES, ImageError, decode, fetch
from pipeline.files.storage import Storage, open_storage
from pipeline.ontology.palette import palette
from pipeline.report.page import render
from pipeline.report.pictures import jpeg_uri, overlay_borders, viridis
from pipeline.table import labels
from pipeline.table.record import TableRecord, find_table_record

#: Which rows to show, and in which order: a sample by id, or the lowest or highest label quality.
Order = Literal["sample", "worst", "best"]

_COLUMNS = ("id", "uri", "sha256", "height", "width", "mask", "confidence", "segments", "quality")
# Up to this many classes the legend is fully open; the rest is folded.
_LEGEND = 24
_CHIPS = 6


@dataclass(frozen=True)
class Legend:
    """Names and colours of class ids on the page."""

    names: tuple[str, ...]
    colors: NDArray[np.uint8]  # (C, 3) sRGB
    ignore_index: int

    def css(self, class_id: int) -> str:
        """The colour of a class as ``#rrggbb``."""
        red, green, blue = self.colors[class_id]
        return f"#{red:02x}{green:02x}{blue:02x}"


def write_gallery(
    table: Storage | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    limit: int = 60,
    order: Order = "sample",
    thumbnail: int = 480,
) -> Path:
    """Write a page that shows a label table.

    Reads the images again from their URIs. If that fails, or a file has changed since labelling, the page
    shows only its labels.

    Args:
        table: the output of a labelling run.
        output: the HTML file to write; replaced atomically.
        limit: how many images to show. Each takes about 0.1 MB, in the file and in memory.
        order: which rows to show; see :data:`Order`. The page itself can sort its rows.
        thumbnail: long side of the pictures in pixels.

    Returns:
        The path of the page.

    Raises:
        MaskMillError: ``table_missing``, ``table_damaged`` or ``wrong_use``.
    """
    if limit < 0:
        raise WrongUse("wrong_use", f"{limit} images cannot be shown.", "Give 0 or more.")
    if order not in get_args(Order):
        raise WrongUse("wrong_use", f"No order {order!r}.", f"One of: {', '.join(get_args(Order))}.")
    storage = table if isinstance(table, Storage) else open_storage(table)
    if not labels.table_files(storage)[1]:
        raise WrongUse(
            "table_missing",
            f"There is no label table in {storage.uri}.",
            "Give the --output of a finished maskmill label, or run that first.",
        )
    summary = labels.summarise(storage)
    record = find_table_record(storage)
    legend = _legend(record, summary)
    cards = [_card(row, legend, thumbnail) for row in _chosen_rows(storage, limit, order)]
    page = render(
        "gallery.html",
        title=_title(record),
        place=storage.uri,
        summary=summary,
        facts=_facts(record, summary),
        notice=_notice(record),
        coverage=_coverage(summary, legend),
        open_rows=_LEGEND,
        ignored=_share(summary["ignored_pixels"], summary["pixels"]),
        failures=_failures(summary),
        cards=cards,
        order=order,
    )
    path = Path(output)
    write_file(path, page.encode())
    return path


# --- the whole table ---


def _legend(record: TableRecord | None, summary: dict[str, Any]) -> Legend:
    """Names and colours from ``dataset.json``; without it, numbers and default colours."""
    if record is not None:
        ontology = record.ontology
        return Legend(ontology.names, ontology.palette(), ontology.ignore_index)
    count = 1 + max((int(i) for i in summary["class_pixels"]), default=-1)
    return Legend(tuple(f"class {i}" for i in range(count)), palette([None] * count), 255)


def _title(record: TableRecord | None) -> str:
    """The ontology's name, or its classes if they came from the command line."""
    if record is None:
        return "Labels"
    if record.ontology.name != "classes":
        return record.ontology.name
    words = [entry.name for entry in record.ontology.classes]
    return ", ".join(words[:6]) + (", …" if len(words) > 6 else "")


def _facts(record: TableRecord | None, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values at the top of the page."""
    mean = summary["mean_quality"]
    pairs = [
        ("images", f"{summary['labelled']:,}"),
        ("failed", f"{summary['failed']:,}" if summary["failed"] else ""),
        ("pixels", _short_number(summary["pixels"])),
        ("classes found", f"{len(summary['class_pixels'])}"),
        ("mean quality", "" if mean is None else f"{mean:.2f}"),
    ]
    if record is not None:
        pairs += [
            ("model", str(record.weights["model"])),
            ("weights", str(record.weights["pretrained"] or "")),
            ("recipe", str(record.recipe.get("name", ""))),
            ("precision", record.precision),
            ("labelled", (record.updated or record.created)[:10]),
        ]
    return [(word, value) for word, value in pairs if value]


def _notice(record: TableRecord | None) -> str:
    """A warning about toy or random weights, or ""."""
    if record is None:
        return ""
    if record.weights["model"] == "toyclip":
        return (
            "Toy weights: labelled by the small bundled CLIP, which knows the procedural toy world and "
            "nothing else. Numbers on this page say nothing about photographs."
        )
    if str(record.weights["pretrained"]).startswith("random:"):
        return "Random weights: these labels mean nothing. They show that the pipeline runs."
    return ""


def _coverage(summary: dict[str, Any], legend: Legend) -> list[dict[str, Any]]:
    """Each class's share of all labelled pixels, largest first, for the bars."""
    total = summary["pixels"] - summary["ignored_pixels"]
    largest = max(summary["class_pixels"].values(), default=0)
    rows = [
        {
            "id": int(i),
            "name": legend.names[int(i)],
            "color": legend.css(int(i)),
            "share": _share(area, total),
            "bar": f"{100 * area / largest:.2f}%",
            "images": summary["class_images"][i],
            "area": area,
        }
        for i, area in summary["class_pixels"].items()
    ]
    return sorted(rows, key=lambda row: (-row["area"], row["id"]))


def _failures(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "code": code,
            "count": count,
            "meaning": ERROR_CODES.get(code, ""),
            "example": summary["errors"].get(code, ""),
        }
        for code, count in summary["status"].items()
        if code != labels.OK
    ]


def _share(part: int, whole: int) -> str:
    """A percentage to display: 43 %, 2.1 %, < 0.1 %."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 0.1:
        return "< 0.1 %"
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.1f} %"


def _short_number(value: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


# --- the shown rows ---


def _chosen_rows(storage: Storage, limit: int, order: Order) -> Iterator[dict[str, Any]]:
    """The rows to show, in order; reads masks only from row groups that contain one."""
    if limit == 0:
        return
    places = heapq.nsmallest(limit, _candidates(storage, order))
    wanted: dict[tuple[int, int], dict[int, int]] = {}
    for rank, (_, _, file, group, row) in enumerate(places):
        wanted.setdefault((file, group), {})[row] = rank
    found: dict[int, dict[str, Any]] = {}
    folder, names = labels.table_files(storage)
    for (file, group), rows in wanted.items():
        with (
            folder.arrow_filesystem().open_input_file(folder.path(names[file])) as source,
            pq.ParquetFile(source) as parquet,
        ):
            start = 0
            for batch in parquet.iter_batches(16, row_groups=[group], columns=list(_COLUMNS)):
                for row in range(start, start + batch.num_rows):
                    if row in rows:
                        found[rows[row]] = batch.slice(row - start, 1).to_pylist()[0]
                start += batch.num_rows
    for rank in range(len(places)):
        yield found[rank]


def _candidates(storage: Storage, order: Order) -> Iterator[tuple[float, int, int, int, int]]:
    """Per labelled row: rank, id (breaks ties independently of files), file, row group, row."""
    folder, names = labels.table_files(storage)
    for file, name in enumerate(names):
        with (
            folder.arrow_filesystem().open_input_file(folder.path(name)) as source,
            pq.ParquetFile(source) as parquet,
        ):
            for group in range(parquet.num_row_groups):
                rows = parquet.read_row_group(group, columns=["id", "status", "quality"])
                columns = (rows.column(c).to_pylist() for c in ("id", "status", "quality"))
                for row, (number, status, quality) in enumerate(zip(*columns, strict=True)):
                    if status == labels.OK:
                        yield _rank(number, quality, order), number, file, group, row


def _rank(number: int, quality: float, order: Order) -> float:
    """Sort key of a row; the smallest are shown."""
    if order == "worst":
        return quality
    if order == "best":
        return -quality
    # A hash of the id gives the same sample however the table is split into files.
    return float((number * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) >> 11)


# --- one image ---


def _card(row: dict[str, Any], legend: Legend, thumbnail: int) -> dict[str, Any]:
    """The template's values for a row."""
    mask = labels.decode_mask(row["mask"]["bytes"])
    confidence = labels.decode_confidence(row["confidence"]["bytes"])
    size = thumbnail_size(mask.shape, thumbnail)
    small = _nearest(mask, size)
    photo, reason = _photo(row, size)
    area = sum(segment["area"] for segment in row["segments"])
    segments = sorted(row["segments"], key=lambda s: (-s["area"], s["class_id"]))
    chips = [
        {
            "name": legend.names[s["class_id"]],
            "color": legend.css(s["class_id"]),
            "share": _share(s["area"], mask.size),
            "confidence": f"{s['mean_confidence']:.2f}",
        }
        for s in segments
    ]
    said = ", ".join(f"{chip['name']} {chip['share']}" for chip in chips[:_CHIPS]) or "nothing labelled"
    return {
        "name": unquote(row["uri"]).rstrip("/").rsplit("/", 1)[-1],
        "uri": row["uri"],
        "width": row["width"],
        "height": row["height"],
        "thumb": size[::-1],
        "classes": " ".join(str(s["class_id"]) for s in segments),
        "chips": chips[:_CHIPS],
        "more": len(chips) - min(len(chips), _CHIPS),
        "said": said,
        "quality": float(row["quality"]),
        "unsure": _share(mask.size - area, mask.size) if area < mask.size else "",
        "photo": None if photo is None else jpeg_uri(photo),
        "reason": reason,
        "overlay": jpeg_uri(overlay_borders(small, photo, legend.colors)),
        "certain": jpeg_uri(_certainty(_area(confidence, size), small == legend.ignore_index)),
    }


def _photo(row: dict[str, Any], size: tuple[int, int]) -> tuple[NDArray[np.uint8] | None, str]:
    """The labelled image at thumbnail size (T, U, 3), or None and why not."""
    try:
        data = fetch(row["uri"], attempts=2)
        if row["sha256"] is not None and hashlib.sha256(data).digest() != row["sha256"]:
            return None, "the file has changed since it was labelled"
        image = decode(data)
    except ImageError as error:
        return None, ERROR_CODES[error.code]
    return _area(image, size), ""


def thumbnail_size(shape: Sequence[int], long_side: int) -> tuple[int, int]:
    """(T, U) with at most the given long side; never enlarges."""
    factor = min(1.0, long_side / max(shape))
    return max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))


def _nearest(mask: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Labels (T, U) at the centres of the thumbnail's pixels."""
    rows = ((np.arange(size[0]) + 0.5) * mask.shape[0] / size[0]).astype(np.intp)
    columns = ((np.arange(size[1]) + 0.5) * mask.shape[1] / size[1]).astype(np.intp)
    return mask[rows[:, None], columns[None, :]]


def _area(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BOX))


def _certainty(confidence: NDArray[np.uint8], ignored: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Confidence (T, U) as a heat map (T, U, 3); ignored pixels are grey."""
    heat = viridis()[confidence]
    heat[ignored] = heat[ignored] // 3 + 40
    return heat
