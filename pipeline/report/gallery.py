"""The gallery of a label table: ``maskmill show``.

A self-contained HTML file: pictures are inline JPEGs, and a content security policy keeps the browser from
loading anything else. Statistics cover the whole table, read as a stream; pictures show a limited number of
rows, labelled and failed.

Shape letters: H W pixels of the image, T U pixels of its thumbnail.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from models.errors import WrongUse
from models.files import write_file
from pipeline.files.fetch import fetch
from pipeline.files.images import ERROR_CODES, ImageError, decode
from pipeline.files.storage import Storage, open_storage
from pipeline.ontology.palette import palette
from pipeline.report.gallery_filter import Only, has_class, show_command
from pipeline.report.page import page_path, render
from pipeline.report.pictures import jpeg_uri, overlay_borders, viridis
from pipeline.table import labels
from pipeline.table.record import TableRecord, find_table_record
from pipeline.table.statistics import quality as quality_of
from pipeline.table.statistics import segments as segments_of
from pipeline.table.viewed import iter_viewed, shown_maps
from pipeline.table.views import TableView

#: Which rows to show, and in which order: a sample by id, or the lowest or highest label quality.
Order = Literal["sample", "worst", "best"]

_COLUMNS = (
    "id", "uri", "sha256", "height", "width", "status", "error", "mask", "confidence", "segments", "quality"
)  # fmt: skip
# Up to this many classes the legend is fully open; the rest is folded.
_LEGEND = 24
_SHAPES = 0.7, 2.4
"""Width per height of a picture's place in the grid; narrower and wider ones leave some of it empty."""
_CHIPS = 6
_READERS = 16


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
    view: TableView | None = None,
    only: Only | None = None,
) -> Path:
    """Write a page that shows a label table.

    Reads the images again from their URIs. If that fails, or a file has changed since labelling, the page
    shows only its labels.

    Args:
        table: the output of a labelling run.
        output: the HTML file to write; replaced atomically.
        limit: how many labelled images to show, each of about 0.1 MB, in the file and in memory; and at most
            as many that failed, of every code.
        order: which rows to show; see :data:`Order`. The page itself can sort its rows.
        thumbnail: long side of the pictures in pixels.
        view: show the labels as this view has them; all masks are then read once more, for the statistics.
        only: show rows that are so; the statistics are those of the whole table.

    Returns:
        The path of the page.

    Raises:
        MaskMillError: ``input_missing``, ``table_damaged`` or ``wrong_use``.
    """
    path = page_path(output)
    if limit < 0:
        raise WrongUse("wrong_use", f"{limit} images cannot be shown.", "Give 0 or more.")
    if order not in get_args(Order):
        raise WrongUse("wrong_use", f"No order {order!r}.", f"One of: {', '.join(get_args(Order))}.")
    storage = table if isinstance(table, Storage) else open_storage(table)
    if not labels.table_files(storage)[1]:
        raise WrongUse(
            "input_missing",
            f"There is no label table in {storage.uri}.",
            "Give the --output of a finished maskmill label, or run that first.",
        )
    record = find_table_record(storage)
    noted: _Noted | None = None if view is None else ({}, set())
    named = view.ontology if view is not None else None if record is None else record.ontology
    asked = -1
    if only is not None and only.name is not None and named is not None and only.name in named.names:
        asked = named.names.index(only.name)
    summary = _summarised(storage, view, noted, asked)
    legend = _legend(record, summary, view)
    if only is not None:
        only.check(legend.names, summary["status"])
    codes = len(summary["status"].keys() - {labels.OK})
    cards = [
        _card(row, legend, thumbnail, view) if row["status"] == labels.OK else _failed_card(row)
        for row in _chosen_rows(storage, limit, order, codes=codes, noted=noted, only=only, asked=asked)
    ]
    on_page = Counter(number for card in cards for number in card["classes"].split())
    page = render(
        "gallery.html",
        title=_title(record, view),
        place=storage.uri,
        summary=summary,
        facts=_facts(record, summary)
        + _view_facts(view)
        + ([] if only is None else [("shown", only.described())]),
        command=show_command(storage.uri),
        notice=_notice(record),
        coverage=_coverage(summary, legend, on_page),
        open_rows=_LEGEND,
        ignored=_share(summary["ignored_pixels"], summary["pixels"]),
        failures=_failures(summary),
        statuses=summary["status"].items(),
        cards=cards,
        mean_shape=f"{np.mean([float(card['shape']) for card in cards] or [1]):.4g}",
        order=order,
    )
    write_file(path, page.encode())
    return path


