"""Item 4: the whole label job from JPEG files, by CPU cores, against the forward pass alone."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from benchmarks.gpu.bench import Bench, first_line, random_images, random_text
from benchmarks.label_job import run_job
from models.clip.loading import load_clip
from models.maskclip import MaskClip
from pipeline.labelling.recipes import RECIPES

CORES = (16, 8, 4, 2, 1)
PHOTO, NETWORK = (375, 500), (512, 683)
PER_CORE, FEWEST, MOST = 60, 160, 960
TARGET = 0.9
SHORTEST = 45.0  # seconds that a job of the fewest images is given


def run(bench: Bench) -> None:
    """Images a second, and how busy the GPU was."""
    model = "toyclip" if bench.toy else "ViT-B-16-quickgelu"
    bare = forward_rate(bench, model)
    bench.add(f"forward alone, {model}, {NETWORK[0]}x{NETWORK[1]}", f"{bare:.1f} images/s")
    available = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="maskmill-gpu-") as scratch:
        work = Path(scratch)
        photos = list(write_photos(work / "all", 6 if bench.toy else MOST))
        for cores in [1] if bench.toy else [n for n in CORES if n <= len(available)]:
            name = f"label job, {cores} CPU core(s)"
            if bench.left() < SHORTEST and not bench.toy:
                bench.add(name, "left out: no time left")
                continue
            folder = work / f"images{cores}"
            folder.mkdir()
            for photo in photos[: 6 if bench.toy else min(MOST, max(FEWEST, PER_CORE * cores))]:
                (folder / photo.name).symlink_to(photo)
            os.sched_setaffinity(0, available[:cores])  # the job inherits it
            try:
                with gpu_use() as busy:
                    figures = run_job(folder, work / f"table{cores}", model, cache=work / "cache")
            except (Exception, SystemExit) as error:
                bench.add(name, first_line(error))
                continue
            finally:
                os.sched_setaffinity(0, available)
            used = f", GPU busy {statistics.median(busy):.0f} %" if busy else ""
            rate = figures.get("rate", 0.0)
            started = f", first result after {figures.get('first_s', float('nan')):.1f} s"
            bench.add(name, f"{rate:.1f} images/s{used}{started}", rate / bare, "forward alone", TARGET)
            shutil.rmtree(work / f"table{cores}", ignore_errors=True)


def forward_rate(bench: Bench, model: str) -> float:
    """Images/s of the network on preloaded batches, as many classes as in the job."""
    clip = load_clip(model, "random:0", device=bench.device, dtype=bench.dtype, towers="visual")
    network = MaskClip(clip, random_text(clip.embed_dim, 21), RECIPES["maskclip"].maskclip)
    images = random_images(1 if bench.toy else 16, *NETWORK).to(bench.device)
    return len(images) / bench.seconds(lambda: network.grid_scores(images))


def write_photos(folder: Path, count: int) -> Iterator[Path]:
    """JPEG files of some 100 kB; a few pictures under many names."""
    folder.mkdir()
    kinds = min(count, 32)
    for index, picture in enumerate(random_images(kinds, *PHOTO)):
        path = folder / f"kind{index:02d}.jpg"
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, quality=92)
    for index in range(count):
        path = folder / f"photo{index:04d}.jpg"
        path.symlink_to(folder / f"kind{index % kinds:02d}.jpg")
        yield path


@contextlib.contextmanager
def gpu_use() -> Iterator[list[float]]:
    """Percent of time in which the GPU worked, sampled while the job labels; empty without ``nvidia-smi``."""
    found: list[float] = []
    program = shutil.which("nvidia-smi")
    if program is None:
        yield found
        return
    query = [program, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield found
        finally:
            process.terminate()
            assert process.stdout is not None
            values = [
                float(line) for line in process.stdout.read().split() if line.replace(".", "").isdigit()
            ]
            # Start and end of the job, with an idle GPU, are not its steady state.
            found += [value for value in values if value > 0]
