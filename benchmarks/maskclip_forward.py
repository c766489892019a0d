"""Speed of MaskCLIP's forward pass and label maps by precision, threads and batch; agreement with fp32.

    python -m benchmarks.maskclip_forward [--images DIR] [--repeats 5] [--quick]

Speed: ViT-B/16 with random weights on preloaded 512x683 tensors (the reference's size for a 500x375
photograph), best of the repeats. Agreement: share of pixels with the same label as in fp32, at image size,
without prompt denoising or key smoothing, on photographs with random weights and on toy scenes with the
bundled CLIP.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.loading import load_clip
from models.clip.text import TextClassifier, build_text_classifier
from models.device import DTYPES, best_device, native_precision
from models.labelmap import label_map
from models.maskclip import MaskClip
from models.settings import MaskClipSettings

MODEL = "ViT-B-16-quickgelu"
NETWORK, IMAGE = (512, 683), (375, 500)
PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "voc2012_subset" / "JPEGImages"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, default=PHOTOS, help="photographs for the agreement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the native precision only, no agreement")
    arguments = parser.parse_args()
    device = best_device()
    cores = torch.get_num_threads()
    print(
        f"{platform.processor() or platform.machine()}, {cores} threads, torch {torch.__version__}, {device}"
    )
    native = native_precision(device)
    precisions = [native] if arguments.quick else list(dict.fromkeys(["fp32", native]))
    print("\n| precision | profile | threads | batch | ms/image | images/s |\n|---|---|---|---|---|---|")
    for precision in precisions:
        clip = load_clip(MODEL, "random:0", device=device, dtype=DTYPES[precision], towers="visual")
        for profile in ("reference", "weights"):
            model = MaskClip(clip, random_text(clip.embed_dim, 30), MaskClipSettings(profile=profile))
            for threads in sorted({1, cores}) if device.type == "cpu" else [cores]:
                for batch in (1, 4) if device.type == "cpu" else (1, 8, 32):
                    torch.set_num_threads(threads)
                    seconds = forward_time(model, batch, arguments.repeats) / batch
                    speed = f"{1e3 * seconds:.0f} | {1 / seconds:.2f}"
                    print(f"| {precision} | {profile} | {threads} | {batch} | {speed} |", flush=True)
    torch.set_num_threads(cores)
    print("\n| label map | classes | image | ms |\n|---|---|---|---|")
    for classes, image in ((30, IMAGE), (171, (480, 640))):
        scores = (0.2 + 0.05 * torch.randn(classes, 32, 43)).to(device)

        def tiled(scores: Tensor = scores, image: tuple[int, int] = image) -> None:
            label_map(scores, network_size=NETWORK, image_size=image)

        def naive(scores: Tensor = scores, image: tuple[int, int] = image) -> None:
            up = F.interpolate(F.interpolate(scores[None], NETWORK, mode="bilinear"), image, mode="bilinear")[
                0
            ]
            (100 * up).softmax(0).max(0)

        for name, work in (("tiled", tiled), ("naive", naive)):
            milliseconds = 1e3 * best(work, 2 * arguments.repeats)
            print(f"| {name} | {classes} | {image[1]}x{image[0]} | {milliseconds:.1f} |", flush=True)
    if not arguments.quick:
        print("\n| labels as in fp32 | images | share of pixels |\n|---|---|---|")
        for name, count, share in agreements(
            arguments.images, device, [p for p in ("bf16", "fp16") if p == native]
        ):
            print(f"| {name} | {count} | {100 * share:.3f} % |", flush=True)


def best(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several runs, after a warm-up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def forward_time(model: MaskClip, batch: int, repeats: int) -> float:
    """Seconds from normalised images on the device to class scores."""
    images = torch.randn(batch, 3, *NETWORK, device=model.clip.device)

    def work() -> None:
        with torch.inference_mode():
            model.scores(model.encoder(images))

    return best(work, repeats)


def random_text(width: int, classes: int) -> TextClassifier:
    rows = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    return TextClassifier(F.normalize(rows, dim=-1), torch.arange(classes), classes)


def agreements(folder: Path, device: torch.device, precisions: list[str]) -> list[tuple[str, int, float]]:
    """(name, images, share of pixels labelled as in fp32) for random weights and the bundled toy CLIP."""
    from pipeline.toyworld.scenes import CLASSES, generate

    rows = []
    photos = read_photos(folder, 8)
    scenes = torch.from_numpy(generate(seed=1, count=64, size=128)[0]).permute(0, 3, 1, 2)
    for name, model, pretrained, images, size in (
        ("photographs, random ViT-B/16", MODEL, "random:0", photos, IMAGE),
        ("toy scenes, bundled toy CLIP", "toyclip", "bundled", list(scenes), (128, 128)),
    ):
        if not images:
            continue
        exact = load_clip(model, pretrained, device=device)
        if model == "toyclip":
            text = build_text_classifier(exact, [[c] for c in CLASSES], templates="toyworld")
        else:
            text = random_text(exact.embed_dim, 20)
        for precision in precisions:
            rough = load_clip(model, pretrained, device=device, dtype=DTYPES[precision], towers="visual")
            same = total = 0
            for image in images:
                labels = [
                    label_map(
                        MaskClip(clip, text, MaskClipSettings()).grid_scores(image[None])[0],
                        network_size=(image.shape[1], image.shape[2]),
                        image_size=size,
                    )[0]
                    for clip in (exact, rough)
                ]
                same += int((labels[0] == labels[1]).sum())
                total += math.prod(size)
            rows.append((f"{name}, {precision}", len(images), same / total))
    return rows


def read_photos(folder: Path, count: int) -> list[Tensor]:
    """Landscape photographs only, each resized to uint8 (3, 512, 683), so that all have one size."""
    import numpy as np
    from PIL import Image

    found: list[Tensor] = []
    for path in sorted(folder.glob("*.jpg"))[: 4 * count] if folder.is_dir() else []:
        image = Image.open(path).convert("RGB")
        if image.width > image.height and len(found) < count:
            pixels = np.asarray(image.resize((NETWORK[1], NETWORK[0]), Image.Resampling.BILINEAR))
            found.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    return found


if __name__ == "__main__":
    main()