# --- the whole table ---


_Noted = tuple[dict[int, float], set[int]]
"""Of a view: the quality of each image by id, and the ids of those that have the class that is asked for."""


def _summarised(storage: Storage, view: TableView | None, noted: _Noted | None, asked: int) -> dict[str, Any]:
    """Summary of the table; notes what a view changes of each image."""
    if view is None or noted is None:
        return _counted(storage) or labels.summarise(storage)
    qualities, members = noted

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in iter_viewed(storage, ["id", *labels.Counts.COLUMNS], view):
            ids = batch["id"].to_pylist()
            qualities.update(zip(ids, batch["quality"].to_pylist(), strict=True))
            if asked >= 0:
                members.update(np.array(ids)[has_class(batch["segments"], asked)].tolist())
            yield batch

    return labels.summarise_batches(batches(), storage)


def _counted(storage: Storage) -> dict[str, Any] | None:
    """The summary in ``dataset.json``, if it is of as many rows as there are; None if it must be made."""
    record = find_table_record(storage)
    if record is None or not set(labels.Counts().to_dict()) <= set(record.counts):
        return None
    folder, names = labels.table_files(storage)

    def rows(name: str) -> int:
        with labels.open_part(folder, name, ["id"]) as file:
            return int(file.metadata.num_rows)

    with ThreadPoolExecutor(_READERS) as pool:
        return dict(record.counts) if sum(pool.map(rows, names)) == record.counts["images"] else None


def _legend(record: TableRecord | None, summary: dict[str, Any], view: TableView | None) -> Legend:
    """Names and colours from the view or ``dataset.json``; without them, numbers and default colours."""
    ontology = view.ontology if view is not None else record.ontology if record is not None else None
    if ontology is not None:
        return Legend(ontology.names, ontology.palette(), ontology.ignore_index)
    count = 1 + max((int(i) for i in summary["class_pixels"]), default=-1)
    return Legend(tuple(f"class {i}" for i in range(count)), palette([None] * count), 255)


def _title(record: TableRecord | None, view: TableView | None) -> str:
    """The ontology's name, or its classes if they came from the command line."""
    if record is None:
        return "Labels"
    ontology = record.ontology if view is None else view.ontology
    if ontology.name != "classes":
        return ontology.name
    words = [entry.name for entry in ontology.classes]
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


def _view_facts(view: TableView | None) -> list[tuple[str, str]]:
    return [("view", "; ".join(view.view.described()))] if view is not None else []


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


def _coverage(summary: dict[str, Any], legend: Legend, on_page: Counter[str]) -> list[dict[str, Any]]:
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
            "shown": on_page[i],
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


