"""Toy scenes as files, and label tables of them, made without Ray, whose start would take longer."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from models.clip.weights import find_weights
from pipeline.corpus.manifest import stable_id
from pipeline.files.storage import open_storage
from pipeline.labelling.single import load_labeller
from pipeline.ontology.reading import load_ontology
from pipeline.table.committed import write_part
from pipeline.table.labels import LABEL_SCHEMA, ok_row, summarise
from pipeline.table.record import TableRecord, write_table_record
from pipeline.toyworld.scenes import generate

ROWS_A_PART = 32


def draw_scenes(output: Path, count: int, size: int, *, seed: int, prefix: str = "") -> None:
    """Write scenes to ``images`` and their true maps to ``truth``, folders of ``output``, as PNG.

    Args:
        output: the folder.
        count: number of scenes.
        size: of a scene in pixels.
        seed: of the scenes.
        prefix: of both folders.
    """
    scenes = generate(seed, count, size)
    for name, pictures in (("images", scenes.images), ("truth", scenes.labels)):
        folder = output / f"{prefix}{name}"
        folder.mkdir(parents=True)
        for number, picture in enumerate(pictures):
            Image.fromarray(picture.astype(np.uint8)).save(folder / f"scene_{number:04d}.png")


def label_folder(images: Path, output: Path) -> str:
    """Label images by the toy CLIP; returns the table.

    Args:
        images: folder of images.
        output: of the table.
    """
    labeller = load_labeller("toy", load_ontology("toyworld"))
    recipe, table, rows = labeller.recipe, open_storage(output), []
    for path in sorted(images.iterdir()):
        found = labeller(path)
        uri, (height, width) = str(path.resolve()), found.labels.shape
        rows.append(
            ok_row(
                id=stable_id(uri),
                uri=uri,
                sha256=hashlib.sha256(path.read_bytes()).digest(),
                height=height,
                width=width,
                labels=found.labels,
                confidence=found.confidence,
                ignore_index=labeller.ontology.ignore_index,
            )
        )
    for start in range(0, len(rows), ROWS_A_PART):
        write_part(table, pa.Table.from_pylist(rows[start : start + ROWS_A_PART], schema=LABEL_SCHEMA))
    fingerprint = find_weights(recipe.model, recipe.pretrained).fingerprint
    write_table_record(
        table,
        TableRecord(
            ontology=labeller.ontology,
            recipe=recipe.to_dict() | {"hash": recipe.hash},
            weights={"model": recipe.model, "pretrained": recipe.pretrained, "fingerprint": fingerprint},
            counts=summarise(table),
        ),
    )
    return table.uri
