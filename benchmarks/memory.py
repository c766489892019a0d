"""Does a memory of regions help, and does it grow with the corpus? On the toy world, in this process.

    python -m benchmarks.memory --sizes 100 300 1000 [--search 1000]

For each kind of regions and size of corpus: mIoU of the labels of three sets of scenes, with calibration and
without and with a refiner; bytes and regions an image; milliseconds an image that the search adds. At the
sizes of ``--search`` also exact search beside the index of faiss: how many of the nearest regions the index
finds, and what both cost. A toy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

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
from pipeline.memory.index import build_index, faiss_search, import_faiss
from pipeline.metrics.statistics import SegmentationStatistics, summarise
from pipeline.ontology.reading import load_ontology
from pipeline.toyworld.scenes import generate

REFINED = {"refine": "pamr", "refine_dilations": (1, 2, 4, 8)}
ONTOLOGY = load_ontology("toyworld")
Regions = tuple[torch.Tensor, torch.Tensor]
"""Keys fp16 (R, K) and values fp16 (R, D) of the regions of an image."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--kinds", nargs="*", default=["labels", "clusters", "superpixels"])
    parser.add_argument("--own", action="store_true", help="also each image with a memory of itself")
    parser.add_argument("--search", type=int, nargs="+", default=[], help="also faiss, at these sizes")
    parser.add_argument("--block", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    asked = change_recipe(RECIPES["toy"], {"calibrate": 0.95})
    made = prepare_labeller(plain_scores(asked), ONTOLOGY, precision="fp32").build(threads=1)
    assert isinstance(made, MaskClipLabeller)
    corpus = generate(options.seeds[0] + 2 * CORPUS_SEED, max(options.sizes), 128).images
    recipe = calibrated(asked, count_scores(made, corpus[:256]))
    clip = load_clip("toyclip", "bundled")
    model = MaskClip(clip, made.text, recipe.maskclip, key_block=options.block)
    regions: dict[RegionKind, list[Regions]] = {kind: [] for kind in options.kinds}
    for image in corpus:
        for kind, found in _regions(model, image, options.kinds).items():
            regions[kind].append(found)
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
            memory, mean_regions, size_bytes = _memory(kind, regions[kind][:size], options.block)
            for refined in ({}, REFINED):
                settings = change_recipe(recipe, {**refined, "memory": "/made/here"}).maskclip
                text = _measured(clip, made, settings, memory, options)
                name = "refined" if refined else "calibrated"
                print(
                    f"| {name}, {kind} | {size:,} | {mean_regions:.1f} | {size_bytes:.0f} | {text} |",
                    flush=True,
                )
    if options.search:
        import_faiss().omp_set_num_threads(1)
        for kind in options.kinds:
            for size in options.search:
                print(_searched(model, kind, regions[kind][:size], options), flush=True)


def _regions(model: MaskClip, image: np.ndarray, kinds: Sequence[RegionKind]) -> dict[RegionKind, Regions]:
    """The regions of an image, of each kind."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    seen = model.describe(pixels[None])
    labels, features, keys = seen.scores[0].argmax(0).numpy(), seen.features[0], seen.keys[0].float()
    found = {}
    for kind in kinds:
        regions = regions_of(kind, labels=labels, features=features, image=pixels)
        found[kind] = (
            means(keys, regions).half(),
            F.normalize(means(features, regions), dim=1).half(),
        )
    return found


def _memory(kind: RegionKind, seen: Sequence[Regions], block: int) -> tuple[Memory, float, float]:
    """A memory of these images, regions an image, and bytes an image as they are stored."""
    keys, values = torch.cat([each for each, _ in seen]).float(), torch.cat([each for _, each in seen])
    mean = keys.mean(0)
    stored = len(keys) * (2 * (keys.shape[1] + values.shape[1]) + 8) / len(seen)
    memory = Memory(values, mean, exact_search(centred(keys, mean)), kind, block)
    return memory, len(keys) / len(seen), stored


def _searched(model: MaskClip, kind: RegionKind, seen: Sequence[Regions], options: argparse.Namespace) -> str:
    """Exact search and faiss: milliseconds an image, the share of the nearest that faiss finds, its size."""
    keys = torch.cat([each for each, _ in seen]).float()
    mean = keys.mean(0)
    vectors = centred(keys, mean)
    scenes = scene_set(options.seeds[0], options.scenes, 128).images
    queries = [centred(_regions(model, image, [kind])[kind][0].float(), mean) for image in scenes]
    began = time.process_time()
    index = build_index(vectors.numpy())
    built = time.process_time() - began
    neighbours = MaskClipSettings().memory_neighbours
    found, took = [], []
    for search in (exact_search(vectors), faiss_search(index)):
        began = time.process_time()
        found.append([search(each, neighbours).tolist() for each in queries])
        took.append(1000 * (time.process_time() - began) / len(queries))
    pairs = [
        len(set(wanted) & set(got)) / neighbours
        for image, again in zip(*found, strict=True)
        for wanted, got in zip(image, again, strict=True)
    ]
    size = import_faiss().serialize_index(index).nbytes / len(seen)
    return (
        f"| {kind} | {len(seen):,} | {len(vectors):,} | {took[0]:.1f} | {took[1]:.1f} | "
        f"{100 * np.mean(pairs):.1f} | {size:.0f} | {built:.1f} |"
    )


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
                memory, *_ = _memory(own, [_regions(alone, image, [own])[own]], options.block)
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