def _chosen_rows(
    storage: Storage, limit: int, order: Order, *, codes: int, **which: Any
) -> Iterator[dict[str, Any]]:
    """The rows to show, in order, failed ones last; reads masks only from row groups that contain one."""
    if limit == 0:
        return
    places = _places(storage, limit, order, failed=max(1, limit // max(1, codes)), **which)
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


_Place = tuple[float, int, int, int, int]
"""Rank, id (breaks ties independently of files), file, row group, row."""


def _places(
    storage: Storage,
    limit: int,
    order: Order,
    *,
    failed: int,
    noted: _Noted | None,
    only: Only | None,
    asked: int,
) -> list[_Place]:
    """Where the rows to show are: ``limit`` labelled ones, then ``failed`` of each code."""
    best: dict[str, list[_Place]] = {labels.OK: []}
    folder, names = labels.table_files(storage)
    by_class = only is not None and only.name is not None
    columns = ["id", "status", "quality", *(["segments"] if by_class and noted is None else [])]
    for file, name in enumerate(names):
        with (
            folder.arrow_filesystem().open_input_file(folder.path(name)) as source,
            pq.ParquetFile(source) as parquet,
        ):
            for group in range(parquet.num_row_groups):
                rows = parquet.read_row_group(group, columns=columns)
                ids = rows["id"].to_numpy()
                quality = rows["quality"].to_numpy(zero_copy_only=False)
                if noted is not None:
                    quality = np.array([noted[0][number] for number in ids.tolist()], np.float64)
                codes = rows["status"].combine_chunks().dictionary_encode()
                of_code = codes.indices.to_numpy(zero_copy_only=False)
                kept = np.ones(len(ids), np.bool_)
                if only is not None:
                    if by_class:
                        kept = (
                            np.isin(ids, [*noted[1]])
                            if noted is not None
                            else has_class(rows["segments"].combine_chunks(), asked)
                        )
                    known = np.array(codes.dictionary.to_pylist(), object)[of_code]
                    kept = only.keep(known, quality, kept)
                for code, status in enumerate(codes.dictionary.to_pylist()):
                    at = np.flatnonzero((of_code == code) & kept)
                    ranks = _ranks(ids[at], quality[at], order if status == labels.OK else "sample")
                    most = limit if status == labels.OK else failed
                    first = np.lexsort((ids[at], ranks))[:most]
                    found = zip(
                        ranks[first].tolist(), ids[at][first].tolist(), at[first].tolist(), strict=True
                    )
                    places = [(rank, number, file, group, row) for rank, number, row in found]
                    best[status] = heapq.nsmallest(most, [*best.get(status, ()), *places])
    statuses = sorted(best, key=lambda code: (code != labels.OK, code))
    return [place for status in statuses for place in best[status]]


def _ranks(ids: NDArray[np.int64], quality: NDArray[np.floating[Any]], order: Order) -> NDArray[np.float64]:
    """Sort keys of rows (N,); the smallest are shown."""
    if order == "worst":
        return quality.astype(np.float64)
    if order == "best":
        return -quality.astype(np.float64)
    # A hash of the id gives the same sample however the table is split into files.
    mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(11)).astype(np.float64)


# --- one image ---


def _card(row: dict[str, Any], legend: Legend, thumbnail: int, view: TableView | None) -> dict[str, Any]:
    """The template's values for a labelled row."""
    mask, confidence = shown_maps(row["mask"]["bytes"], row["confidence"]["bytes"], view)
    # Segments are counts of the whole map; those of a view of a large image are counts of the sample.
    pixels = row["height"] * row["width"] if view is None else mask.size
    if view is not None:
        row = row | {
            "segments": segments_of(mask, confidence, ignore_index=legend.ignore_index),
            "quality": quality_of(confidence, mask, ignore_index=legend.ignore_index),
        }
    size = thumbnail_size((row["height"], row["width"]), thumbnail)
    small = _nearest(mask, size)
    photo, reason = _photo(row, size)
    area = sum(segment["area"] for segment in row["segments"])
    segments = sorted(row["segments"], key=lambda s: (-s["area"], s["class_id"]))
    chips = [
        {
            "name": legend.names[s["class_id"]],
            "color": legend.css(s["class_id"]),
            "area": s["area"],
            "share": _share(s["area"], pixels),
            "confidence": f"{s['mean_confidence']:.2f}",
        }
        for s in segments
    ]
    said = ", ".join(f"{chip['name']} {chip['share']}" for chip in chips[:_CHIPS]) or "nothing labelled"
    return {
        **_common(row),
        "width": row["width"],
        "height": row["height"],
        "shape": f"{min(max(size[1] / size[0], _SHAPES[0]), _SHAPES[1]):.4g}",
        "classes": " ".join(str(s["class_id"]) for s in segments),
        "chips": chips,
        "said": said,
        "quality": float(row["quality"]),
        "unsure": _share(pixels - area, pixels) if area < pixels else "",
        "unsure_area": pixels - area,
        "photo": None if photo is None else jpeg_uri(photo),
        "reason": reason,
        "overlay": jpeg_uri(overlay_borders(small, photo, legend.colors)),
        "certain": jpeg_uri(_certainty(_area(confidence, size), small == legend.ignore_index)),
    }


def _failed_card(row: dict[str, Any]) -> dict[str, Any]:
    """The template's values for a row without labels."""
    return {**_common(row), "shape": "1", "classes": "", "chips": [], "quality": None, "reason": row["error"]}


def _common(row: dict[str, Any]) -> dict[str, Any]:
    name = unquote(row["uri"]).rstrip("/").rsplit("/", 1)[-1]
    return {"name": name, "uri": row["uri"], "status": row["status"]}


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
