"""Compare CLIPSeg's speed here and in transformers: same random weights, same image, same prompts.

    python -m benchmarks.clipseg_speed [--prompts 1 5 20 100] [--device cuda] [--refined] [--repeats 5]

transformers is called as in its documentation: the image is repeated for each prompt, all in one batch. Here
the tower runs once per image. Both use fp32, 352 x 352, ViT-B/16, D = 64. The four variants take turns, so
that other load on the machine slows all of them; the best time of each counts. If the outputs differ by more
than 1e-4, the exit status is 1.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.clip.loading import load_clip
from models.clipseg.decoder import IMAGE_SIZE, ClipSeg, build_clipseg
from models.clipseg.weights import hugging_face_config, hugging_face_state
from models.device import best_device
from models.settings import ClipSegConfig

MODEL, PRETRAINED = "ViT-B-16-quickgelu", "random:0"
WITHIN = 1e-4
COLOURS = ("red", "blue", "green", "black", "white", "small", "large", "old", "wooden", "striped")
THINGS = ("car", "dog", "cup", "chair", "horse", "boat", "tree", "bag", "lamp", "bird")

Work = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[20], help="prompts per image (up to 100)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which each variant runs once")
    parser.add_argument("--device", default=str(best_device()), help="cpu or cuda")
    parser.add_argument("--refined", action="store_true", help="the refined head")
    arguments = parser.parse_args()
    if not all(1 <= count <= len(COLOURS) * len(THINGS) for count in arguments.prompts):
        parser.error("--prompts are from 1 to 100")
    if arguments.repeats < 1:
        parser.error("--repeats is at least 1")
    # Full fp32 on a GPU too, since the outputs are compared.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(arguments.device)
    ours = build_clipseg(
        load_clip(MODEL, PRETRAINED, device=device), ClipSegConfig(refined=arguments.refined)
    )
    theirs = as_transformers(ours, device)
    rows, differences = [], []
    for count in arguments.prompts:
        seconds, difference = compare(ours, theirs, count, arguments.repeats)
        rows.append((count, seconds))
        differences.append(difference)
        print(f"{count} prompts: outputs differ by {difference:.1e} at most", flush=True)
    report(rows, differences, device, refined=arguments.refined, repeats=arguments.repeats)
    if not all(difference <= WITHIN for difference in differences):
        sys.exit(f"The outputs differ by more than {WITHIN:g}: the times compare different things.")


def as_transformers(model: ClipSeg, device: torch.device) -> Any:
    """The model of transformers, with our weights."""
    import transformers

    theirs = transformers.CLIPSegForImageSegmentation(
        transformers.CLIPSegConfig(**hugging_face_config(model))
    )
    theirs.load_state_dict(hugging_face_state(model))
    return theirs.eval().to(device)


def compare(ours: ClipSeg, theirs: Any, count: int, repeats: int) -> tuple[tuple[float, ...], float]:
    """Seconds per image of the four variants, and the largest difference of their logits."""
    device = ours.clip.device
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(device)
    prompts = [f"a {colour} {thing}" for thing in THINGS for colour in COLOURS][:count]
    # transformers' processor pads to the longest prompt too; what follows the last token does not matter.
    tokens = ours.clip.tokenizer(prompts)
    tokens = tokens[:, : int((tokens != 0).sum(1).max())].to(device)
    known = ours.encode_text(prompts)

    def transformers(**asked: Tensor) -> Tensor:
        logits: Tensor = theirs(pixel_values=image.expand(count, -1, -1, -1), **asked).logits
        return logits

    ways: tuple[Work, ...] = (
        lambda: transformers(input_ids=tokens, attention_mask=torch.ones_like(tokens)),
        lambda: ours(image, ours.encode_text(prompts))[0],
        lambda: transformers(conditional_embeddings=known),
        lambda: ours(image, known)[0],
    )
    best = [float("inf")] * len(ways)
    with torch.inference_mode():
        outputs = [way() for way in ways]  # also warms up
        for _ in range(repeats):
            for index, way in enumerate(ways):
                best[index] = min(best[index], timed(way, device))
    difference = torch.stack([(output - outputs[0]).abs().max() for output in outputs]).max()
    return tuple(best), float(difference)  # NaN if any is


def timed(work: Work, device: torch.device) -> float:
    """Seconds until the result is computed."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def report(
    rows: list[tuple[int, tuple[float, ...]]],
    differences: list[float],
    device: torch.device,
    *,
    refined: bool,
    repeats: int,
) -> None:
    """Print the table."""
    import transformers

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"\n{platform.processor() or platform.machine()}, {where}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; fp32, {IMAGE_SIZE} x {IMAGE_SIZE}, "
        f"{'refined' if refined else 'plain'} head, best of {repeats}; ms an image\n"
    )
    print(
        "| prompts | transformers | here | ratio | transformers, embeddings given | here, embeddings given "
        "| ratio | outputs differ by |\n|---|---|---|---|---|---|---|---|"
    )
    for (count, (theirs, ours, theirs_given, ours_given)), difference in zip(rows, differences, strict=True):
        print(
            f"| {count} | {1e3 * theirs:.0f} | {1e3 * ours:.0f} | **{theirs / ours:.1f}** "
            f"| {1e3 * theirs_given:.0f} | {1e3 * ours_given:.0f} | **{theirs_given / ours_given:.1f}** "
            f"| {difference:.1e} |"
        )


if __name__ == "__main__":
    main()
