"""Memory of the label job per process, for few and many images; it must not grow with their number.

    python -m benchmarks.label_memory [--images DIR] [--counts 100 10000]

Photographs are labelled with the bundled toy CLIP. The labels are meaningless, but 10,000 images take minutes
instead of hours, and everything around the model is the same.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

from benchmarks.label_job import PHOTOS, ROOT, processor, versions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, default=PHOTOS)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 10_000])
    arguments = parser.parse_args()
    photos = sorted(path.resolve() for path in arguments.images.iterdir() if path.suffix.lower() == ".jpg")
    if not photos:
        raise SystemExit(f"no photographs in {arguments.images}: name a folder with --images")
    peaks = {count: measure(photos, count) for count in arguments.counts}
    print(f"\n{processor()}, {versions()}")
    print("command: python -m benchmarks.label_memory " + " ".join(sys.argv[1:]) + "\n")
    print(
        "| peak resident memory, MB (largest process of its kind) | "
        + " | ".join(f"{n:,} images" for n in peaks)
        + " |"
    )
    print("|---|" + "---|" * len(peaks))
    for role in sorted({role for peak in peaks.values() for role in peak}):
        print(
            f"| {role} | " + " | ".join(f"{peak.get(role, 0) / 1e6:,.0f}" for peak in peaks.values()) + " |"
        )


def measure(photos: list[Path], count: int) -> dict[str, int]:
    """Peak resident bytes of one run, by kind of process."""
    peak: dict[str, int] = defaultdict(int)
    with tempfile.TemporaryDirectory(prefix="maskmill-bench-") as scratch:
        folder = Path(scratch) / "images"
        folder.mkdir()
        for index in range(count):
            (folder / f"{index:06d}.jpg").symlink_to(photos[index % len(photos)])
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "label", "--images", str(folder), "--ontology", "toyworld",
             "--output", f"{scratch}/table", "--recipe", "toy"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        while process.poll() is None:
            for member, role in _family(process.pid):
                try:
                    memory = member.memory_info()
                    # All map the object store; count its shared pages once, for its owner.
                    peak[role] = max(peak[role], memory.rss - (memory.shared if role != "raylet" else 0))
                    if role == "raylet":
                        peak["object store, mapped"] = max(peak["object store, mapped"], memory.shared)
                except psutil.Error:
                    continue
            time.sleep(0.2)
        if process.returncode:
            raise SystemExit(f"the job failed with {process.returncode}")
        print(f"{count:,} images in {time.monotonic() - began:.0f} s")
    return peak


def _family(pid: int) -> list[tuple[psutil.Process, str]]:
    try:
        driver = psutil.Process(pid)
        members = [(driver, "driver")]
        for child in driver.children(recursive=True):
            command = child.cmdline()
            title = command[0] if command else ""
            for mark, role in (
                ("MapWorker", "CLIP worker"),
                ("ray::", "decode and encode worker"),
                ("raylet", "raylet"),
                ("gcs_server", "gcs server"),
            ):
                if mark in title:
                    members.append((child, role))
                    break
    except psutil.Error:
        return []
    return members


if __name__ == "__main__":
    main()
