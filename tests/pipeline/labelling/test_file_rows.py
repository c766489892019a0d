"""How many rows are gathered for a file of a large run."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.labelling.file_rows import MOST_PIXELS, MOST_ROWS, rows_per_file


def _manifest(*columns: dict[str, object]) -> pa.Table:
    rows = [
        {"id": number, "uri": "/nowhere.jpg", "width": None} | column for number, column in enumerate(columns)
    ]
    names = {name: None for row in rows for name in row}
    return pa.Table.from_pylist([names | row for row in rows])


def _image(path: Path, width: int, height: int, kind: str = "JPEG") -> dict[str, object]:
    Image.fromarray(np.zeros((height, width), np.uint8)).save(path, kind)
    return {"uri": str(path)}


@pytest.mark.parametrize(
    ("width", "height", "rows"),
    [(48, 48, MOST_ROWS), (512, 512, MOST_ROWS), (1024, 1024, 256), (4096, 4096, 16), (60_000, 60_000, 1)],
)
def test_rows_have_so_many_pixels_together(width: int, height: int, rows: int) -> None:
    assert rows_per_file(_manifest(*[{"width": width, "height": height}] * 500)) == rows


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_without_sizes_some_images_are_looked_at(tmp_path: Path, kind: str) -> None:
    # Pillow puts the size of a TIFF behind its pixels, 4 MB here.
    paths = [_image(tmp_path / f"{number}.x", 2048, 2048, kind) for number in range(2)]
    assert rows_per_file(_manifest(*paths)) == MOST_PIXELS // 2048**2


def test_byte_ranges_are_looked_into(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.fromarray(np.zeros((2000, 4000), np.uint8)).save(data, "PNG")
    shard = tmp_path / "a.bin"
    shard.write_bytes(b"x" * 512 + data.getvalue() + b"y" * 512)
    row = {"uri": str(shard), "offset": 512, "length": data.tell()}
    assert rows_per_file(_manifest(row)) == MOST_PIXELS // 8_000_000


def test_what_cannot_be_read_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    torn = {"uri": str(tmp_path / "torn.jpg")}
    assert rows_per_file(_manifest(torn, {})) == MOST_ROWS
    assert rows_per_file(_manifest(torn, {}, _image(tmp_path / "a.jpg", 2048, 2048))) == 64
    assert rows_per_file(_manifest(torn, {"width": 2048, "height": 4096}, {"width": None})) == 32


def test_a_few_of_many_are_enough(tmp_path: Path) -> None:
    one = _image(tmp_path / "a.png", 1024, 2048)
    assert rows_per_file(_manifest(*[one] * 10_000)) == MOST_PIXELS // (1024 * 2048)
