"""Memory and time of labelling by the size of the corpus: bookkeeping alone, and a whole run that is killed.

    python -m benchmarks.scale ids [--counts 100000 1000000 10000000]
    python -m benchmarks.scale run [--count 100000] [--kill-at 0.4] [--partition 4000]

``ids``: for corpora of so many addresses (a list file) and a table of half of them, each step in a process of
its own: build the manifest, choose what has no row, and compare ids as ``maskmill verify`` does. Rows have no
masks: what is measured grows with the number of ids, not with their masks.

``run``: small scenes of the toy world in tar archives are labelled with the bundled toy CLIP. The run is
killed (SIGKILL to all its processes) once it has a share of the rows, and started again. At the end
``maskmill verify`` looks at every row. The memory of every process is sampled all the time. ``--partition``
makes the partitions of the corpus smaller, and with them the rounds of the run.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.label_job import ROOT, processor, versions
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.manifest import build_corpus, read_corpus, write_manifest
from pipeline.files.storage import open_storage
from pipeline.table.committed import part_files
from pipeline.table.increment import choose, open_table
from pipeline.table.labels import LABEL_SCHEMA
from pipeline.table.record import TableRecord
from pipeline.table.verify import Checked, verify
from pipeline.toyworld.scenes import scene

ROWS = 1024
SHARD = 10_000
SIZE = 48
SAMPLE_S = 2.0
STEPS = ("manifest", "choose", "verify")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["ids", "run", "step"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--counts", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--kill-at", type=float, default=0.4)
    parser.add_argument("--partition", type=int)
    arguments = parser.parse_args()
    if arguments.what == "step":
        step, folder = arguments.names
        measure_step(step, Path(folder))
        return
    print(f"{processor()}, {versions()}")
    print("command: python -m benchmarks.scale " + " ".join(sys.argv[1:]) + "\n", flush=True)
    if arguments.what == "ids":
        measure_ids(arguments.counts)
    else:
        measure_run(arguments.count, arguments.kill_at, arguments.partition)


# --- bookkeeping ---


def measure_ids(counts: list[int]) -> None:
    print("| ids | step | seconds | peak resident, MB | temporary files and results, MB |")
    print("|---|---|---|---|---|")
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="maskmill-bench-") as scratch:
            make_list(Path(scratch) / "list.txt", count)
            for step in STEPS:
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.scale", "step", step, scratch],
                    cwd=ROOT,
                    env=os.environ | {"TMPDIR": scratch},
                    stdout=subprocess.PIPE,
                    check=True,
                )
                found = json.loads(done.stdout)
                print(
                    f"| {count:,} | {found['step']} | {found['seconds']:.1f} | {found['peak'] / 1e6:,.0f} "
                    f"| {found['disk'] / 1e6:,.0f} |",
                    flush=True,
                )
                if step == "manifest":
                    make_table(Path(scratch))


def make_list(path: Path, count: int) -> None:
    with path.open("w") as file:
        for number in range(count):
            file.write(f"s3://bucket/photos/{number // 1000:06d}/{number:09d}.jpg\n")


def make_table(folder: Path) -> None:
    """A table with a row for half of the images: parts of 1,024 rows in no order of the ids."""
    labels = folder / "table" / "labels"
    labels.mkdir(parents=True)
    waiting: list[pa.Table] = []
    rows = 0
    for manifest in read_corpus(folder / "m.parquet"):
        waiting.append(manifest.slice(0, manifest.num_rows // 2))
        rows += waiting[-1].num_rows
    table = pa.concat_tables(waiting)
    order = np.random.default_rng(0).permutation(table.num_rows)
    for start in range(0, table.num_rows, ROWS):
        some = table.take(pa.array(order[start : start + ROWS]))
        columns = [
            some[field.name]
            if field.name in ("id", "uri")
            else pa.array(["not_found"] * some.num_rows)
            if field.name == "status"
            else pa.nulls(some.num_rows, field.type)
            for field in LABEL_SCHEMA
        ]
        pq.write_table(pa.table(columns, schema=LABEL_SCHEMA), labels / f"part-{start}.parquet")


def measure_step(step: str, folder: Path) -> None:
    """Do one step in this process, and print what it took as JSON."""
    began = time.monotonic()
    storage = open_storage(folder / "table")
    if step == "manifest":
        said = "build the manifest from a list"
        write_manifest(build_corpus(folder / "list.txt"), folder / "m.parquet")
    elif step == "choose":
        said = "read the ids of the table, choose what has no row"
        table = open_table(storage, _record(), lambda: None, lambda _text: None)
        choice = choose(read_corpus(folder / "m.parquet"), storage, table)
        first = next(choice.rounds(1))
        assert choice.count and first.todo.num_rows
    else:
        said = "compare the ids of the table with the manifest"
        corpus = read_corpus(folder / "m.parquet")
        parts = (Checked(part, _ids(folder / "table" / part)) for part in part_files(storage))
        found = verify(parts, corpus=corpus, recorded={})
        assert found.counts["id_missing"] == corpus.num_rows - found.rows
    disk = sum(path.stat().st_size for path in folder.glob("maskmill-ids-*/*"))
    disk += (folder / "m.parquet").stat().st_size if step == "manifest" else 0
    # What getrusage tells includes what the process before ``exec`` had, which has imported more.
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    print(json.dumps({"step": said, "seconds": time.monotonic() - began, "peak": peak, "disk": disk}))


def _record() -> TableRecord:
    from pipeline.ontology.reading import parse_classes

    weights = {"model": "m", "pretrained": "p", "fingerprint": "f"}
    return TableRecord(ontology=parse_classes("cat"), recipe={}, weights=weights)


def _ids(path: Path) -> np.ndarray:
    return pq.read_table(path, columns=["id"])["id"].to_numpy()


# --- a whole run ---


def make_shards(folder: Path, count: int) -> None:
    """Scenes with noise of their own in tar archives: no two files are equal."""
    folder.mkdir()
    pictures = [scene(0, number, SIZE).image.astype(np.int16) for number in range(512)]
    rng = np.random.default_rng(0)
    for start in range(0, count, SHARD):
        with tarfile.open(folder / f"{start // SHARD:05d}.tar", "w") as archive:
            for number in range(start, min(count, start + SHARD)):
                noise = rng.integers(-6, 7, (SIZE, SIZE, 1), np.int16)
                pixels = np.clip(pictures[number % len(pictures)] + noise, 0, 255).astype(np.uint8)
                data = io.BytesIO()
                Image.fromarray(pixels).save(data, "JPEG", quality=85)
                entry = tarfile.TarInfo(f"{number:08d}.jpg")
                entry.size = data.tell()
                data.seek(0)
                archive.addfile(entry, data)


class Sampler:
    """Samples the memory of a process and of those that it started, in a thread.

    Attributes:
        samples: (seconds, bytes of the largest process of the kind) by kind of process.
    """

    def __init__(self, pid: int) -> None:
        self.samples: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self._pid = pid
        self._began = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(SAMPLE_S):
            at = time.monotonic() - self._began
            largest: dict[str, int] = defaultdict(int)
            try:
                driver = psutil.Process(self._pid)
                members = [driver, *driver.children(recursive=True)]
            except psutil.Error:
                continue
            for member in members:
                try:
                    kind, memory = _kind(member, driver), member.memory_info()
                except psutil.Error:
                    continue
                # All map the object store: its shared pages count for its owner alone.
                private = memory.rss - (memory.shared if kind != "raylet and object store" else 0)
                largest[kind] = max(largest[kind], private)
            for kind, size in largest.items():
                self.samples[kind].append((at, size))


def _kind(process: psutil.Process, driver: psutil.Process) -> str:
    if process == driver:
        return "driver"
    title = (process.cmdline() or [""])[0]
    kinds = {
        "MapWorker": "CLIP worker",
        "AttemptBook": "book of attempts",
        "ray::": "decoder or encoder",
        "raylet": "raylet and object store",
        "gcs_server": "gcs server",
    }
    return next((kind for mark, kind in kinds.items() if mark in title), "other processes of Ray")


def measure_run(count: int, kill_at: float, partition: int | None) -> None:
    with tempfile.TemporaryDirectory(prefix="maskmill-bench-") as scratch:
        shards, table = Path(scratch) / "shards", Path(scratch) / "table"
        began = time.monotonic()
        make_shards(shards, count)
        print(
            f"{count:,} images of {SIZE} x {SIZE} pixels made in {time.monotonic() - began:.0f} s", flush=True
        )
        maskmill = ["jobs.cli"] if partition is None else ["benchmarks.small_partitions", str(partition)]
        command = [sys.executable, "-m", *maskmill, "label", "--images", str(shards)]
        command += ["--ontology", "toyworld", "--output", str(table), "--recipe", "toy", "--tracking", "off"]
        command += ["--set", f"images.scale=[{SIZE},{SIZE}]"]
        before = 0
        for at in (kill_at, None) if 0 < kill_at < 1 else (None,):
            text, sampler, took, reported = label(command, table, None if at is None else int(at * count))
            there = rows_in(table)
            what = "killed" if at is not None else "ended"
            files = len(list(table.glob("labels/*.parquet")))
            print(f"\n{what} after {took:.0f} s: {there - before:,} rows more, in {files:,} files")
            if at is not None:
                print(f"labelled according to the last line of the log before the kill: {reported:,}")
            print(
                "\n".join(line for line in text.splitlines() if "about" in line or "abelled" in line)[-1200:]
            )
            tell(sampler)
            before = there
        check(table, shards, count)


def label(command: list[str], table: Path, kill_after: int | None) -> tuple[str, Sampler, float, int]:
    """Run the command; kill it with all its children once the table has so many rows."""
    with tempfile.TemporaryFile("w+") as log:
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)})
        sampler = Sampler(process.pid)
        while process.poll() is None:
            time.sleep(2)
            if kill_after is not None and rows_in(table) >= kill_after:
                family = psutil.Process(process.pid).children(recursive=True)
                os.kill(process.pid, signal.SIGKILL)
                for child in family:
                    child.kill()
                process.wait()
        sampler.stop()
        log.seek(0)
        text = log.read()
    if kill_after is None and process.returncode:
        raise SystemExit(f"the job failed with {process.returncode}:\n{text[-3000:]}")
    done = [int(found.replace(",", "")) for found in re.findall(r"labelled ([\d,]+) of", text)]
    return text, sampler, time.monotonic() - began, done[-1] if done else 0


def rows_in(table: Path) -> int:
    """Rows on disk, from the footers of the files."""
    found = 0
    for path in table.glob("labels/*.parquet"):
        if path not in _known:
            _known[path] = pq.read_metadata(path).num_rows
        found += _known[path]
    return found


_known: dict[Path, int] = {}


def tell(sampler: Sampler) -> None:
    """Print the memory of each kind of process over the run, in tenths of its time."""
    end = max(at for samples in sampler.samples.values() for at, _ in samples)
    print(
        "\n| largest process, MB at | "
        + " | ".join(f"{end * n / 10 / 60:.1f} min" for n in range(1, 11))
        + " |"
    )
    print("|---|" + "---|" * 10)
    for kind, samples in sorted(sampler.samples.items()):
        cells = []
        for number in range(10):
            inside = [size for at, size in samples if end * number / 10 < at <= end * (number + 1) / 10]
            cells.append(f"{max(inside) / 1e6:,.0f}" if inside else "")
        print(f"| {kind} | " + " | ".join(cells) + " |")
    print(flush=True)


def check(table: Path, shards: Path, count: int) -> None:
    sizes = sorted(pq.read_metadata(path).num_rows for path in table.glob("labels/*.parquet"))
    large = sum(size == ROWS for size in sizes)
    others = [size for size in sizes if size != ROWS]
    print(f"{len(sizes):,} files, {large:,} of them of {ROWS:,} rows; rows of the others: {others}")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "verify", str(table), "--images", str(shards), "--workers", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    print(f"verify took {time.monotonic() - began:.0f} s and says:\n{done.stdout}")
    ids = [row for path in table.glob("labels/*.parquet") for row in _ids(path).tolist()]
    assert len(ids) == len(set(ids)) == count, (len(ids), len(set(ids)), count)
    assert isinstance(build_corpus(shards), Corpus) and done.returncode == 0
    print(f"every image once: {len(ids):,} rows, {len(set(ids)):,} ids, {count:,} images")


if __name__ == "__main__":
    main()
