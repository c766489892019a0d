"""``maskmill demo``: the main job, offline, on the embedded toy world, measured against its true maps."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from jobs import label, show
from jobs.recipes import RECIPES
from models.errors import MaskMillError
from pipeline import toyworld
from pipeline.labels import decode_mask, iter_rows
from pipeline.metrics.confusion import confusion_matrix, iou_per_class, mean_iou
from pipeline.ontology import Ontology, load_ontology
from pipeline.report.sheet import colorize, contact_sheet
from pipeline.storage import open_storage

MARKER = "made-by-maskmill-demo.txt"


def run(output: Path, *, count: int, size: int, seed: int, console: Console | None = None) -> int:
    """Make scenes, label them, compare with the truth, write the gallery, say where things are.

    Args:
        output: folder for images, truth, table and page; one of an earlier demo is made anew.
        count: number of scenes.
        size: side of a scene in pixels.
        seed: of the scenes; not among those that the bundled CLIP was trained on.
        console: where to print.

    Raises:
        MaskMillError: ``output_not_ours`` if the folder holds something else.
    """
    console = console or Console()
    images, truth, table = output / "images", output / "truth", output / "table"
    _fresh(output)
    console.print(f"Drawing {count} scenes of the toy world → {images}", highlight=False)
    _draw(images, truth, count=count, size=size, seed=seed)
    ontology = load_ontology("toyworld")
    status = label.run(
        label.LabelJob(source=str(images), ontology=ontology, recipe=RECIPES["toy"], output=str(table)),
        console,
    )
    if status:
        return status
    _print_quality(table, truth, ontology, console)
    _draw_overview(output / "overview.png", table, truth, ontology)
    console.print(f"One picture:       {output / 'overview.png'}", soft_wrap=True, highlight=False)
    return show.run(str(table), output=output / "gallery.html", limit=60, console=console)


def _fresh(output: Path) -> None:
    if output.exists() and any(output.iterdir()):
        if not (output / MARKER).exists():
            raise MaskMillError(
                "output_not_ours",
                f"{output} exists and was not made by the demo.",
                "Name another folder: maskmill demo --output DIR.",
            )
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).write_text("maskmill demo made this folder and will make it anew when it runs again.\n")


def _draw(images: Path, truth: Path, *, count: int, size: int, seed: int) -> None:
    images.mkdir(parents=True)
    truth.mkdir(parents=True)
    scenes, maps, _captions = toyworld.generate(seed, count, size)
    for index, (scene, ids) in enumerate(zip(scenes, maps, strict=True)):
        Image.fromarray(scene).save(images / f"scene_{index:04d}.png")
        Image.fromarray(ids).save(truth / f"scene_{index:04d}.png")


def _draw_overview(path: Path, table: Path, truth: Path, ontology: Ontology, *, columns: int = 6) -> None:
    """Images, pseudo-labels and true maps of the first scenes, by name, on one sheet."""
    palette = ontology.palette()
    rows = [
        row for row in iter_rows(open_storage(str(table)), ["uri", "status", "mask"]) if row["status"] == "ok"
    ]
    chosen = sorted(rows, key=lambda row: row["uri"])[:columns]
    sheet = contact_sheet(
        [
            ("images", [np.asarray(Image.open(row["uri"]).convert("RGB")) for row in chosen]),
            ("pseudo-labels", [colorize(decode_mask(row["mask"]["bytes"]), palette) for row in chosen]),
            (
                "truth",
                [colorize(np.asarray(Image.open(truth / Path(row["uri"]).name)), palette) for row in chosen],
            ),
        ],
        names=ontology.names,
        palette=palette,
        caption="toy world, labelled by the bundled toy CLIP from 14 class names",
    )
    sheet.save(path)


def _print_quality(table: Path, truth: Path, ontology: Ontology, console: Console) -> None:
    confusion = np.zeros((ontology.num_classes, ontology.num_classes + 1), np.int64)
    for row in iter_rows(open_storage(str(table)), ["uri", "status", "mask"]):
        if row["status"] == "ok":
            true_map = np.asarray(Image.open(truth / Path(row["uri"]).name))
            predicted = decode_mask(row["mask"]["bytes"])
            confusion += confusion_matrix(
                true_map, predicted, ontology.num_classes, ignore_index=ontology.ignore_index
            )
    console.print("Pseudo-labels against the true maps of the toy world:", highlight=False)
    report = Table()
    report.add_column("class")
    report.add_column("IoU", justify="right")
    for name, value in zip(ontology.names, iou_per_class(confusion), strict=True):
        report.add_row(name, f"{value:.3f}")
    report.add_section()
    report.add_row("mIoU", f"{mean_iou(confusion):.3f}")
    console.print(report)
