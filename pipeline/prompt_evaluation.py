"""CLIPSeg's protocols (arXiv 2112.10003, §5): what a model is shown on each benchmark, and what is counted.

A benchmark is a list of functions that each read one ``Query``: an image, its prompts, and the true mask of
every prompt. ``score`` runs a model over them. Which resizing is used where follows the code that made the
published numbers, its oddities included; each is told where it is done.

Shapes: P prompts of an image, S = 352, H W pixels of an image's own size.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from models.clipseg import IMAGE_SIZE, ClipSeg, normalize
from models.visual_prompts import visual_prompt
from pipeline.datasets.base import Dataset, Labels, Sample
from pipeline.datasets.oneshot import Episode
from pipeline.datasets.phrasecut import PhraseCutDataset, PhraseSample
from pipeline.metrics.confusion import confusion_matrix, harmonic_iou, mean_iou
from pipeline.metrics.foreground import ForegroundStatistics

VISUAL_PROMPT = "crop_blur_highlight352"
"""How the paper makes an image prompt of an example and its mask (``models.visual_prompts``)."""

VOC_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""PASCAL VOC's own spellings; class i is ``VOC_NAMES[i - 1]``. The text prompts of Pascal-5i."""
ZERO_SHOT_NAMES = ("background", "airplane", *VOC_NAMES[1:])
"""The prompts of generalised zero-shot segmentation by class id, in the spelling of JoEm."""
BACKGROUND_FACTOR = 3.0
"""What the background's probability is multiplied with before the highest is taken."""
RELEASED_SCORER: Mapping[str, str] = {"pascal-unseen10": "voc21", "pascal-unseen4": "pascal-unseen2"}
"""By split: the split whose classes the released scorer counts in its place (``pipeline.datasets.zeroshot``).
It takes the number of pairs that training left out, 5 and 2, for the number of unseen classes."""

_PROMPT_IMAGES_AT_ONCE = 8
_READERS, _READ_AHEAD = 4, 8
_Item = TypeVar("_Item")


@dataclass(frozen=True, eq=False)
class Query:
    """An image and everything that it is asked for.

    Attributes:
        image: fp32 (3, S, S), ImageNet-normalised.
        prompts: P texts as the text tower gets them, or example images fp32 (P, 3, S, S).
        truths: P label maps, bool (S, S) or (H, W). To the latter the prediction is brought by stretching it
            to a square of side max(H, W) and cutting off what is beyond.
        class_ids: P, see ``ForegroundStatistics``.
        known: bool, like each of ``truths``: pixels that count; None for all.
    """

    image: Tensor
    prompts: Sequence[str] | Tensor
    truths: Sequence[npt.NDArray[np.bool_]]
    class_ids: Sequence[int]
    known: npt.NDArray[np.bool_] | None = None


Read = Callable[[], Query]


