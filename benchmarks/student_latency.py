"""Compare a MaskCLIP teacher with DeepLab students: latency of one image, throughput of batches.

    python -m benchmarks.student_latency [--precisions fp32 bf16] [--repeats 7] [--seconds 6] [--output FILE]

Each figure is the time from uint8 images on the device to label maps at their size: the network plus
``models.labelmap``, as in labelling. Photographs are 512x683 (the reference's size for a 500x375 one), with
20 classes and a ViT-B/16 teacher; toy scenes are 128x128, with 14 classes and the bundled CLIP as teacher.
The ViT's and the students' weights are random, which does not affect the speed. Each figure is the median of
``--repeats`` runs, or fewer within ``--seconds``.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.loading import load_clip
from models.clip.text import TextClassifier
from models.device import DTYPES, best_device, native_precision
from models.labelmap import label_map
from models.maskclip import MaskClip
from models.settings import MaskClipSettings, StudentConfig
from models.student.deeplab import DeepLab

Network = Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W) -> scores (B, C, h, w)


@dataclass(frozen=True)
class World:
    """An image size, its teacher, and the students to compare."""

    name: str
    size: tuple[int, int]
    classes: int
    teacher: tuple[str, str]
    students: tuple[tuple[str, str], ...]


WORLDS = (
    World(
        "photographs",
        (512, 683),
        20,
        ("ViT-B-16-quickgelu", "random:0"),
        (("deeplabv2", "resnet50c"), ("deeplabv2", "resnet101c"), ("light", "light")),
    ),
    World(
        "toy scenes", (128, 128), 14, ("toyclip", "bundled"), (("deeplabv2", "resnet50c"), ("light", "light"))
    ),
)


@dataclass(frozen=True)
class Model:
    """A network to time, with the temperature of its confidence."""

    name: str
    network: Network
    temperature: float | None
    parameters: int


@dataclass(frozen=True)
class Row:
    """Measurements of one model."""

    world: World
    model: str
    precision: str
    parameters: int
    network_ms: float
    latency_ms: float
    throughput: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = best_device()
    parser.add_argument("--worlds", nargs="+", choices=[w.name for w in WORLDS], help="default: all")
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), default=[native_precision(device)])
    parser.add_argument("--batch", type=int, default=32 if device.type == "cuda" else 2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=6.0, help="per figure, at least one run")
    parser.add_argument(
        "--channels-last", action="store_true", help="store the students' images and weights channels last"
    )
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    arguments = parser.parse_args()
    if arguments.output and arguments.output.exists():
        parser.error(f"{arguments.output} exists; name another file")
    rows = []
    for world in WORLDS:
        if arguments.worlds and world.name not in arguments.worlds:
            continue
        for precision in arguments.precisions:
            for model in models(world, precision, device, arguments.channels_last):
                timed = measure(world, model, device, arguments)
                rows.append(Row(world, model.name, precision, model.parameters, *timed))
                print(f"{world.name}, {model.name}, {precision}: {timed[1]:.1f} ms", file=sys.stderr)
    text = report(rows, device, arguments)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    print(text, end="")


def models(world: World, precision: str, device: torch.device, channels_last: bool) -> list[Model]:
    """The teacher and its students."""
    clip = load_clip(*world.teacher, device=device, dtype=DTYPES[precision], towers="visual")
    text = random_text(clip.embed_dim, world.classes)
    teacher = MaskClip(clip, text, MaskClipSettings())
    name = f"MaskCLIP {world.teacher[0]}"
    found = [Model(name, teacher.grid_scores, teacher.confidence_temperature, count(clip.visual))]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for decoder, backbone in world.students:
        config = StudentConfig(decoder=decoder, backbone=backbone, embed_dim=clip.embed_dim)  # type: ignore[arg-type]
        student = DeepLab(config, text).to(device, DTYPES[precision]).to(memory_format=layout).eval()
        student.set_classifier(text)  # fp32 again, as in a student read from its file

        def scores(images: Tensor, student: DeepLab = student) -> Tensor:
            return student.grid_logits(student.features(images.contiguous(memory_format=layout)))

        name = "light" if decoder == backbone == "light" else f"{decoder}-{backbone}"
        found.append(Model(name, scores, 1.0, count(student)))
    return found


def random_text(width: int, classes: int) -> TextClassifier:
    rows = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    return TextClassifier(F.normalize(rows, dim=-1), torch.arange(classes), classes)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def measure(
    world: World, model: Model, device: torch.device, arguments: argparse.Namespace
) -> tuple[float, float, float]:
    """Milliseconds for one image, network and label map; images/s for batches, label maps included."""
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, 3, *world.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)

    def labels(images: Tensor) -> None:
        for scores in model.network(images):
            label_map(scores, network_size=world.size, image_size=world.size, temperature=model.temperature)

    def median(work: Callable[[], object]) -> float:
        return median_time(work, device, arguments.repeats, arguments.seconds)

    with torch.inference_mode():
        alone = median(lambda: model.network(images[:1]))
        one = median(lambda: labels(images[:1]))
        many = median(lambda: labels(images))
    return 1e3 * alone, 1e3 * one, arguments.batch / many


def median_time(work: Callable[[], object], device: torch.device, repeats: int, seconds: float) -> float:
    """Median seconds, after one warm-up run (three on a GPU, to settle the choice of kernels)."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(3 if device.type == "cuda" else 1):
        once()
    times: list[float] = []
    while len(times) < repeats and sum(times) < seconds:
        times.append(once())
    return statistics.median(times)


def report(rows: list[Row], device: torch.device, arguments: argparse.Namespace) -> str:
    """Markdown: machine and settings, then one table."""
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    lines = [
        f"{hardware}, torch {torch.__version__}",
        f"command: python -m benchmarks.student_latency {' '.join(sys.argv[1:])}".rstrip(),
        "",
        "| images | model | precision | parameters, M | network, ms | to label map, ms | of the teacher's "
        f"| images/s, batches of {arguments.batch} | times the teacher's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    teachers: dict[tuple[str, str], Row] = {}
    for row in rows:
        teacher = teachers.setdefault((row.world.name, row.precision), row)
        lines.append(
            f"| {row.world.name} {row.world.size[0]}x{row.world.size[1]} | {row.model} | {row.precision} "
            f"| {row.parameters / 1e6:.1f} | {row.network_ms:.1f} | {row.latency_ms:.1f} "
            f"| {row.latency_ms / teacher.latency_ms:.2f} | {row.throughput:.2f} "
            f"| {row.throughput / teacher.throughput:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
