"""Throughput of sample loading for MaskCLIP+ without training: DataLoader against Ray Data.

    python -m benchmarks.training_ingest [--labels TABLE] [--crop 512 512] [--loaders 1 2] [--seconds 10]

Without --labels it makes a table of toy scenes, whose labels stand in for a teacher's. All variants take
turns, ``--rounds`` times. The first seconds after start-up are discarded, because batches prefetched during
start-up would look free. CPU time covers this process and its descendants.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.label_job import processor, versions
from pipeline.cluster.session import ray_session
from pipeline.files.images import use_one_thread
from pipeline.files.storage import open_storage
from pipeline.ontology.reading import load_ontology
from pipeline.table.labels import LABEL_SCHEMA, ok_row
from pipeline.table.record import TableRecord, read_table_record, write_table_record
from pipeline.toyworld import scenes as toyworld
from pipeline.training.samples.augment import AugmentSettings
from pipeline.training.samples.table import TableSamples, open_table_samples

WARM_S = 2.0
POSITIONS = 100_000
"""Upper bound on the positions of one run; never reached."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", help="a label table; a small one of toy scenes by default")
    parser.add_argument("--images", type=int, default=64, help="number of toy scenes")
    parser.add_argument("--size", type=int, default=384, help="side of the toy scenes in pixels")
    parser.add_argument("--scale", type=int, nargs=2, default=[2048, 512])
    parser.add_argument("--crop", type=int, nargs=2, default=[512, 512])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--loaders", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure each variant")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    augment = AugmentSettings(scale=tuple(arguments.scale), crop=tuple(arguments.crop))
    with contextlib.ExitStack() as stack:
        table = arguments.labels
        if table is None:
            table = stack.enter_context(tempfile.TemporaryDirectory(prefix="maskmill-bench-"))
            make_table(Path(table), arguments.images, arguments.size)
        ontology = read_table_record(table).ontology
        samples = open_table_samples(table, ontology=ontology, augment=augment)
        stack.enter_context(ray_session(uuid.uuid4().hex, address=None, verbose=False))
        found: dict[str, list[tuple[float, float, float]]] = {}
        loads = []
        for _ in range(arguments.rounds):
            found.setdefault("a loop in one process", []).append(bare(samples, arguments.seconds))
            for loaders in arguments.loaders:
                for name, make in (("DataLoader", with_dataloader), ("Ray Data", with_ray_data)):
                    loads.append(os.getloadavg()[0])
                    measured = measure(make, samples, arguments.batch, loaders, arguments.seconds)
                    found.setdefault(f"{name}, {loaders} loader(s)", []).append(measured)
    print(f"\n{processor()}, {versions()}")
    print("command: python -m benchmarks.training_ingest " + " ".join(sys.argv[1:]))
    print(
        f"{samples.num_images:,} images, crops of {augment.crop[0]} x {augment.crop[1]}, batches of "
        f"{arguments.batch}, {arguments.rounds} rounds, load average {min(loads):.1f} to {max(loads):.1f}\n"
    )
    print("| loading alone | samples/s, median (range) | CPU ms per sample | s until the first batch |")
    print("|---|---|---|---|")
    for name, rows in found.items():
        rates, cpu, startup = zip(*rows, strict=True)
        print(
            f"| {name} | {statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f}) "
            f"| {statistics.median(cpu):.1f} | {statistics.median(startup):.1f} |"
        )


def bare(samples: TableSamples, seconds: float) -> tuple[float, float, float]:
    """Call ``TableSamples.load`` in a loop; returns the same as ``measure``."""
    use_one_thread()
    began, busy, count = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - began < seconds:
        for index in samples.order(count, 0)[:32].tolist():
            samples.load(index, np.random.default_rng(count))
            count += 1
    return count / (time.perf_counter() - began), 1000 * (cpu_seconds() - busy) / count, 0.0


def measure(
    make: Callable[[TableSamples, int, int], Iterator[Any]],
    samples: TableSamples,
    batch: int,
    loaders: int,
    seconds: float,
) -> tuple[float, float, float]:
    """Samples/s with an idle consumer, CPU ms per sample, and seconds until the first batch."""
    began = time.perf_counter()
    found = make(samples, batch, loaders)
    next(found)
    startup = time.perf_counter() - began
    began = time.perf_counter()
    while time.perf_counter() - began < WARM_S:
        next(found)
    began, busy, count = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - began < seconds:
        next(found)
        count += batch
    took = time.perf_counter() - began
    busy = cpu_seconds() - busy
    del found
    return count / took, 1000 * busy / count, startup


def with_dataloader(samples: TableSamples, batch: int, loaders: int) -> Iterator[Any]:
    """Load the way training does."""
    from pipeline.training.loop.ingest import batches

    return batches(
        samples, seed=0, start_step=0, stop_step=POSITIONS // batch, batch_size=batch, loaders=loaders
    )


def with_ray_data(samples: TableSamples, batch: int, loaders: int) -> Iterator[Any]:
    """Load with plain Ray Data: indices in order, a pool of actors, batches in order."""
    import ray

    order = np.concatenate([samples.order(epoch, 0) for epoch in range(POSITIONS // samples.num_images)])
    table = pa.table({"position": np.arange(len(order)), "index": order})
    block = max(1, 64 // batch) * batch
    dataset = ray.data.from_arrow([table.slice(at, block) for at in range(0, 200 * block, block)])
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset = dataset.map_batches(
        RayLoader,
        fn_constructor_args=(ray.put(samples),),
        batch_size=None,
        num_cpus=0,
        compute=ray.data.ActorPoolStrategy(size=loaders, max_tasks_in_flight_per_actor=2),
    )
    return iter(dataset.iter_torch_batches(batch_size=batch, prefetch_batches=1))


class RayLoader:
    """Load the samples of a block in a Ray Data actor."""

    def __init__(self, samples: Any) -> None:
        import ray

        use_one_thread()
        self.samples = ray.get(samples)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        loaded = [
            self.samples.load(int(index), np.random.default_rng((0, int(position))))
            for position, index in zip(rows["position"], rows["index"], strict=True)
        ]
        return {name: np.stack([sample[name] for sample in loaded]) for name in loaded[0]}


def cpu_seconds() -> float:
    """CPU time of this process and its live descendants."""
    here, total = psutil.Process(), 0.0
    for process in (here, *here.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def make_table(folder: Path, count: int, size: int) -> None:
    """Write a label table of toy scenes with their true labels, in parts of 32 rows."""
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
    weights = {"model": "toyclip", "pretrained": "bundled", "fingerprint": "0"}
    write_table_record(open_storage(folder), TableRecord(ontology=ontology, recipe={}, weights=weights))


if __name__ == "__main__":
    main()