@torch.inference_mode()
def score(
    model: ClipSeg,
    queries: Sequence[Read],
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> ForegroundStatistics:
    """Run a model over a benchmark and count.

    The vision tower runs once per query, and all prompts of it go through the decoder together. Queries are
    read a few ahead by threads; no more than that is in memory.

    Args:
        model: CLIPSeg or a baseline.
        queries: from one of the functions below.
        progress: is told how many queries are done, and of how many.

    Raises:
        MaskMillError: from reading the data, and ``prompt_too_long``.
    """
    parts = []
    texts: dict[str, Tensor] = {}
    for done, query in enumerate(_read_ahead(queries), start=1):
        conditionals = _conditionals(model, query.prompts, texts)
        logits = model(_placed(query.image[None], model), conditionals)[0]
        for probability, truth, class_id in zip(logits.sigmoid(), query.truths, query.class_ids, strict=True):
            fitted = _stretched(probability, truth.shape).cpu().numpy()
            parts.append(ForegroundStatistics.of(fitted, truth, class_id, known=query.known))
        progress(done, len(queries))
    return ForegroundStatistics.merge(parts)


# --- PhraseCut ----------------------------------------------------------------------------------------------


def phrase_queries(dataset: PhraseCutDataset, *, limit: int = 0) -> list[Read]:
    """PhraseCut by text: the phrase as written, image and mask squeezed to S x S, no negatives.

    Class ids are positions in the dataset, so that mIoU is the mean IoU of the samples.

    Args:
        dataset: its samples, those of an image next to each other.
        limit: images at most; 0 is all.
    """
    return [
        partial(_phrase_query, dataset, first, group) for first, group in _by_image(dataset, limit or None)
    ]


def phrase_image_queries(
    dataset: PhraseCutDataset, *, style: str = VISUAL_PROMPT, limit: int = 0, seed: int = 0
) -> list[Read]:
    """PhraseCut by example image: each phrase is shown by one of the split's samples of the same phrase.

    As in the reference, the sample itself may be drawn, and a phrase that occurs once gets an empty (grey)
    image; the published numbers were made so.

    Args:
        dataset: as ``phrase_queries``.
        style: of the visual prompt.
        limit: as ``phrase_queries``; examples come from the whole split all the same.
        seed: names the draw, which is of each sample alone.
    """
    samples = _phrase_samples(dataset)
    same: dict[str, list[PhraseSample]] = {}
    for sample in samples:
        same.setdefault(sample.phrase, []).append(sample)

    def example(sample: PhraseSample) -> PhraseSample | None:
        choices = same[sample.phrase]
        # Seeded with text, Python's generator gives the same on every version and machine.
        rng = random.Random(f"phrasecut/{seed}/{sample.name}")
        return rng.choice(choices) if len(choices) > 1 else None

    return [
        partial(_phrase_image_query, dataset, first, group, [example(sample) for sample in group], style)
        for first, group in _by_image(dataset, limit or None)
    ]


def _phrase_query(dataset: PhraseCutDataset, first: int, group: Sequence[PhraseSample]) -> Query:
    return Query(
        image=_phrase_pixels(dataset, group[0]),
        prompts=[sample.phrase for sample in group],
        truths=[_squeezed_labels(dataset.truth(sample)) == 1 for sample in group],
        class_ids=range(first, first + len(group)),
    )


def _phrase_image_query(
    dataset: PhraseCutDataset,
    first: int,
    group: Sequence[PhraseSample],
    examples: Sequence[PhraseSample | None],
    style: str,
) -> Query:
    query = _phrase_query(dataset, first, group)
    prompts = [
        torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)
        if example is None
        else _prompt(_phrase_pixels(dataset, example), _squeezed_labels(dataset.truth(example)) == 1, style)
        for example in examples
    ]
    return Query(query.image, torch.stack(prompts), query.truths, query.class_ids)


def _phrase_pixels(dataset: PhraseCutDataset, sample: PhraseSample) -> Tensor:
    return _pixels(dataset.image(sample), (IMAGE_SIZE, IMAGE_SIZE), align_corners=True)


def _by_image(dataset: PhraseCutDataset, limit: int | None) -> Iterator[tuple[int, list[PhraseSample]]]:
    """The samples of each image, with the position of the first."""
    numbered = enumerate(_phrase_samples(dataset))
    groups = itertools.groupby(numbered, key=lambda pair: pair[1].image_id)
    for _, group in itertools.islice(groups, limit):
        positions, samples = zip(*group, strict=True)
        yield positions[0], list(samples)


def _phrase_samples(dataset: PhraseCutDataset) -> list[PhraseSample]:
    return [sample for sample in dataset.samples if isinstance(sample, PhraseSample)]


# --- one-shot -----------------------------------------------------------------------------------------------


def pascal_queries(
    dataset: Dataset, episodes: Sequence[Episode], *, style: str | None = VISUAL_PROMPT
) -> list[Read]:
    """Pascal-5i in PFENet's geometry, which CLIPSeg measures in.

    An image whose longer side exceeds S is scaled down to it, the sides rounded down to multiples of 8, and
    put on black at the top left. The prediction for that square is stretched to the square of the original
    image's longer side, which is a little off where sides were rounded, and more for images smaller than S.

    Args:
        dataset: ``voc21``; ``ignore_index`` pixels do not count.
        episodes: of one fold; the first support image is used.
        style: of the visual prompt; None asks with the text "a photo of a CLASS.".
    """
    samples = {sample.name: sample for sample in dataset.samples}
    return [partial(_pascal_query, dataset, samples, episode, style) for episode in episodes]


