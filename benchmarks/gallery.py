"""The gallery of a table with a million rows: how long ``maskmill show`` and a browser take over it.

The table is made by repeating the rows of a few toy scenes, each time with other ids.

    python -m benchmarks.gallery [--rows 1_000_000] [--output DIR]
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import tyro
from PIL import Image

from pipeline.corpus.manifest import stable_id
from pipeline.files.storage import Storage, open_storage
from pipeline.ontology.reading import load_ontology
from pipeline.table.committed import write_part
from pipeline.table.labels import LABEL_SCHEMA, failed_row, ok_row, summarise
from pipeline.table.record import TableRecord, write_table_record
from pipeline.toyworld.scenes import generate

SCENES, ROWS_A_PART = 512, 4096
CHROMIUM = "chromium"


@dataclass(frozen=True)
class Benchmark:
    """Make a large table, its gallery, and open it.

    Attributes:
        rows: of the table.
        size: of a scene in pixels.
        output: folder for table and page; default: a temporary one.
    """

    rows: int = 1_000_000
    size: int = 48
    output: Path | None = None

    def run(self) -> None:
        """Print what it took."""
        with ExitStack() as stack:
            folder = self.output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if not (folder / "table" / "dataset.json").exists():
                self._make(folder)
            self._show(folder, folder / "of-one-class.html", "--class", "fish")
            page = folder / "gallery.html"
            self._show(folder, page)
            for width, height in ((1440, 900), (390, 844)):
                began = time.monotonic()
                shot = folder / f"gallery-{width}.png"
                subprocess.run(
                    [
                        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                        f"--window-size={width},{height}", f"--screenshot={shot}", page.resolve().as_uri(),
                    ],
                    check=True,
                    capture_output=True,
                )  # fmt: skip
                print(f"chromium, {width} px: {time.monotonic() - began:.1f} s from its start to a picture")

    def _show(self, folder: Path, page: Path, *only: str) -> None:
        """Write a page, and print what it took."""
        began = time.monotonic()
        command = [sys.executable, "-m", "jobs.cli", "show", str(folder / "table"), "--output", str(page)]
        shown = subprocess.Popen([*command, *only])
        _, status, used = os.wait4(shown.pid, 0)
        assert status == 0, "it has said why"
        size = page.stat().st_size / 1e6
        print(
            f"{' '.join(['maskmill show', *only])}: {time.monotonic() - began:.1f} s, "
            f"{used.ru_maxrss / 2**10:,.0f} MiB; the page has {size:.1f} MB",
            flush=True,
        )

    def _make(self, folder: Path) -> None:
        table = open_storage(folder / "table")
        base = pa.Table.from_pylist(self._rows(folder), schema=LABEL_SCHEMA)
        begun = time.monotonic()
        written = 0
        while written < self.rows:
            count = min(ROWS_A_PART, self.rows - written)
            numbers = np.arange(written, written + count)
            part = base.take(pa.array(numbers % len(base)))
            ids = pa.array((numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64))
            write_part(table, part.set_column(0, "id", ids))
            written += count
        self._record(table)
        print(f"{self.rows:,} rows written in {time.monotonic() - begun:.0f} s")

    def _rows(self, folder: Path) -> list[dict[str, object]]:
        scenes, random = generate(0, SCENES, self.size), np.random.default_rng(0)
        (folder / "images").mkdir(parents=True)
        rows: list[dict[str, object]] = []
        for number, (image, labels) in enumerate(zip(scenes.images, scenes.labels, strict=True)):
            path = (folder / "images" / f"scene_{number:03d}.png").resolve()
            Image.fromarray(image).save(path)
            sure = np.clip(random.normal(random.uniform(120, 250), 20, (4, 4)), 0, 255).astype(np.uint8)
            rows.append(
                ok_row(
                    id=stable_id(str(path)),
                    uri=str(path),
                    sha256=hashlib.sha256(path.read_bytes()).digest(),
                    height=self.size,
                    width=self.size,
                    labels=labels.astype(np.uint8),
                    confidence=np.asarray(Image.fromarray(sure).resize((self.size, self.size))),
                    ignore_index=255,
                )
            )
        gone = failed_row(id=1, uri="/gone.jpg", status="not_found", error="FileNotFoundError: /gone.jpg")
        rows[-1] = gone
        return rows

    def _record(self, table: Storage) -> None:
        weights = {"model": "toyclip", "pretrained": "bundled", "fingerprint": "0" * 64}
        record = TableRecord(
            ontology=load_ontology("toyworld"), recipe={"hash": "0" * 64, "name": "toy"}, weights=weights
        )
        write_table_record(table, record.model_copy(update={"counts": summarise(table)}))


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
