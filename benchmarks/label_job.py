"""Compare the whole label job with a bare forward loop and a naive script, in short turns.

    python -m benchmarks.label_job [--images DIR] [--count 64] [--rounds 3] [--model ViT-B-16-quickgelu]

Each round runs all three in turn, so that drift in the machine's speed affects them equally:

(a) bare: the CLIP forward pass, including head and class scores, on preloaded tensors. The first round tries
    several batch sizes in one process with all cores, and one single-threaded process per core; later rounds
    use the fastest.
(b) job: ``maskmill label`` from files to table with uncached class names (53 words in 85 templates), then
    again with nothing to do. Its progress is measured from outside by the parts on disk; the steady state
    begins after a quarter of the images, when all processes of the pipeline run.
(c) naive: load the model, embed "a photo of a {name}." for 20 classes, then decode, forward in fp32,
    interpolate, argmax and save one image at a time.

Weights are random, which does not affect the speed; the labels are meaningless.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.cluster.session import WORKER_MALLOC

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent / "shared" / "data" / "voc2012_subset" / "JPEGImages"
CLASSES = (
    "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, table, dog, horse, motorbike, "
    "person, potted plant, sheep, sofa, train, monitor"
)
PRETRAINED = "random:0"

Way = tuple[int, int, int]
"""Processes, threads per process, batch size."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, default=PHOTOS)
    parser.add_argument("--count", type=int, default=64, help="photographs of the job")
    parser.add_argument("--few", type=int, default=16, help="photographs of the bare loop and the script")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="ViT-B-16-quickgelu")
    parser.add_argument("--naive", type=Path, help=argparse.SUPPRESS)  # (c) runs this module again
    arguments = parser.parse_args()
    photos = sorted(
        path for path in arguments.images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    if not photos:
        raise SystemExit(f"no photographs in {arguments.images}: name a folder with --images")
    few = spread(photos, arguments.few)
    if arguments.naive is not None:
        naive_script(few, arguments.model, arguments.naive)
        return
    with tempfile.TemporaryDirectory(prefix="maskmill-bench-") as scratch:
        work = Path(scratch)
        precision, ways, measured = run_rounds(spread(photos, arguments.count), few, arguments, work)
    print_tables(arguments, precision, ways, measured)


def spread(photos: list[Path], count: int) -> list[Path]:
    """``count`` evenly spread photographs, for the same mix of sizes."""
    count = min(count, len(photos))
    return [photos[index * len(photos) // count] for index in range(count)]


def run_rounds(
    photos: list[Path], few: list[Path], arguments: argparse.Namespace, work: Path
) -> tuple[str, dict[Way, float], dict[str, list[float]]]:
    """The job's precision, images/s of the first round's bare loops, and all figures by name."""
    folder = work / "images"
    folder.mkdir()
    for photo in photos:
        (folder / photo.name).symlink_to(photo.resolve())
    measured: dict[str, list[float]] = defaultdict(list)
    ways: dict[Way, float] = {}
    for index in range(arguments.rounds):
        print(f"round {index + 1} of {arguments.rounds}", flush=True)
        shutil.rmtree(work / "table", ignore_errors=True)
        job = run_job(folder, work / "table", arguments.model, cache=work / f"cache{index}")
        again = run_job(folder, work / "table", arguments.model, cache=work / f"cache{index}")
        precision: str = json.loads((work / "table" / "dataset.json").read_text())["precision"]
        if not ways:
            ways = {way: bare_loop(way, few, arguments.model, precision) for way in bare_ways()}
            bare = max(ways.values())
        else:
            bare = bare_loop(max(ways, key=ways.__getitem__), few, arguments.model, precision)
        naive = run_naive(arguments, work / f"naive{index}")
        figures = {
            "bare": bare,
            "job": job["rate"],
            "naive": naive["rate"],
            "job / bare": job["rate"] / bare,
            "job / naive": job["rate"] / naive["rate"],
            "first result, job": job["first_s"],
            "first result, naive": naive["first_s"],
            "later by": job["first_s"] - naive["first_s"],
            "whole command": job["whole_s"],
            "nothing to do": again["whole_s"],
        }
        for name, value in figures.items():
            measured[name].append(value)
    return precision, ways, measured


def print_tables(
    arguments: argparse.Namespace, precision: str, ways: dict[Way, float], measured: dict[str, list[float]]
) -> None:
    def line(title: str, name: str, digits: int) -> str:
        values = measured[name]
        middle, low, high = statistics.median(values), min(values), max(values)
        return f"| {title} | {middle:.{digits}f} | {low:.{digits}f} to {high:.{digits}f} |"

    processes, threads, batch = max(ways, key=ways.__getitem__)
    print()
    print(f"{arguments.model}, random weights, recipe maskclip, {precision}, {arguments.count} photographs")
    print(
        f"{processor()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, {versions()}"
    )
    print("command: python -m benchmarks.label_job " + " ".join(sys.argv[1:]))
    print()
    print(f"| median of {arguments.rounds} rounds in turns | images/s | from, to |")
    print("|---|---|---|")
    way = f"{processes} process(es), {threads} thread(s), batch {batch}"
    print(line(f"(a) bare loop, {precision}, {way}", "bare", 2))
    print(line("(b) whole job, steady", "job", 2))
    print(line("(c) naive script, fp32", "naive", 2))
    print(line("(b) / (a)", "job / bare", 2))
    print(line("(b) / (c)", "job / naive", 2))
    print()
    print("| start-up | s | from, to |")
    print("|---|---|---|")
    print(line("first result of the job, new class names", "first result, job", 1))
    print(line("first result of the naive script", "first result, naive", 1))
    print(line("the job's comes later by", "later by", 1))
    print(line(f"whole command, {arguments.count} photographs", "whole command", 1))
    print(line("run with nothing to do", "nothing to do", 1))
    print()
    print("Bare loops of the first round, images/s:")
    for (processes, threads, batch), rate in ways.items():
        print(f"- {processes} process(es), {threads} thread(s), batch {batch}: {rate:.2f}")


# --- (b) the job ---


def run_job(folder: Path, table: Path, model: str, *, cache: Path) -> dict[str, float]:
    """Seconds for the whole command and until its first part, and images/s after that."""
    command = [
        "jobs.cli", "label", "--images", str(folder), "--classes", CLASSES, "--output", str(table),
        "--tracking", "off", "--set", f"model={model}", "--set", f"pretrained={PRETRAINED}",
    ]  # fmt: skip
    whole_s, seen = watch(command, lambda: (table / "labels").glob("*.parquet"), cache=cache)
    new = {path: at for path, at in seen.items() if at > 0}
    if not new:
        return {"whole_s": whole_s}
    import pyarrow.parquet as pq

    parts = sorted((at, pq.read_metadata(path).num_rows) for path, at in new.items())
    ends = list(itertools.accumulate(rows for _, rows in parts))
    start = next(index for index, end in enumerate(ends) if end >= ends[-1] / 4)
    rate = (ends[-1] - ends[start]) / max(parts[-1][0] - parts[start][0], 1e-9)
    return {"whole_s": whole_s, "first_s": parts[0][0], "rate": rate}


def watch(
    command: Sequence[str], files: Callable[[], Iterable[Path]], *, cache: Path
) -> tuple[float, dict[Path, float]]:
    """Run a module; return seconds until it ended, and until each file appeared (0 if it existed before)."""
    began = time.monotonic()
    seen = dict.fromkeys(files(), 0.0)
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MASKMILL_CACHE": str(cache)},
    )
    while process.poll() is None:
        for path in files():
            seen.setdefault(path, time.monotonic() - began)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with {process.returncode}")
    return time.monotonic() - began, seen


# --- (a) the bare loop ---


def bare_ways() -> list[Way]:
    """The variants to try: several batch sizes with all cores, and one process per core."""
    cores = len(os.sched_getaffinity(0))
    return [(1, cores, batch) for batch in (1, 2, 4)] + ([(cores, 1, 1)] if cores > 1 else [])


def bare_loop(way: Way, photos: list[Path], model: str, precision: str) -> float:
    """Images/s of the forward pass alone, on the same mix of sizes."""
    processes, threads, batch = way
    os.environ |= WORKER_MALLOC  # like the job's workers
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    barrier = context.Barrier(processes)
    arguments = (photos, model, precision, threads, batch, barrier, queue)
    workers = [context.Process(target=_bare, args=arguments) for _ in range(processes)]
    for worker in workers:
        worker.start()
    total = sum(queue.get() for _ in workers)
    for worker in workers:
        worker.join()
    return total


def _bare(
    photos: list[Path],
    model: str,
    precision: str,
    threads: int,
    batch: int,
    barrier: threading.Barrier,
    queue: multiprocessing.Queue,
) -> None:
    import torch

    from models.device import best_device

    torch.set_num_threads(threads)
    teacher = _teacher(model, precision)
    device = best_device()
    by_shape = defaultdict(list)
    for pixels in _network_pixels(photos):
        by_shape[pixels.shape].append(torch.from_numpy(pixels).permute(2, 0, 1))
    batches = [
        (torch.stack(group[start : start + batch]).to(device, torch.float32) - 127.5) / 64
        for group in by_shape.values()
        for start in range(0, len(group), batch)
    ]
    with torch.inference_mode():
        for images in (batches[0], batches[-1]):
            teacher.scores(teacher.encoder(images))
        barrier.wait()
        began = time.perf_counter()
        for images in batches:
            # Not ``grid_scores``, which runs a batch image by image on a CPU.
            teacher.scores(teacher.encoder(images))
        if device.type == "cuda":
            torch.cuda.synchronize()
        queue.put(len(photos) / (time.perf_counter() - began))


def _teacher(model: str, precision: str) -> Any:
    import torch

    from models.clip.loading import load_clip
    from models.clip.text import TextClassifier
    from models.device import DTYPES, best_device
    from models.maskclip import MaskClip
    from pipeline.labelling.recipes import RECIPES

    clip = load_clip(model, PRETRAINED, device=best_device(), dtype=DTYPES[precision], towers="visual")
    rows = torch.nn.functional.normalize(
        torch.randn(53, clip.embed_dim, generator=torch.Generator().manual_seed(0))
    )
    classes = torch.arange(53).clamp(max=20)  # as many prompts and classes as in the job
    return MaskClip(clip, TextClassifier(rows, classes, 21), RECIPES["maskclip"].maskclip)


def _network_pixels(photos: list[Path]) -> Iterator[Any]:
    from pipeline.files import images
    from pipeline.labelling.recipes import RECIPES

    settings = RECIPES["maskclip"].images
    for photo in photos:
        yield images.fit(images.decode(photo.read_bytes()), settings)


# --- (c) the naive script ---


def run_naive(arguments: argparse.Namespace, output: Path) -> dict[str, float]:
    """Seconds until the script's first result, and images/s after that."""
    output.mkdir()
    command = [
        "benchmarks.label_job", "--naive", str(output), "--images", str(arguments.images),
        "--few", str(arguments.few), "--model", arguments.model,
    ]  # fmt: skip
    _, seen = watch(command, lambda: output.glob("*_c.png"), cache=output)
    first_s, last_s = min(seen.values()), max(seen.values())
    return {"first_s": first_s, "rate": (len(seen) - 1) / max(last_s - first_s, 1e-9)}


def naive_script(photos: list[Path], model: str, output: Path) -> None:
    """A straightforward script around the same model."""
    import numpy as np
    import torch
    from PIL import Image

    from models.clip.loading import load_clip
    from models.clip.text import TextClassifier
    from models.device import best_device
    from models.maskclip import MaskClip
    from pipeline.labelling.recipes import RECIPES

    clip = load_clip(model, PRETRAINED, device=best_device(), dtype=torch.float32, towers="both")
    with torch.inference_mode():
        rows = clip.encode_text([f"a photo of a {name}." for name in CLASSES.split(", ")])
    text = TextClassifier(rows, torch.arange(len(rows)), len(rows))
    teacher = MaskClip(clip, text, RECIPES["maskclip"].maskclip)
    with torch.inference_mode():
        for photo in photos:
            image = Image.open(photo).convert("RGB")
            factor = 512 / min(image.size)
            small = image.resize(
                (round(image.width * factor), round(image.height * factor)), Image.Resampling.BILINEAR
            )
            pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
            scores = teacher.grid_scores(pixels.to(teacher.clip.device))
            scores = torch.nn.functional.interpolate(scores, size=small.size[::-1], mode="bilinear")
            scores = torch.nn.functional.interpolate(scores, size=image.size[::-1], mode="bilinear")
            confidence, labels = (100 * scores).softmax(1).max(1)
            Image.fromarray(labels[0].to(torch.uint8).cpu().numpy()).save(output / f"{photo.stem}.png")
            Image.fromarray((255 * confidence[0]).to(torch.uint8).cpu().numpy()).save(
                output / f"{photo.stem}_c.png"
            )


def processor() -> str:
    """The processor, and the GPU if any."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        flags = fields.get("flags\t\t", "")
        extras = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
        name = fields.get("model name\t", name).strip() + (f" ({', '.join(extras)})" if extras else "")
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


def versions() -> str:
    """Versions of the main libraries."""
    import open_clip
    import ray
    import torch

    return f"torch {torch.__version__}, open_clip {open_clip.__version__}, ray {ray.__version__}"


if __name__ == "__main__":
    main()