def coco_queries(dataset: Dataset, episodes: Sequence[Episode], *, style: str = VISUAL_PROMPT) -> list[Read]:
    """COCO-20i as CLIPSeg measures it: images and masks of query and support squeezed to S x S.

    Args:
        dataset: ``cocoobject81``.
        episodes: of one fold; the first support image is used.
        style: of the visual prompt.
    """
    samples = {sample.name: sample for sample in dataset.samples}
    return [partial(_coco_query, dataset, samples, episode, style) for episode in episodes]


def _pascal_query(
    dataset: Dataset, samples: Mapping[str, Sample], episode: Episode, style: str | None
) -> Query:
    image, truth = dataset.image_and_truth(samples[episode.query])
    prompts: Sequence[str] | Tensor
    if style is None:
        prompts = [f"a photo of a {VOC_NAMES[episode.class_id - 1]}."]
    else:
        shown, labels = dataset.image_and_truth(samples[episode.support[0]])
        prompts = _prompt(_on_black(shown), _mask_on_black(labels == episode.class_id), style)[None]
    return Query(
        image=_on_black(image),
        prompts=prompts,
        truths=[truth == episode.class_id],
        class_ids=[episode.class_id],
        known=truth != dataset.ignore_index,
    )


def _coco_query(dataset: Dataset, samples: Mapping[str, Sample], episode: Episode, style: str) -> Query:
    pixels, masks = [], []
    for name in (episode.query, episode.support[0]):
        image, truth = dataset.image_and_truth(samples[name])
        pixels.append(_pixels(image, (IMAGE_SIZE, IMAGE_SIZE), antialias=True))  # Pillow's, in the reference
        masks.append(_squeezed_labels(truth) == episode.class_id)
    return Query(
        image=pixels[0],
        prompts=_prompt(pixels[1], masks[1], style)[None],
        truths=[masks[0]],
        class_ids=[episode.class_id],
    )


def _on_black(image: npt.NDArray[np.uint8]) -> Tensor:
    height, width = _fitting(image.shape[0], image.shape[1])
    black = np.zeros((1, 1, 3), np.uint8)
    square = _pixels(black, (1, 1)).expand(3, IMAGE_SIZE, IMAGE_SIZE).clone()
    square[:, :height, :width] = _pixels(image, (height, width))
    return square


def _mask_on_black(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    height, width = _fitting(mask.shape[0], mask.shape[1])
    square = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.bool_)
    square[:height, :width] = _nearest(mask, (height, width)) == 1
    return square


