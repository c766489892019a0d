"""Visual prompts that point CLIP to one object of an image (CLIPSeg, arXiv 2112.10003, Table 2).

CLIP chooses among the names of an image's objects. The more a strategy raises the probability of the target
object over the unmodified image, the better.

As in the paper's notebook, image and mask are squeezed to S x S, the strategy is applied there to
ImageNet-normalised pixels, and the result is resized to CLIP's input size. The prompt is "a photo of a NAME",
and an image must show at least three names. Attention masks are applied at CLIP's input size; the notebook
applied them at S x S, which changes the probability by itself.

Shapes: B samples in a batch, S = 352, K names of an image.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.loading import Clip
from models.clipseg.decoder import IMAGE_SIZE
from models.clipseg.masked_attention import AttentionMask, masked_embedding
from models.clipseg.visual_prompts import TABLE2, VisualPrompt
from pipeline.datasets.base import Dataset
from pipeline.evaluation.prompts.pixels import pixels, squeezed_mask

UNMODIFIED = "unmodified image"
STRATEGIES: Mapping[str, VisualPrompt | AttentionMask] = {
    "mask CLS, layer 11": AttentionMask("cls", "last"),
    "mask CLS, all layers": AttentionMask("cls", "all"),
    "mask all, all layers": AttentionMask("patches", "all"),
    "dye red in grey image": TABLE2["dye"],
    "red outline": TABLE2["outline"],
    "BG intensity 50 %": TABLE2["intensity50"],
    "BG intensity 10 %": TABLE2["intensity10"],
    "BG intensity 0 %": TABLE2["intensity0"],
    "BG blur": TABLE2["blur"],
    "BG blur + intensity 10 %": TABLE2["blur_intensity10"],
    "crop large context": TABLE2["crop_large_context"],
    "crop": TABLE2["crop"],
    "crop & BG blur": TABLE2["crop_blur"],
    "crop & BG intensity 10 %": TABLE2["crop_intensity10"],
    "crop & blur & 10 %": TABLE2["crop_blur_intensity10"],
}
"""Strategies by their name in the published table. Layer 11 is the last layer of the paper's CLIP; here it is
the last layer of any CLIP."""
SAMPLES = 1600
"""Number of objects in the paper."""
LEAST_NAMES = 3
LEAST_SHARE = 0.05
"""Minimum share of the image that an object covers, as in the paper's reader."""
_BATCH = 32


@dataclass(frozen=True, eq=False)
class Shown:
    """An object in an image.

    Attributes:
        image: float32 (3, S, S), ImageNet-normalised.
        mask: bool (S, S).
        names: K names of what the image shows, the object's first.
    """

    image: Tensor
    mask: npt.NDArray[np.bool_]
    names: tuple[str, ...]


def draw_objects(dataset: Dataset, count: int = SAMPLES, *, seed: int = 0) -> Iterator[Shown]:
    """Draw images in random order, each once, and yield all their large enough objects.

    Stuff classes are skipped if the ontology marks them. Masks are read lazily.

    Args:
        dataset: any dataset with masks of classes.
        count: maximum number of objects.
        seed: seed for the order.
    """
    things = [
        number
        for number, kind in enumerate(dataset.classes.kinds())
        if kind != "stuff" and number != dataset.ignore_index
    ]
    order = list(dataset.samples)
    random.Random(f"strategies/{seed}").shuffle(order)

    def objects() -> Iterator[Shown]:
        for sample in order:
            truth = dataset.truth(sample)
            present = [number for number in things if (truth == number).any()]
            if len(present) < LEAST_NAMES:
                continue
            large = [number for number in present if (truth == number).mean() >= LEAST_SHARE]
            if not large:
                continue
            image = pixels(dataset.image(sample), (IMAGE_SIZE, IMAGE_SIZE))
            for number in large:
                others = [dataset.class_names[other] for other in present if other != number]
                yield Shown(image, squeezed_mask(truth == number), (dataset.class_names[number], *others))

    return itertools.islice(objects(), count)


@torch.inference_mode()
def object_probabilities(
    clip: Clip,
    objects: Iterator[Shown],
    strategies: Sequence[str],
    *,
    progress: Callable[[int], None] = lambda _done: None,
) -> dict[str, list[float]]:
    """CLIP's probability of each object's name, without and with each strategy.

    Args:
        clip: a CLIP with both towers; attention masks need a ViT.
        objects: from ``draw_objects``.
        strategies: names in ``STRATEGIES``.
        progress: called with the number of objects done.

    Returns:
        One probability per object, by ``UNMODIFIED`` and strategy; empty lists without objects.

    Raises:
        MaskMillError: ``model_unsupported``, and errors from reading the data.
    """
    found: dict[str, list[float]] = {name: [] for name in (UNMODIFIED, *strategies)}
    texts: dict[str, Tensor] = {}
    done = 0
    while batch := list(itertools.islice(objects, _BATCH)):
        images = torch.stack([shown.image for shown in batch])
        masks = torch.from_numpy(np.stack([shown.mask for shown in batch]))
        names = dict.fromkeys(name for shown in batch for name in shown.names if name not in texts)
        if names:
            embedded = clip.encode_text([f"a photo of a {name}" for name in names])
            texts.update(zip(names, embedded, strict=True))
        for name, probabilities in found.items():
            embeddings = F.normalize(_embedded(clip, images, masks, STRATEGIES.get(name)).float(), dim=-1)
            for embedding, shown in zip(embeddings, batch, strict=True):
                logits = _scale(clip) * torch.stack([texts[word] for word in shown.names]) @ embedding
                probabilities.append(float(logits.softmax(0)[0]))
        done += len(batch)
        progress(done)
    return found


def _embedded(
    clip: Clip, images: Tensor, masks: Tensor, strategy: VisualPrompt | AttentionMask | None
) -> Tensor:
    """Image embeddings (B, D) with a strategy applied."""
    side = int(clip.source.config["vision_cfg"]["image_size"])
    shown = strategy(images, masks) if isinstance(strategy, VisualPrompt) else images
    resized = F.interpolate(shown, (side, side), mode="bilinear").to(clip.device, clip.dtype)
    if isinstance(strategy, AttentionMask):
        return masked_embedding(clip, resized, masks, strategy)
    return clip.encode_image(resized)


def _scale(clip: Clip) -> float:
    """CLIP's factor on similarities before the softmax."""
    return float(clip.model.get_parameter("logit_scale").exp())
