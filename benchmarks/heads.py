"""Time and memory of every dense head and refiner beside ``maskclip`` in one run; agreement of bf16.

    python -m benchmarks.heads [--model ViT-B-16-quickgelu] [--size 336 448] [--repeats 5]
    python -m benchmarks.heads --picture heads.png

Heads: forward pass from images on the device to class scores, with random weights, in the precision that the
machine computes natively and in fp32; with a helper (a ViT-B/16, as DINO's) its own pass is included. C-RADIO
and TIPSv2 of the size of a ViT-B are read beside them. On a CPU times are CPU time of all cores together.
The heads take turns; what counts is the median over the rounds of each head's time divided by that of
``maskclip`` in the same round. Memory: by how much one pass raises the peak of a process of its own, in which
the weights are loaded. Refiners: time of one photograph's scores (random), and by how much the
process's peak grows for 4000x3000 pixels. Agreement: share of pixels of toy scenes with the same label in
bf16 as in fp32.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.maskclip_forward import random_text
from models.catalogue import HEADS, REFINERS
from models.clip.loading import Clip, load_clip
from models.clip.refiners.base import RefineOptions, refine
from models.clip.text import build_text_classifier
from models.device import DTYPES, best_device, native_precision
from models.helper import helper_of
from models.maskclip import MaskClip
from models.settings import MaskClipSettings
from pipeline.ontology.reading import load_ontology
from pipeline.report.pictures import Pixels, colorize, contact_sheet
from pipeline.toyworld.scenes import CLASSES, generate

HELPER: dict[str, Any] = {"helper": "vit_base_patch16_224.dino", "helper_weights": "random:0"}
TOWERS = (("C-RADIOv3-B", "radseg"), ("TIPSv2-B-14", "maskclip"))
IMAGE = (375, 500)
LARGE = (3000, 4000)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-16-quickgelu")
    parser.add_argument("--size", type=int, nargs=2, default=(336, 448))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--picture", type=Path, help="only draw six toy scenes as labelled, to this file")
    parts = ("heads", "fp32", "refiners", "agreement")
    parser.add_argument("--part", choices=parts, action="append", help="only this; fp32: heads in fp32")
    arguments = parser.parse_args()
    wanted = arguments.part or parts
    if arguments.picture:
        draw(arguments.picture)
        return
    device = best_device()
    cores = torch.get_num_threads()
    print(
        f"{platform.processor() or platform.machine()}, {cores} threads, torch {torch.__version__}, {device}"
    )
    native = native_precision(device)
    for part, precision in (("heads", native), ("fp32", "fp32")):
        if part not in wanted or (part == "fp32" and native == "fp32"):
            continue
        print(f"\n{arguments.model}, {arguments.size[0]}x{arguments.size[1]}, {precision}, one image")
        print("\n| head | ms | of maskclip's | peak grows by, MB |\n|---|---|---|---|")
        size = tuple(arguments.size)
        for row, (seconds, ratio) in forward_times(
            arguments.model, precision, size, arguments.repeats
        ).items():
            grown = _in_a_process(_pass_memory, (row, arguments.model, precision, size))
            print(f"| {row} | {1e3 * seconds:.0f} | {ratio:.2f} | {grown:.0f} |", flush=True)
    if "refiners" in wanted:
        show_refiners()
    if "agreement" in wanted and native != "fp32":
        print(f"\n| labels of toy scenes in {native} as in fp32 | share of pixels |\n|---|---|")
        for name, settings in variants().items():
            print(f"| {name} | {100 * agreement(settings, native):.2f} % |", flush=True)


def show_refiners() -> None:
    """Print the time and memory of each refiner."""
    print("\n| refiner | 500x375, 21 classes, ms | 4000x3000, 171 classes, ms | peak grows by, MB |")
    print("|---|---|---|---|")
    for name in REFINERS:
        small = refine_time(name, 21, IMAGE, 1)
        large, grown = _in_a_process(_large, (name, 171))
        print(f"| {name} | {1e3 * small:.0f} | {1e3 * large:.0f} | {grown:.0f} |", flush=True)


def draw(path: Path) -> None:
    """Six toy scenes: image, truth, and the labels of maskclip and of the best that needs no training."""
    ontology = load_ontology("toyworld")
    made = generate(seed=11, count=6, size=128)
    images = torch.from_numpy(made.images).permute(0, 3, 1, 2)
    rows: list[tuple[str, Sequence[Pixels]]] = [("Toy scenes", list(made.images))]
    maps: dict[str, Sequence[Pixels]] = {"True maps": list(made.labels)}
    for title, settings in (
        ("Head maskclip, not refined", {"head": "maskclip"}),
        ("Head value, not refined", {"head": "value"}),
        (
            "Head value, refined by pamr",
            {"head": "value", "refine": "pamr", "refine_dilations": (1, 2, 4, 8)},
        ),
        ("Head value, refined by lposs+", {"head": "value", "refine": "lposs+"}),
    ):
        maps[title] = [found.numpy() for found in labels(settings, "fp32", images)]
    rows += [(title, [colorize(each, ontology.palette()) for each in found]) for title, found in maps.items()]
    contact_sheet(rows, names=ontology.names, palette=ontology.palette(), cell=160).save(path)
    print(f"wrote {path}")


def variants() -> dict[str, dict[str, str]]:
    """Every head that needs no helper, of which there is none for the toy, and refiners behind ``value``."""
    heads = {head: {"head": head} for head, entry in HEADS.items() if entry.alone}
    return heads | {f"value, {name}": {"head": "value", "refine": name} for name in REFINERS}


def forward_times(
    model: str, precision: str, size: tuple[int, ...], rounds: int
) -> dict[str, tuple[float, float]]:
    """Median seconds of a forward pass, and its median share of ``maskclip``'s, by head."""
    images = _images(size)
    loaded: dict[str, Clip] = {}
    models = {row: _network(row, model, precision, loaded) for row in rows(model)}
    taken: dict[str, list[float]] = {head: [] for head in models}
    for number in range(rounds + 1):
        for head, network in models.items():
            seconds = _seconds(lambda network=network: network.grid_scores(images))  # type: ignore[misc]
            if number:  # the first round warms up
                taken[head].append(seconds)
    usual = taken["maskclip"]
    return {
        head: (statistics.median(times), statistics.median(t / u for t, u in zip(times, usual, strict=True)))
        for head, times in taken.items()
    }