def _fitting(height: int, width: int) -> tuple[int, int]:
    longer = max(height, width)
    if longer <= IMAGE_SIZE:
        return height, width
    ratio = IMAGE_SIZE / longer
    new = (IMAGE_SIZE, int(width * ratio)) if height >= width else (int(height * ratio), IMAGE_SIZE)
    return max(8, new[0] // 8 * 8), max(8, new[1] // 8 * 8)


# --- generalised zero-shot ----------------------------------------------------------------------------------


@torch.inference_mode()
def zero_shot_confusion(
    model: ClipSeg,
    dataset: Dataset,
    *,
    limit: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> npt.NDArray[np.int64]:
    """Confusion of all 21 classes of PASCAL VOC, each asked for by name.

    Image and labels are squeezed to S x S. Every pixel gets the class of the highest probability, the
    background's counting threefold; nothing is undecided.

    Args:
        model: CLIPSeg or a baseline.
        dataset: ``voc21``.
        limit: images at most; 0 is all.
        progress: as ``score``.

    Returns:
        int64 (21, 22), as ``pipeline.metrics.confusion``.
    """
    count = len(ZERO_SHOT_NAMES)
    factors = torch.ones(count, 1, 1, device=model.clip.device)
    factors[0] = BACKGROUND_FACTOR
    conditionals = model.encode_text(ZERO_SHOT_NAMES)
    samples = dataset.samples[: limit or None]
    reads = [partial(_zero_shot_pair, dataset, sample) for sample in samples]
    confusion = np.zeros((count, count + 1), np.int64)
    for done, (pixels, truth) in enumerate(_read_ahead(reads), start=1):
        logits = model(_placed(pixels[None], model), conditionals)[0]
        predicted = (logits.sigmoid() * factors).argmax(0).cpu().numpy()
        confusion += confusion_matrix(truth, predicted, count, ignore_index=dataset.ignore_index)
        progress(done, len(reads))
    return confusion


def zero_shot_metrics(confusion: npt.NDArray[np.int64], unseen: Collection[int]) -> dict[str, float]:
    """``miou_seen``, ``miou_unseen``, ``hiou`` and ``miou`` in [0, 1].

    A class that is neither true nor predicted anywhere counts as 0, as in the scorer of the paper.

    Args:
        confusion: of ``zero_shot_confusion``.
        unseen: class ids; all others, background among them, are seen.
    """
    seen = [number for number in range(len(confusion)) if number not in unseen]
    of_seen = mean_iou(confusion, seen, absent="zero")
    of_unseen = mean_iou(confusion, sorted(unseen), absent="zero")
    return {
        "miou_seen": of_seen,
        "miou_unseen": of_unseen,
        "hiou": harmonic_iou(of_seen, of_unseen),
        "miou": mean_iou(confusion, absent="zero"),
    }


def _zero_shot_pair(dataset: Dataset, sample: Sample) -> tuple[Tensor, Labels]:
    image, truth = dataset.image_and_truth(sample)
    return _pixels(image, (IMAGE_SIZE, IMAGE_SIZE)), _squeezed_labels(truth)


# --- common parts -------------------------------------------------------------------------------------------


def _pixels(
    image: npt.NDArray[np.uint8],
    size: tuple[int, int],
    *,
    align_corners: bool = False,
    antialias: bool = False,
) -> Tensor:
    """Bilinear resize and ImageNet statistics: uint8 RGB (H, W, 3) to fp32 (3, *size)."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    # PyTorch does not take both options; antialiasing has no aligned corners.
    x = F.interpolate(x, size, mode="bilinear", align_corners=align_corners, antialias=antialias)
    return normalize(x)[0]


def _nearest(labels: npt.NDArray[np.generic], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Nearest neighbour as PyTorch takes it, which OpenCV's is as well; ids up to 2**24 are exact."""
    x = torch.from_numpy(labels.astype(np.float32))[None, None]
    return F.interpolate(x, size, mode="nearest")[0, 0].numpy()


def _squeezed_labels(labels: Labels) -> Labels:
    return _nearest(labels, (IMAGE_SIZE, IMAGE_SIZE)).astype(labels.dtype)


def _prompt(pixels: Tensor, mask: npt.NDArray[np.bool_], style: str) -> Tensor:
    return visual_prompt(pixels[None], torch.from_numpy(mask)[None], style)[0]


def _conditionals(model: ClipSeg, prompts: Sequence[str] | Tensor, texts: dict[str, Tensor]) -> Tensor:
    """(P, E); texts that were embedded before are kept in ``texts``."""
    if isinstance(prompts, Tensor):
        return torch.cat(
            [
                model.encode_prompt_images(_placed(part, model))
                for part in prompts.split(_PROMPT_IMAGES_AT_ONCE)
            ]
        )
    new = [text for text in dict.fromkeys(prompts) if text not in texts]
    if new:
        texts.update(zip(new, model.encode_text(new), strict=True))
    return torch.stack([texts[text] for text in prompts])


def _placed(pixels: Tensor, model: ClipSeg) -> Tensor:
    return pixels.to(model.clip.device, model.clip.dtype)


def _stretched(probability: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(S, S) to ``shape``; see ``Query.truths``."""
    side = max(shape)
    if side != len(probability):
        probability = F.interpolate(
            probability[None, None], (side, side), mode="bilinear", align_corners=True
        )[0, 0]
    return probability[: shape[0], : shape[1]]


def _read_ahead(reads: Sequence[Callable[[], _Item]]) -> Iterator[_Item]:
    """What the functions return, in order, with a few of them at work in threads."""
    waiting: deque[Future[_Item]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            for read in reads:
                waiting.append(pool.submit(read))
                if len(waiting) >= _READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()
