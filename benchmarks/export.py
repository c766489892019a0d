"""Export a large table of toy labels, and compare the speed with that of decoding and encoding alone.

    python -m benchmarks.export [--images N] [--size PIXELS] [--formats png coco] [--workers N]

The table is made first, in parts as ``maskmill label`` makes them. Then for each format: its encoder in as
many processes as workers, for a tenth of the images: alone, with the decoding of the table's labels, and with
files written without any care; ``maskmill export``, in a process of its own and with Ray; and the encoder
again, as other work on the machine comes and goes. Speeds are images/s of all workers. Memory is what the
processes of the export hold for themselves (USS), all together, early and late in the run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa

from pipeline.corpus.manifest import stable_id
from pipeline.files.images import use_one_thread
from pipeline.files.storage import Storage, open_storage
from pipeline.formats.names import Naming
from pipeline.formats.registry import make_format
from pipeline.formats.samples import Source, samples_of
from pipeline.labelling.flow import USUAL_PART
from pipeline.ontology.reading import load_ontology
from pipeline.table.committed import part_files, write_part
from pipeline.table.labels import LABEL_SCHEMA, ok_row, summarise
from pipeline.table.record import TableRecord, write_table_record
from pipeline.toyworld.scenes import generate

TOYWORLD = load_ontology("toyworld")
Rates = npt.NDArray[np.float64]
SCENES = 250
"""Different scenes; further images are shifted ones."""


def make_table(folder: Path, count: int, size: int) -> None:
    """A table of true labels of toy scenes."""
    table = open_storage(folder)
    scenes = generate(0, min(count, SCENES), size).labels
    random = np.random.default_rng(0)
    for start in range(0, count, USUAL_PART):
        rows = []
        for number in range(start, min(start + USUAL_PART, count)):
            shift = tuple(random.integers(0, size, 2).tolist())
            labels = np.roll(scenes[number % len(scenes)], shift, (0, 1))
            uri = f"/toy/{number // 1000:03d}/scene_{number:06d}.png"
            rows.append(
                ok_row(
                    id=stable_id(uri), uri=uri, sha256=bytes(32), height=size, width=size, labels=labels,
                    confidence=np.full_like(labels, 255), ignore_index=TOYWORLD.ignore_index,
                )
            )  # fmt: skip
        write_part(table, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA))
    weights = {"model": "truth", "pretrained": "toyworld", "fingerprint": ""}
    record = TableRecord(
        source="truth", ontology=TOYWORLD, recipe={}, weights=weights, counts=summarise(table)
    )
    write_table_record(table, record)


class Sink(Storage):
    """Takes files and keeps none."""

    def write_bytes(self, name: str, data: bytes) -> None:
        """Drop it."""


class Plain(Storage):
    """Writes files as Python does: neither atomic nor made sure of."""

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file."""
        path = Path(self.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def encode_alone(name: str, table: str, parts: Sequence[str]) -> tuple[float, float, float]:
    """Images/s of this process: encoding, decoding and encoding, and the same with files written plainly."""
    use_one_thread()
    made, storage = make_format(name, {}), open_storage(table)
    sink = Sink(storage.uri, storage.fs, storage.root)
    images, decoding, encoding, writing = 0, 0.0, 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        plain = Plain(folder, storage.fs, folder)
        for part in parts:
            began = time.perf_counter()
            samples = list(samples_of(Source(storage), part, 0, Naming(), lambda _row: None))
            decoded = time.perf_counter()
            for _ in made.write_part("0", samples, TOYWORLD, sink):
                pass
            encoded = time.perf_counter()
            for _ in made.write_part("0", samples, TOYWORLD, plain):
                pass
            decoding += decoded - began
            encoding += encoded - decoded
            writing += time.perf_counter() - encoded
            images += len(samples)
    return images / encoding, images / (decoding + encoding), images / (decoding + writing)


def rates_alone(name: str, table: str, parts: Sequence[str], workers: int) -> Rates:
    """What ``encode_alone`` finds, of all workers together."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        shares = [parts[number::workers] for number in range(workers)]
        list(pool.map(encode_alone, [name] * workers, [table] * workers, [share[:1] for share in shares]))
        done = list(pool.map(encode_alone, [name] * workers, [table] * workers, shares))
    return np.sum(done, 0)


@dataclass(frozen=True)
class Run:
    """An export, as it was watched.

    Attributes:
        rate: images/s while parts were written, without the start of Ray.
        seconds: of the whole command.
        early, late: greatest memory in MB while 10 to 40 %, and 70 to 100 %, of the parts were there.
    """

    rate: float
    seconds: float
    early: float
    late: float


def watch_export(name: str, table: str, output: Path, images: int, workers: int) -> Run:
    """Export the table, and watch."""
    command = [
        sys.executable, "-m", "jobs.cli", "export", table, "--format", name, "--output", str(output),
        "--workers", str(workers),
    ]  # fmt: skip
    marks = output / ".maskmill" / "parts"
    seen: list[tuple[float, int]] = []
    memory: dict[bool, float] = {False: 0.0, True: 0.0}
    began = measured = time.monotonic()
    with subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": ""}, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            time.sleep(0.1)
            done = len(list(marks.glob("*.jsonl"))) if marks.is_dir() else 0
            now = time.monotonic()
            if done and (not seen or done > seen[-1][1]):
                seen.append((now, done))
            share = done / parts_of(output) if done else 0.0
            if now - measured > 1 and (0.1 <= share <= 0.4 or share >= 0.7):
                measured = now
                memory[share >= 0.7] = max(memory[share >= 0.7], held_by(process.pid))
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read().decode()
    (first, before), (last, after) = seen[0], seen[-1]
    rate = images * (after - before) / parts_of(output) / (last - first)
    return Run(rate, time.monotonic() - began, memory[False], memory[True])


def parts_of(output: Path) -> int:
    """Number of the parts of an export, each of which has a mark in the end."""
    plan = json.loads((output / ".maskmill" / "plan.json").read_text())
    return len({entry["part"] for entry in plan["parts"]})


def held_by(pid: int) -> float:
    """Memory of a process and those below it, in MB."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            total += process.memory_full_info().uss
        except psutil.Error:
            continue
    return total / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--formats", nargs="+", default=["coco", "png"])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table"
        make_table(table, given.images, given.size)
        parts = part_files(open_storage(table))
        some = parts[:: max(1, len(parts) // max(10, len(parts) // 10))]
        print(
            f"{given.images:,} label maps of {given.size} px in {len(parts):,} files; {given.workers} workers"
        )
        print(
            "| format | encoding | and decoding | and plain files | export | of encoding | of the three "
            "| whole command, s | memory early, late, MB |\n|---|---|---|---|---|---|---|---|---|"
        )
        for name in given.formats:
            before = rates_alone(name, str(table), some, given.workers)
            run = watch_export(name, str(table), Path(folder) / name, given.images, given.workers)
            alone = (before + rates_alone(name, str(table), some, given.workers)) / 2
            print(
                f"| {name} | {' | '.join(f'{rate:,.0f}' for rate in alone)} | {run.rate:,.0f} "
                f"| {run.rate / alone[0]:.2f} | {run.rate / alone[2]:.2f} | {run.seconds:.0f} "
                f"| {run.early:,.0f}, {run.late:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