def rows(model: str) -> dict[str, tuple[str, str]]:
    """Model and head of every row."""
    heads = {head: (model, head) for head, entry in HEADS.items() if not entry.tower}
    return heads | {f"{head}, {name}": (name, head) for name, head in TOWERS}


def _network(row: str, model: str, precision: str, loaded: dict[str, Clip]) -> MaskClip:
    """A row's network; models that are in ``loaded`` are shared."""
    device, (name, head) = best_device(), rows(model)[row]
    if name not in loaded:
        loaded[name] = load_clip(name, "random:0", device=device, dtype=DTYPES[precision], towers="visual")
    reading = MaskClipSettings(head=head, profile="weights", **(HELPER if HEADS[head].helper else {}))
    helper = helper_of(reading, device=device, dtype=DTYPES[precision])
    return MaskClip(loaded[name], random_text(loaded[name].embed_dim, 30), reading, helper=helper)


def _images(size: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8).to(best_device())


def _pass_memory(row: str, model: str, precision: str, size: tuple[int, ...]) -> float:
    """Megabytes by which the second pass of a network raises this process's peak, or the GPU's."""
    network, images = _network(row, model, precision, {}), _images(size)
    network.grid_scores(images)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        network.grid_scores(images)
        return float(torch.cuda.max_memory_allocated() - before) / 1e6
    network_before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    network.grid_scores(images)
    return _resident("VmHWM") - network_before


def _resident(what: str) -> float:
    """Megabytes of this process, by the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1e3


def refine_time(name: str, classes: int, size: tuple[int, int], rounds: int) -> float:
    """Median seconds of refining the scores of one image."""
    device = best_device()
    images = torch.randint(0, 256, (1, 3, 336, 448), dtype=torch.uint8).to(device)
    scores = (0.2 + 0.05 * torch.randn(1, classes, 21, 28)).to(device)
    times = [_seconds(lambda: refine(name, images, scores, size, RefineOptions())) for _ in range(rounds)]
    return statistics.median(times)


def _in_a_process(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What a function returns in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _large(name: str, classes: int) -> tuple[float, float]:
    """Seconds for a large image, and megabytes by which this process grew."""
    refine_time(name, classes, (8, 8), 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = refine_time(name, classes, LARGE, 1)
    if torch.cuda.is_available():
        return seconds, torch.cuda.max_memory_allocated() / 1e6
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


def _seconds(work: Callable[[], object]) -> float:
    """Seconds on a GPU; without one, seconds of all cores together, which other work hardly changes."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    with torch.inference_mode():
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def agreement(settings: dict[str, str], precision: str) -> float:
    """Share of pixels of 40 toy scenes whose label is the same as in fp32."""
    scenes = torch.from_numpy(generate(seed=1, count=40, size=128).images).permute(0, 3, 1, 2)
    exact, rough = (labels(settings, each, scenes) for each in ("fp32", precision))
    same = sum(int((a == b).sum()) for a, b in zip(exact, rough, strict=True))
    return same / sum(map(Tensor.numel, exact))


def labels(settings: dict[str, Any], precision: str, images: Tensor) -> Sequence[Tensor]:
    """Label maps of the bundled CLIP."""
    clip = load_clip("toyclip", "bundled", device=best_device(), dtype=DTYPES[precision])
    text = build_text_classifier(clip, [[name] for name in CLASSES], templates="toyworld")
    config = MaskClipSettings(image_stats="clip", profile="weights", **settings)
    network = MaskClip(clip, text, config)
    return [network.label(image)[0] for image in images]


if __name__ == "__main__":
    main()
