"""Toy tables whose labels are wrong in known ways, and queues of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.corpus.manifest import stable_id
from pipeline.files.storage import open_storage
from pipeline.labelling.labeller import Prediction
from pipeline.ontology.reading import load_ontology
from pipeline.review.queue import Entry, Queue, Reason
from pipeline.table.committed import write_part
from pipeline.table.corrections import CORRECTIONS_DIR
from pipeline.table.labels import LABEL_SCHEMA, ok_row, summarise
from pipeline.table.record import TableRecord, write_table_record
from pipeline.toyworld.scenes import generate

TOYWORLD = load_ontology("toyworld")
IGNORED = TOYWORLD.ignore_index
RECORD = TableRecord(
    created="2026-01-01T00:00:00Z",
    ontology=TOYWORLD,
    recipe={"hash": "0" * 64},
    weights={"model": "toyclip", "pretrained": "bundled", "fingerprint": "0" * 64},
)


def wrong(truth: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels with a share of their rows moved to the next class, and a confidence that is low there."""
    labels = truth.copy()
    rows = np.random.default_rng(seed).permutation(len(truth))[: round(share * len(truth))]
    labels[rows] = (labels[rows] + 1) % TOYWORLD.num_classes
    confidence = np.full(truth.shape, 250, np.uint8)
    confidence[rows] = 80
    return labels, confidence


def make_reviewed(
    folder: Path,
    shares: list[float],
    *,
    size: int = 48,
    copies: int = 1,
    seed: int = 3,
    label: Callable[[np.ndarray], Prediction] | None = None,
) -> Path:
    """A table of toy scenes in ``folder/table``, truth beside it: the labels of image i are wrong in
    ``shares[i]``, or are those of a model. Each scene is there ``copies`` times."""
    table = open_storage(folder / "table")
    for name in ("images", "truth"):
        (folder / name).mkdir(parents=True)
    scenes = generate(3, len(shares), size)
    rows = []
    for number, (image, truth, share) in enumerate(zip(scenes.images, scenes.labels, shares, strict=True)):
        for copy in range(copies):
            path = folder / "images" / f"scene_{number:03d}_{copy}.png"
            Image.fromarray(image).save(path)
            Image.fromarray(truth.astype(np.uint8)).save(folder / "truth" / path.name)
            labels, confidence = wrong(truth.astype(np.uint8), share, number)
            if label is not None:
                made = label(image)
                labels, confidence = np.asarray(made.labels), np.asarray(made.confidence)
            rows.append(
                ok_row(
                    id=stable_id(str(path)),
                    uri=str(path),
                    sha256=hashlib.sha256(path.read_bytes()).digest(),
                    height=size,
                    width=size,
                    labels=labels,
                    confidence=confidence,
                    ignore_index=IGNORED,
                )
            )
    for start in range(0, len(rows), 5):
        write_part(table, pa.Table.from_pylist(rows[start : start + 5], schema=LABEL_SCHEMA))
    write_table_record(table, RECORD.model_copy(update={"counts": summarise(table)}))
    return folder


def row_id(folder: Path, number: int, copy: int = 0) -> int:
    return stable_id(str(folder / "images" / f"scene_{number:03d}_{copy}.png"))


def truth_of(folder: Path, number: int, copy: int = 0) -> np.ndarray:
    return np.asarray(Image.open(folder / "truth" / f"scene_{number:03d}_{copy}.png"))


def queue_of(folder: Path, count: int, *, known: tuple[int, ...] = ()) -> Queue:
    """A queue of the first images."""
    table = open_storage(folder / "table")
    return Queue(
        table=table.uri,
        corrections=table.uri_of(CORRECTIONS_DIR),
        truth=str(folder / "truth") if known else None,
        entries=tuple(
            Entry(
                id=row_id(folder, number),
                uri=str(folder / "images" / f"scene_{number:03d}_0.png"),
                quality=0.5,
                reasons=(Reason(kind="quality", text="low quality, 0.50"),),
                known=number in known,
            )
            for number in range(count)
        ),
    )
