"""Does a memory of regions help, and does it grow with the corpus? On the toy world, in this process.

    python -m benchmarks.memory --sizes 100 300 1000

For each kind of regions and size of corpus: mIoU of the labels of three sets of scenes, with calibration and
without and with a refiner; bytes and regions an image; milliseconds an image that the search adds. A toy.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F

from jobs.benchmarks.toyworld.labelling import CORPUS_SEED, scene_set
from models.clip.loading import load_clip
from models.maskclip import MaskClip
from models.memory import Memory, centred, exact_search
from models.regions import means, regions_of
from models.settings import MaskClipSettings, RegionKind
from pipeline.labelling.calibrating import calibrated, count_scores, plain_scores
from pipeline.labelling.maskclip import MaskClipLabeller
from pipeline.labelling.prepare import prepare_labeller
from pipeline.labelling.recipes import RECIPES, change_recipe
from pipeline.metrics.statistics import SegmentationStatistics, summarise
from pipeline.ontology.reading import load_ontology
from pipeline.toyworld.scenes import generate

REFINED = {"refine": "pamr", "refine_dilations": (1, 2, 4, 8)}
ONTOLOGY = load_ontology("toyworld")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--kinds", nargs="*", default=["labels", "clusters", "superpixels"])
    parser.add_argument("--own", action="store_true", help="also each image with a memory of itself")
    parser.add_argument("--block", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    asked = change_recipe(RECIPES["toy"], {"calibrate": 0.95})
    made = prepare_labeller(plain_scores(asked), ONTOLOGY, precision="fp32").build(threads=1)
    assert isinstance(made, MaskClipLabeller)
    corpus = generate(options.seeds[0] + 2 * CORPUS_SEED, max(options.sizes), 128).images
    recipe = calibrated(asked, count_scores(made, corpus[:256]))
    clip = load_clip("toyclip", "bundled")
    seen: list[tuple[torch.Tensor, torch.Tensor, np.ndarray, torch.Tensor]] = []
    model = MaskClip(clip, made.text, recipe.maskclip, key_block=options.block)
    for image in corpus:
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        found = model.describe(pixels[None])
        seen.append((found.features[0], found.keys[0], found.scores[0].argmax(0).numpy(), pixels))
    for refined in ({}, REFINED):
        settings = change_recipe(recipe, refined).maskclip
        name = "refined" if refined else "calibrated"
        print(f"| {name}, no memory | | | | {_measured(clip, made, settings, None, options)} |", flush=True)
        if options.own:
            # The control: the same regions, with no other image to ask.
            text = _measured(clip, made, settings, None, options, own="clusters")
            print(f"| {name}, its own clusters alone | | | | {text} |", flush=True)
    for kind in options.kinds:
        for size in options.sizes:
            memory, mean_regions, size_bytes = _memory(kind, seen[:size], options.block)
            for refined in ({}, REFINED):
                settings = change_recipe(recipe, {**refined, "memory": "/made/here"}).maskclip
                text = _measured(clip, made, settings, memory, options)
                name = "refined" if refined else "calibrated"
                print(
                    f"| {name}, {kind} | {size:,} | {mean_regions:.1f} | {size_bytes:.0f} | {text} |",
                    flush=True,
                )


def _memory(
    kind: RegionKind, seen: list[tuple[torch.Tensor, torch.Tensor, np.ndarray, torch.Tensor]], block: int
) -> tuple[Memory, float, float]:
    """A memory of these images, regions an image, and bytes an image as they are stored."""
    keys, values = [], []
    for features, early, labels, image in seen:
        regions = regions_of(kind, labels=labels, features=features, image=image)
        keys.append(means(early.float(), regions).half().float())
        values.append(F.normalize(means(features, regions), dim=1).half())
    all_keys, all_values = torch.cat(keys), torch.cat(values)
    mean = all_keys.mean(0)
    stored = len(all_keys) * (2 * (all_keys.shape[1] + all_values.shape[1]) + 8) / len(seen)
    memory = Memory(all_values, mean, exact_search(centred(all_keys, mean)), kind, block)
    return memory, len(all_keys) / len(seen), stored


def _measured(
    clip: object,
    made: MaskClipLabeller,
    settings: MaskClipSettings,
    memory: Memory | None,
    options: argparse.Namespace,
    own: RegionKind | None = None,
) -> str:
    """MIoU of each set and their mean in percent, and milliseconds an image.

    With ``own`` each image has a memory of itself alone.
    """
    alone = MaskClip(clip, made.text, settings.without_memory(), key_block=options.block)  # type: ignore[arg-type]
    if own is not None:
        settings = settings.replace(memory="/made/here", memory_neighbours=1)
    model = None if own else MaskClip(clip, made.text, settings, memory=memory)  # type: ignore[arg-type]
    found, took, count = [], 0.0, 0
    for seed in options.seeds:
        scenes = scene_set(seed, options.scenes, 128)
        total = SegmentationStatistics.zero(ONTOLOGY.num_classes)
        for image, truth in zip(scenes.images, scenes.labels, strict=True):
            began = time.process_time()
            pixels = torch.from_numpy(image).permute(2, 0, 1)
            if own is not None:
                seen = alone.describe(pixels[None])
                labels_of = seen.scores[0].argmax(0).numpy()
                memory, *_ = _memory(
                    own, [(seen.features[0], seen.keys[0], labels_of, pixels)], options.block
                )
                model = MaskClip(clip, made.text, settings, memory=memory)  # type: ignore[arg-type]
            assert model is not None
            labels, _ = model.label(pixels)
            took, count = took + time.process_time() - began, count + 1
            total = total + SegmentationStatistics.of(
                truth, labels.numpy(), None, ONTOLOGY.num_classes, ONTOLOGY.ignore_index, boundary=False
            )
        found.append(100 * summarise(total)["miou"])
    return (
        f"{' / '.join(f'{value:.1f}' for value in found)} | {np.mean(found):.2f} | {1000 * took / count:.1f}"
    )


if __name__ == "__main__":
    main()
