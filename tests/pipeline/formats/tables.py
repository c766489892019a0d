"""Label tables for tests of exports, made without a model: the truth of toy scenes, and their images."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.corpus.manifest import stable_id
from pipeline.files.storage import Storage, open_storage
from pipeline.ontology.reading import load_ontology
from pipeline.table.committed import write_part
from pipeline.table.labels import LABEL_SCHEMA, failed_row, ok_row, summarise
from pipeline.table.record import TableRecord, write_table_record
from pipeline.toyworld.scenes import generate

TOYWORLD = load_ontology("toyworld")


def toy_table(
    folder: str | Path, count: int, *, size: int = 48, rows_a_part: int = 4, images: str | Path | None = None
) -> Storage:
    """A table of toy scenes in ``folder``, whose last row has failed; with the images if there is a place."""
    table = open_storage(folder)
    names = [f"scene_{index:03d}.png" for index in range(count)]
    uris = [f"/toy/{name}" if images is None else f"{open_storage(images).uri}/{name}" for name in names]
    add_rows(table, uris, size=size, rows_a_part=rows_a_part, write_images=images is not None)
    write_table_record(
        table,
        TableRecord(
            created="2026-01-01T00:00:00Z",
            ontology=TOYWORLD,
            recipe={"hash": "0" * 64},
            weights={"model": "toyclip", "pretrained": "", "fingerprint": "0" * 64},
            counts=summarise(table),
        ),
    )
    return table


def add_rows(
    table: Storage,
    uris: Sequence[str],
    *,
    size: int = 48,
    rows_a_part: int = 4,
    write_images: bool = False,
    seed: int = 0,
    files: Sequence[bytes] | None = None,
) -> None:
    """Add a toy scene for each address, by the hashes of other files if given; the last row has failed."""
    scenes = generate(seed, len(uris), size)
    random = np.random.default_rng(seed)
    rows = []
    for number, (uri, image, labels) in enumerate(zip(uris, scenes.images, scenes.labels, strict=True)):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        if write_images:
            folder, _, name = uri.rpartition("/")
            open_storage(folder).write_bytes(name, file.getvalue())
        labels[random.random(labels.shape) < 0.02] = TOYWORLD.ignore_index
        rows.append(
            ok_row(
                id=stable_id(uri),
                uri=uri,
                sha256=hashlib.sha256(file.getvalue() if files is None else files[number]).digest(),
                height=size,
                width=size,
                labels=labels,
                confidence=random.integers(0, 256, labels.shape).astype(np.uint8),
                ignore_index=TOYWORLD.ignore_index,
            )
        )
    last = rows[-1]
    rows[-1] = failed_row(id=last["id"], uri=last["uri"], status="truncated", error="the file ends too soon")
    for start in range(0, len(rows), rows_a_part):
        write_part(table, pa.Table.from_pylist(rows[start : start + rows_a_part], schema=LABEL_SCHEMA))
