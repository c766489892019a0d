"""Peak memory and time of labelling an image far above ``max_pixels`` in windows.

    python -m benchmarks.large_image [--side 30000] [--window 1024] [--keep FOLDER]

Writes a square TIFF in tiles of 512 pixels from scenes of the toy world, four times their size, labels it
through the three stages of the flow in this process with the bundled CLIP, which sees each window at a
quarter of its size, and reads the label map back in strips.
"""

from __future__ import annotations

import argparse
import resource
import struct
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.files.images import ImageSettings
from pipeline.files.storage import open_storage
from pipeline.labelling.prepare import prepare_labeller
from pipeline.labelling.recipes import RECIPES
from pipeline.labelling.stages import Decode, Label, Write
from pipeline.ontology.reading import load_ontology
from pipeline.table.labels import iter_rows
from pipeline.table.lease import LEASE_FILE, Lease
from pipeline.table.strips import read_strips
from pipeline.toyworld.scenes import generate

TILE = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=30_000)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--overlap", type=int, default=128)
    parser.add_argument("--keep", help="use this folder, and the image that is in it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(exist_ok=True)
        path = folder / f"{args.side}.tif"
        if not path.exists():
            write_tiled(path, args.side)
        print(f"image: {args.side} x {args.side} pixels, {path.stat().st_size / 1e6:,.0f} MB as TIFF")
        measure(path, folder / f"table-{time.time():.0f}", args.window, args.overlap)


def measure(path: Path, output: Path, window: int, overlap: int) -> None:
    """Label the image, and print what it takes."""
    ontology = load_ontology("toyworld")
    settings = ImageSettings(
        scale=(window // 4, window // 4),
        large_window=window,
        large_overlap=overlap,
        max_pixels=1 << 20,
    )
    prepared = prepare_labeller(RECIPES["toy"].replace(images=settings), ontology)
    storage, ignored = open_storage(output), ontology.ignore_index
    with Lease.acquire(storage, on_lost=lambda _reason: None):
        run_id = storage.read_json(LEASE_FILE)["run_id"]
        label = Label(lambda: prepared.build(threads=1), None, run_id, settings, ignored)
        write = Write(storage, run_id, ignore_index=ignored, num_classes=ontology.num_classes)
        before, began = peak(), time.perf_counter()
        manifest = pa.table({"id": pa.array([1], pa.int64()), "uri": [str(path)]})
        for part in Decode(settings)(manifest):
            for labelled in label(part):
                of_label = peak()
                write(labelled)
        seconds = time.perf_counter() - began
    print(f"peak memory: model loaded {before:.2f} GB, labelled {of_label:.2f} GB, written {peak():.2f} GB")
    (row,) = iter_rows(storage)
    assert row["status"] == "ok", row["error"]
    pixels = row["height"] * row["width"]
    print(f"window {window}, overlap {overlap}: {seconds:,.0f} s, {pixels / seconds / 1e6:.2f} megapixels/s")
    sizes = [len(row[name]["bytes"]) / 1e6 for name in ("mask", "confidence")]
    print(f"as PNG: label map {sizes[0]:.1f} MB, confidence {sizes[1]:.1f} MB")
    began = time.perf_counter()
    areas = np.zeros(256, np.int64)
    for _, rows in read_strips(row["mask"]["bytes"]):
        areas += np.bincount(rows.ravel(), minlength=256)
    print(f"read in strips: {time.perf_counter() - began:.1f} s; peak memory then {peak():.2f} GB")
    assert areas.sum() == pixels
    stored = {each["class_id"]: each["area"] for each in row["segments"]}
    assert stored == {int(i): int(areas[i]) for i in np.flatnonzero(areas) if i != ignored}


def peak() -> float:
    """Of this process, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def write_tiled(path: Path, side: int) -> None:
    """A BigTIFF with an RGB tile from 8 scenes over and over."""
    scenes = [np.kron(image, np.ones((4, 4, 1), np.uint8)) for image in generate(0, 8, 128).images]
    packed = [zlib.compress(scene.tobytes(), 6) for scene in scenes]
    count = -(-side // TILE)
    with path.open("wb") as file:
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        starts, sizes = [], []
        for index in range(count * count):
            data = packed[hash((index, 7)) % len(packed)]
            starts.append(file.tell())
            sizes.append(len(data))
            file.write(data)
        arrays = []
        for values in (starts, sizes):
            arrays.append(file.tell())
            file.write(struct.pack(f"<{len(values)}Q", *values))
        bits = 8 | 8 << 16 | 8 << 32
        fields = [
            (256, 4, 1, side), (257, 4, 1, side), (258, 3, 3, bits), (259, 3, 1, 8), (262, 3, 1, 2),
            (277, 3, 1, 3), (322, 4, 1, TILE), (323, 4, 1, TILE),
            (324, 16, len(starts), arrays[0]), (325, 16, len(sizes), arrays[1]),
        ]  # fmt: skip
        directory = file.tell()
        file.write(struct.pack("<Q", len(fields)))
        for field in fields:
            file.write(struct.pack("<HHQQ", *field))
        file.write(struct.pack("<Q", 0))
        file.seek(8)
        file.write(struct.pack("<Q", directory))


if __name__ == "__main__":
    main()
