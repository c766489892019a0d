"""The whole label job beside a bare forward loop and a naive script, in one run.

    python -m benchmarks.label_job [--images DIR] [--count 160] [--model ViT-B-16-quickgelu]

(a) bare: the same CLIP forward (head and class scores included) on preloaded tensors, at its best batch size
    in one process with all cores, and as one single-threaded process a core; the better one counts.
(b) job: ``maskmill label`` from files to table. Start-up is reported apart; the steady state is counted from
    outside, by the rows committed on disk.
(c) naive: decode, forward in fp32, interpolate, argmax, save, one by one, as a user writes it.

Weights are random: the speed is the same, the labels mean nothing.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path

from pipeline.cluster.session import WORKER_MALLOC

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent / "shared" / "data" / "voc2012_subset" / "JPEGImages"
CLASSES = (
    "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, table, dog, horse, motorbike, "
    "person, potted plant, sheep, sofa, train, monitor"
)
PRETRAINED = "random:0"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, default=PHOTOS)
    parser.add_argument("--count", type=int, default=160)
    parser.add_argument("--model", default="ViT-B-16-quickgelu")
    parser.add_argument("--naive-count", type=int, default=24)
    parser.add_argument("--bare-count", type=int, default=24)
    parser.add_argument("--bare-passes", type=int, default=1)
    arguments = parser.parse_args()
    photos = sorted(
        path for path in arguments.images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    if not photos:
        raise SystemExit(f"no photographs in {arguments.images}: name a folder with --images")
    photos = [photos[index % len(photos)] for index in range(min(arguments.count, len(photos)))]

    with tempfile.TemporaryDirectory(prefix="maskmill-bench-") as scratch:
        work = Path(scratch)
        folder = work / "images"
        folder.mkdir()
        for photo in photos:
            (folder / photo.name).symlink_to(photo.resolve())
        cold = run_job(folder, work / "table", arguments.model, cache=work / "cache")
        again = run_job(folder, work / "table", arguments.model, cache=work / "cache")
        shutil.rmtree(work / "table")
        warm = run_job(folder, work / "table", arguments.model, cache=work / "cache")
        record = json.loads((work / "table" / "dataset.json").read_text())
        precision = record["precision"]
        bare = bare_loops(
            _spread(photos, arguments.bare_count), arguments.model, precision, arguments.bare_passes
        )
        naive = naive_script(_spread(photos, arguments.naive_count), arguments.model, work / "naive")
        middle = run_job_again(folder, work, arguments.model)
    jobs = [run["rate"] for run in (cold, warm, middle)]
    job = statistics.median(jobs)
    best_name, best = max(bare.items(), key=lambda item: item[1])

    print()
    print(f"{arguments.model}, random weights, recipe maskclip, {precision}, {len(photos)} photographs")
    print(
        f"{processor()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, "
        f"{versions()}"
    )
    print("command: python -m benchmarks.label_job " + " ".join(sys.argv[1:]))
    print()
    print("| what | images/s | ratio |")
    print("|---|---|---|")
    for name, rate in bare.items():
        print(f"| (a) bare loop, {precision}, {name} | {rate:.2f} | |")
    print(f"| (b) whole job, steady, median of {', '.join(f'{rate:.2f}' for rate in jobs)} | {job:.2f} | |")
    print(f"| (c) naive script, fp32 | {naive:.2f} | |")
    print(f"| (b) / (a), best bare loop ({best_name}) | | **{job / best:.2f}** |")
    one_process = max(rate for name, rate in bare.items() if name.startswith("1 process,"))
    print(f"| (b) / (a), best batch size in one process | | **{job / one_process:.2f}** |")
    print(f"| (b) / (c) | | **{job / naive:.2f}** |")
    print()
    print("| start-up | s |")
    print("|---|---|")
    print(f"| first result on disk, nothing cached | {cold['first_s']:.1f} |")
    print(f"| first result on disk, class names cached | {warm['first_s']:.1f} |")
    print(f"| whole command, {len(photos)} images | {warm['whole_s']:.1f} |")
    print(f"| run with nothing to do | {again['whole_s']:.1f} |")


def _spread(photos: list[Path], count: int) -> list[Path]:
    """So many of them, evenly spread: the same mix of sizes as all."""
    return [photos[index * len(photos) // count] for index in range(count)]


def run_job(folder: Path, table: Path, model: str, *, cache: Path) -> dict[str, float]:
    """Run the command; rates and times as seen from outside."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "label", "--images", str(folder), "--classes", CLASSES, "--output",
         str(table), "--set", f"model={model}", "--set", f"pretrained={PRETRAINED}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MASKMILL_CACHE": str(cache)},
    )  # fmt: skip
    seen: dict[str, float] = {}
    while process.poll() is None:
        for part in (table / "checkpoint").glob("*.parquet"):
            if not part.name.endswith(".pending.parquet"):
                seen.setdefault(part.name, time.monotonic() - began)
        time.sleep(0.05)
    whole = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"the job failed with {process.returncode}")
    if not seen:
        return {"whole_s": whole}
    import pyarrow.parquet as pq

    rows = {name: pq.read_metadata(table / "checkpoint" / name).num_rows for name in seen}
    first, last = min(seen.values()), max(seen.values())
    counted = sum(count for name, count in rows.items() if seen[name] > first)
    return {"whole_s": whole, "first_s": first, "rate": counted / max(last - first, 1e-9) if counted else 0.0}


