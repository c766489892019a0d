"""Samples per second that the ingest of MaskCLIP+ gives, without any training.

    python -m benchmarks.training_ingest [--labels TABLE] [--crop 512 512] [--loaders 1 2] [--seconds 20]

Without --labels it makes a table of toy scenes, whose labels stand in for a teacher's. The first second after
start-up is left out: blocks that were loaded meanwhile would count as loaded in no time.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.label_job import processor, versions
from pipeline.cluster.session import ray_session
from pipeline.files.storage import open_storage
from pipeline.ontology.ontology import Ontology, load_ontology
from pipeline.table.labels import LABEL_SCHEMA, ok_row
from pipeline.toyworld import scenes as toyworld
from pipeline.training.samples.augment import AugmentSettings
from pipeline.training.samples.table import TableSamples, open_table_samples


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", help="a label table; a small one of toy scenes by default")
    parser.add_argument("--images", type=int, default=64, help="toy scenes")
    parser.add_argument("--size", type=int, default=384, help="side of the toy scenes in pixels")
    parser.add_argument("--scale", type=int, nargs=2, default=[2048, 512])
    parser.add_argument("--crop", type=int, nargs=2, default=[512, 512])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--loaders", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=15.0, help="how long to measure each")
    arguments = parser.parse_args()
    augment = AugmentSettings(scale=tuple(arguments.scale), crop=tuple(arguments.crop))
    rows = []
    with contextlib.ExitStack() as stack:
        table = arguments.labels
        if table is None:
            table = stack.enter_context(tempfile.TemporaryDirectory(prefix="maskmill-bench-"))
            make_table(Path(table), arguments.images, arguments.size)
        fields = open_storage(table).read_json("dataset.json")["ontology"]
        ontology = Ontology.from_dict({k: v for k, v in fields.items() if k not in ("hash", "names")})
        samples = open_table_samples(table, ontology=ontology, augment=augment)
        rows.append(("in one process, no Ray", bare(samples, arguments.seconds), 0.0))
        with ray_session(uuid.uuid4().hex, address=None, verbose=False):
            for loaders in arguments.loaders:
                rate, startup = measure(samples, arguments.batch, loaders, arguments.seconds)
                rows.append((f"Ray Data, {loaders} loader(s)", rate, startup))
    print(f"\n{processor()}, {versions()}")
    print("command: python -m benchmarks.training_ingest " + " ".join(sys.argv[1:]))
    print(f"{samples.num_images:,} images, crops of {augment.crop[0]} x {augment.crop[1]}\n")
    print("| ingest alone | samples/s | ratio to one process | seconds until the first batch |")
    print("|---|---|---|---|")
    for name, rate, startup in rows:
        print(f"| {name} | {rate:.1f} | {rate / rows[0][1]:.2f} | {startup:.1f} |")


def bare(samples: TableSamples, seconds: float) -> float:
    """Samples per second of ``TableSamples.load`` in a loop."""
    from pipeline.files.images import use_one_thread

    use_one_thread()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for index in samples.order(count, 0)[:32].tolist():
            samples.load(index, np.random.default_rng(count))
            count += 1
    return count / (time.perf_counter() - began)


def measure(samples: TableSamples, batch: int, loaders: int, seconds: float) -> tuple[float, float]:
    """Samples per second of a consumer that does nothing, and seconds until it gets the first batch."""
    from pipeline.training.loop.ingest import batches

    began = time.perf_counter()
    found = batches(
        samples, seed=0, start_step=0, stop_step=10**6 // batch, batch_size=batch, loaders=loaders
    )
    with contextlib.closing(found):
        next(found)
        startup = time.perf_counter() - began
        began = time.perf_counter()
        while time.perf_counter() - began < 1:
            next(found)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            count += len(next(found)["position"])
        return count / (time.perf_counter() - began), startup


def make_table(folder: Path, count: int, size: int) -> None:
    """A label table of toy scenes with their true labels, in parts of 32 rows."""
    ontology = load_ontology("toyworld")
    rows = []
    for index in range(count):
        scene = toyworld.scene(0, index, size)
        buffer = io.BytesIO()
        Image.fromarray(scene.image).save(buffer, "JPEG", quality=92)
        path = folder / f"{index:06d}.jpg"
        path.write_bytes(buffer.getvalue())
        confidence = np.random.default_rng(index).integers(100, 256, (size // 8, size // 8), np.uint8)
        smooth = np.array(Image.fromarray(confidence).resize((size, size), Image.Resampling.BILINEAR))
        rows.append(
            ok_row(
                id=index, uri=str(path), sha256=hashlib.sha256(buffer.getvalue()).digest(), height=size,
                width=size, labels=scene.labels, confidence=smooth, ignore_index=255,
            )
        )  # fmt: skip
    (folder / "labels").mkdir()
    for start in range(0, count, 32):
        part = pa.Table.from_pylist(rows[start : start + 32], schema=LABEL_SCHEMA)
        pq.write_table(part, folder / "labels" / f"part-{start:06d}-0.parquet")
    fields = ontology.to_dict() | {"hash": ontology.hash, "names": list(ontology.names)}
    open_storage(folder).write_json("dataset.json", {"ontology": fields, "recipe": {}})


if __name__ == "__main__":
    main()