def run_job_again(folder: Path, work: Path, model: str) -> dict[str, float]:
    """Once more after the others, so that a drift of the machine's speed shows."""
    shutil.rmtree(work / "table")
    return run_job(folder, work / "table", model, cache=work / "cache")


def bare_loops(photos: list[Path], model: str, precision: str, passes: int) -> dict[str, float]:
    """Images per second of the forward alone, for each way of running it, on the same mix of sizes."""
    cores = len(os.sched_getaffinity(0))
    os.environ |= WORKER_MALLOC  # as the job's workers have it
    context = multiprocessing.get_context("spawn")
    rates = {}
    ways = [(1, cores, batch) for batch in (1, 2, 4)] + ([(cores, 1, 1)] if cores > 1 else [])
    for processes, threads, batch in ways:
        queue = context.Queue()
        barrier = context.Barrier(processes)
        arguments = (photos, model, precision, threads, batch, passes, barrier, queue)
        workers = [context.Process(target=_bare, args=arguments) for _ in range(processes)]
        for worker in workers:
            worker.start()
        total = sum(queue.get() for _ in workers)
        for worker in workers:
            worker.join()
        name = f"{processes} process{'es' if processes > 1 else ''}, {threads} thread(s), batch {batch}"
        rates[name] = total
        print(f"bare loop, {name}: {total:.2f} images/s", flush=True)
    return rates


def _bare(
    photos: list[Path],
    model: str,
    precision: str,
    threads: int,
    batch: int,
    passes: int,
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
        torch.stack(group[start : start + batch]).to(device)
        for group in by_shape.values()
        for start in range(0, len(group), batch)
    ]

    def forward(images: torch.Tensor) -> torch.Tensor:
        # Straight to the batched forward: on a CPU ``grid_scores`` would run a batch image by image.
        normalised = (images - teacher._mean) / teacher._std
        return teacher._cosines(teacher.encoder(normalised).features)

    with torch.inference_mode():
        forward(batches[0])
        forward(batches[-1])
        barrier.wait()
        began = time.perf_counter()
        for _ in range(passes):
            for images in batches:
                forward(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        queue.put(passes * len(photos) / (time.perf_counter() - began))


def _teacher(model: str, precision: str):
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
    classes = torch.arange(53).clamp(max=20)  # as many prompts and classes as the job has
    return MaskClip(clip, TextClassifier(rows, classes, 21), RECIPES["maskclip"].maskclip)


def _network_pixels(photos: list[Path]):
    from pipeline.files import images
    from pipeline.labelling.recipes import RECIPES

    settings = RECIPES["maskclip"].images
    for photo in photos:
        pixels = images.decode(photo.read_bytes())
        yield images.fit(pixels, settings)


def naive_script(photos: list[Path], model: str, output: Path) -> float:
    """Images per second of what a user would write around the same model."""
    import numpy as np
    import torch
    from PIL import Image

    output.mkdir()
    teacher = _teacher(model, "fp32")
    began = 0.0
    with torch.inference_mode():
        for index, photo in enumerate([photos[0], *photos]):
            if index == 1:  # the first is a warm-up
                began = time.perf_counter()
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
    return len(photos) / (time.perf_counter() - began)


def processor() -> str:
    """The processor, and the GPU if there is one."""
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
    """Versions of what does the work."""
    import open_clip
    import ray
    import torch

    return f"torch {torch.__version__}, open_clip {open_clip.__version__}, ray {ray.__version__}"


if __name__ == "__main__":
    main()
