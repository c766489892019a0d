"""CLIPSeg's protocols (arXiv 2112.10003, §5): the model's input on each benchmark, and what is counted.

A benchmark is a list of functions that each read one ``Query``: an image, its prompts, and the true mask of
every prompt. ``answers`` runs a model over them and counts each prompt; ``score`` sums. The resizing follows
the code behind the published numbers, including its oddities; comments say where.

``side`` changes the size of the image for the network. Example images and true masks keep their size, so that
figures at different sizes cover the same pixels.

Shapes: P prompts of an image, S = 352, H W pixels at the image's original size.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from models.clipseg.decoder import IMAGE_SIZE, ClipSeg
from pipeline.datasets.base import Dataset, Labels, Sample
from pipeline.datasets.oneshot import Episode
from pipeline.datasets.phrasecut import PhraseCutDataset, PhraseSample
from pipeline.evaluation.prompts.pixels import (
    example_prompt,
    mask_on_black,
    on_black,
    pixels,
    squeezed_labels,
)
from pipeline.metrics.breakdown import CLASS, OBJECT_SIZE, PROMPT, Groups, phrase_groups, size_group
from pipeline.metrics.confusion import confusion_matrix, harmonic_iou, mean_iou
from pipeline.metrics.foreground import ForegroundStatistics

VISUAL_PROMPT = "crop_blur_highlight352"
"""The paper's style of image prompts (``models.clipseg.visual_prompts``)."""

VOC_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""PASCAL VOC's spellings, used in the text prompts of Pascal-5i; class i is ``VOC_NAMES[i - 1]``."""
ZERO_SHOT_NAMES = ("background", "airplane", *VOC_NAMES[1:])
"""Prompts of generalised zero-shot segmentation by class id, in JoEm's spelling."""
BACKGROUND_FACTOR = 3.0
"""Factor on the background's probability before the argmax."""
RELEASED_SCORER: Mapping[str, str] = {"pascal-unseen10": "voc21", "pascal-unseen4": "pascal-unseen2"}
"""The split (``pipeline.datasets.zeroshot``) that the released scorer uses by mistake, by intended split. It
takes the number of pairs withheld from training, 5 and 2, for the number of unseen classes."""

_PROMPT_IMAGES_AT_ONCE = 8
_READERS, _READ_AHEAD = 4, 8
_Item = TypeVar("_Item")


Prompts = Sequence[str | Tensor]
"""P texts in the form that the text tower receives, or example images, float32 (3, S, S)."""


@dataclass(frozen=True, eq=False)
class Query:
    """An image and its prompts.

    Attributes:
        image: float32 (3, side, side), ImageNet-normalised.
        prompts: P texts or example images.
        truths: P masks, bool (S, S) or (H, W). For the latter, the prediction is stretched to a square of
            side max(H, W) and cropped.
        class_ids: P ids, see ``ForegroundStatistics``.
        known: the pixels that count, bool, in the shape of ``truths``; None for all.
        groups: the groups of each prompt (``pipeline.metrics.breakdown``), except object size, which comes
            from the truth; empty for none.
        uncounted: number of prompts at the end that are for comparison only and excluded from totals.
    """

    image: Tensor
    prompts: Prompts
    truths: Sequence[npt.NDArray[np.bool_]]
    class_ids: Sequence[int]
    known: npt.NDArray[np.bool_] | None = None
    groups: Sequence[Groups] = ()
    uncounted: int = 0


Read = Callable[[], Query]


@dataclass(frozen=True, eq=False)
class Answer:
    """The counts and groups of one prompt; ``uncounted`` if it is for comparison only."""

    statistics: ForegroundStatistics
    groups: Groups = field(default_factory=dict)
    uncounted: bool = False


@torch.inference_mode()
def answers(
    model: ClipSeg,
    queries: Sequence[Read],
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Answer]:
    """Run a model over a benchmark and count each prompt separately.

    The vision tower runs once per query, and the decoder takes all its prompts in one batch. Threads read a
    few queries ahead, which bounds the memory.

    Args:
        model: CLIPSeg or a baseline.
        queries: from one of the functions below.
        progress: called with the number of queries done and in total.

    Raises:
        MaskMillError: ``prompt_invalid``, and errors from reading the data.
    """
    found = []
    texts: dict[str, Tensor] = {}
    for done, query in enumerate(_read_ahead(queries), start=1):
        conditionals = _conditionals(model, query.prompts, texts)
        logits = model(_to_model(query.image[None], model), conditionals)[0]
        groups = query.groups or [{}] * len(logits)
        first_uncounted = len(logits) - query.uncounted
        prompts = zip(logits.sigmoid(), query.truths, query.class_ids, groups, strict=True)
        for number, (probability, truth, class_id, known_groups) in enumerate(prompts):
            fitted = _stretched(probability, truth.shape).cpu().numpy()
            statistics = ForegroundStatistics.of(fitted, truth, class_id, known=query.known)
            uncounted = number >= first_uncounted
            size = {} if uncounted else {OBJECT_SIZE: size_group(truth)}
            found.append(Answer(statistics, {**size, **known_groups}, uncounted))
        progress(done, len(queries))
    return found


def total(found: Sequence[Answer]) -> ForegroundStatistics:
    """Sum of all answers that are not ``uncounted``."""
    return ForegroundStatistics.merge(answer.statistics for answer in found if not answer.uncounted)


def score(
    model: ClipSeg,
    queries: Sequence[Read],
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> ForegroundStatistics:
    """``total`` of ``answers``."""
    return total(answers(model, queries, progress=progress))


# --- PhraseCut ----------------------------------------------------------------------------------------------


def phrase_queries(dataset: PhraseCutDataset, *, limit: int = 0, side: int = IMAGE_SIZE) -> list[Read]:
    """PhraseCut by text: the phrase as written, image and mask squeezed to S x S, no negatives.

    Class ids are positions in the dataset, so that mIoU is the mean IoU of the samples.

    Args:
        dataset: PhraseCut, with the samples of an image next to each other.
        limit: maximum number of images; 0 for all.
        side: side of the network's input.
    """
    return [
        partial(_phrase_query, dataset, first, group, side)
        for first, group in _by_image(dataset, limit or None)
    ]


def phrase_image_queries(
    dataset: PhraseCutDataset,
    *,
    style: str = VISUAL_PROMPT,
    limit: int = 0,
    seed: int = 0,
    side: int = IMAGE_SIZE,
) -> list[Read]:
    """PhraseCut by example image: each phrase gets an example from the split's samples with that phrase.

    As in the reference behind the published numbers, the sample itself may be drawn, and a phrase that occurs
    only once gets an empty (grey) image.

    Args:
        dataset: PhraseCut, with the samples of an image next to each other.
        style: style of the visual prompt.
        limit: maximum number of images; 0 for all. Examples come from the whole split either way.
        seed: seed for the examples, which are drawn independently for each sample.
        side: side of the network's input.
    """
    samples = _phrase_samples(dataset)
    same: dict[str, list[PhraseSample]] = {}
    for sample in samples:
        same.setdefault(sample.phrase, []).append(sample)

    def example(sample: PhraseSample) -> PhraseSample | None:
        choices = same[sample.phrase]
        # Python's generator, seeded with a string, gives the same numbers on every version and machine.
        rng = random.Random(f"phrasecut/{seed}/{sample.name}")
        return rng.choice(choices) if len(choices) > 1 else None

    return [
        partial(
            _phrase_image_query, dataset, first, group, [example(sample) for sample in group], style, side
        )
        for first, group in _by_image(dataset, limit or None)
    ]


def _phrase_query(dataset: PhraseCutDataset, first: int, group: Sequence[PhraseSample], side: int) -> Query:
    return Query(
        image=_phrase_pixels(dataset, group[0], side),
        prompts=[sample.phrase for sample in group],
        truths=[squeezed_labels(dataset.truth(sample)) == 1 for sample in group],
        class_ids=range(first, first + len(group)),
        groups=[
            {PROMPT: "text"}
            | phrase_groups(sample.phrase, attribute=sample.attribute, relation=sample.relation)
            for sample in group
        ],
    )


def _phrase_image_query(
    dataset: PhraseCutDataset,
    first: int,
    group: Sequence[PhraseSample],
    examples: Sequence[PhraseSample | None],
    style: str,
    side: int,
) -> Query:
    query = _phrase_query(dataset, first, group, side)
    prompts = [
        torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)
        if example is None
        else example_prompt(
            _phrase_pixels(dataset, example, IMAGE_SIZE), squeezed_labels(dataset.truth(example)) == 1, style
        )
        for example in examples
    ]
    return replace(query, prompts=prompts, groups=[{PROMPT: "image"}] * len(group))


def _phrase_pixels(dataset: PhraseCutDataset, sample: PhraseSample, side: int) -> Tensor:
    return pixels(dataset.image(sample), (side, side), align_corners=True)


def _by_image(dataset: PhraseCutDataset, limit: int | None) -> Iterator[tuple[int, list[PhraseSample]]]:
    """Yield the samples of each image, with the position of the first."""
    numbered = enumerate(_phrase_samples(dataset))
    groups = itertools.groupby(numbered, key=lambda pair: pair[1].image_id)
    for _, group in itertools.islice(groups, limit):
        positions, samples = zip(*group, strict=True)
        yield positions[0], list(samples)


def _phrase_samples(dataset: PhraseCutDataset) -> list[PhraseSample]:
    return [sample for sample in dataset.samples if isinstance(sample, PhraseSample)]


# --- one-shot -----------------------------------------------------------------------------------------------


def pascal_queries(
    dataset: Dataset,
    episodes: Sequence[Episode],
    *,
    style: str | None = VISUAL_PROMPT,
    also_text: bool = False,
    side: int = IMAGE_SIZE,
) -> list[Read]:
    """Pascal-5i in PFENet's geometry (``pixels.on_black``), as CLIPSeg evaluates it.

    The prediction for the square is stretched to a square with the original image's longer side. This is
    slightly off where sides were rounded, and more so for images smaller than S, at every ``side``.

    Args:
        dataset: ``voc21``; ``ignore_index`` pixels do not count.
        episodes: those of one fold; only the first support image is used.
        style: style of the visual prompt; None for the text prompt "a photo of a CLASS.".
        also_text: with a style, add the text prompt for comparison only.
        side: side of the network's input.
    """
    samples = {sample.name: sample for sample in dataset.samples}
    return [partial(_pascal_query, dataset, samples, episode, style, also_text, side) for episode in episodes]


def coco_queries(
    dataset: Dataset,
    episodes: Sequence[Episode],
    *,
    style: str = VISUAL_PROMPT,
    also_text: bool = False,
    side: int = IMAGE_SIZE,
) -> list[Read]:
    """COCO-20i as CLIPSeg evaluates it: images and masks of query and support are squeezed to S x S.

    Args:
        dataset: ``cocoobject81``.
        episodes: those of one fold; only the first support image is used.
        style: style of the visual prompt.
        also_text: add the class name as a text prompt for comparison only.
        side: side of the network's input.
    """
    samples = {sample.name: sample for sample in dataset.samples}
    return [partial(_coco_query, dataset, samples, episode, style, also_text, side) for episode in episodes]


def _pascal_query(
    dataset: Dataset,
    samples: Mapping[str, Sample],
    episode: Episode,
    style: str | None,
    also_text: bool,
    side: int,
) -> Query:
    image, truth = dataset.image_and_truth(samples[episode.query])
    text = f"a photo of a {VOC_NAMES[episode.class_id - 1]}."
    example = None
    if style is not None:
        shown, labels = dataset.image_and_truth(samples[episode.support[0]])
        example = example_prompt(on_black(shown), mask_on_black(labels == episode.class_id), style)
    return _episode_query(
        on_black(image, side),
        truth == episode.class_id,
        episode.class_id,
        VOC_NAMES[episode.class_id - 1],
        example,
        text if example is None or also_text else None,
        known=truth != dataset.ignore_index,
    )


def _coco_query(
    dataset: Dataset, samples: Mapping[str, Sample], episode: Episode, style: str, also_text: bool, side: int
) -> Query:
    image, truth = dataset.image_and_truth(samples[episode.query])
    shown, labels = dataset.image_and_truth(samples[episode.support[0]])
    name = dataset.class_names[episode.class_id]
    square = (IMAGE_SIZE, IMAGE_SIZE)
    return _episode_query(
        pixels(image, (side, side), antialias=True),  # the reference resizes with Pillow
        squeezed_labels(truth) == episode.class_id,
        episode.class_id,
        name,
        example_prompt(
            pixels(shown, square, antialias=True), squeezed_labels(labels) == episode.class_id, style
        ),
        name if also_text else None,
    )


def _episode_query(
    image: Tensor,
    truth: npt.NDArray[np.bool_],
    class_id: int,
    name: str,
    example: Tensor | None,
    text: str | None,
    *,
    known: npt.NDArray[np.bool_] | None = None,
) -> Query:
    """A query for one class by example, by text, or by both, in which case the text is uncounted."""
    prompts: dict[str, str | Tensor] = {}
    if example is not None:
        prompts["image"] = example
    if text is not None:
        prompts["text"] = text
    count = len(prompts)
    return Query(
        image=image,
        prompts=list(prompts.values()),
        truths=[truth] * count,
        class_ids=[class_id] * count,
        known=known,
        groups=[{PROMPT: kind} | ({CLASS: name} if i == 0 else {}) for i, kind in enumerate(prompts)],
        uncounted=count - 1,
    )


# --- generalised zero-shot ----------------------------------------------------------------------------------


@torch.inference_mode()
def zero_shot_confusion(
    model: ClipSeg,
    dataset: Dataset,
    *,
    limit: int = 0,
    side: int = IMAGE_SIZE,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> npt.NDArray[np.int64]:
    """Confusion matrix of PASCAL VOC's 21 classes, each prompted by name.

    Image and labels are squeezed to S x S. Every pixel gets the class with the highest probability, after the
    background's is multiplied by ``BACKGROUND_FACTOR``; none is left undecided.

    Args:
        model: CLIPSeg or a baseline.
        dataset: ``voc21``.
        limit: maximum number of images; 0 for all.
        side: side of the network's input; probabilities are resized to S.
        progress: called with the number of images done and in total.

    Returns:
        int64 (21, 22), see ``pipeline.metrics.confusion``.
    """
    count = len(ZERO_SHOT_NAMES)
    factors = torch.ones(count, 1, 1, device=model.clip.device)
    factors[0] = BACKGROUND_FACTOR
    conditionals = model.encode_text(ZERO_SHOT_NAMES)
    samples = dataset.samples[: limit or None]
    reads = [partial(_zero_shot_pair, dataset, sample, side) for sample in samples]
    confusion = np.zeros((count, count + 1), np.int64)
    for done, (image, truth) in enumerate(_read_ahead(reads), start=1):
        probabilities = model(_to_model(image[None], model), conditionals)[0].sigmoid()
        predicted = (_stretched(probabilities, truth.shape) * factors).argmax(0).cpu().numpy()
        confusion += confusion_matrix(truth, predicted, count, ignore_index=dataset.ignore_index)
        progress(done, len(reads))
    return confusion


def zero_shot_metrics(confusion: npt.NDArray[np.int64], unseen: Collection[int]) -> dict[str, float]:
    """``miou_seen``, ``miou_unseen``, ``hiou`` and ``miou`` in [0, 1].

    A class without true or predicted pixels counts as 0, as in the paper's scorer.

    Args:
        confusion: from ``zero_shot_confusion``.
        unseen: class ids; all others, including background, are seen.
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


def _zero_shot_pair(dataset: Dataset, sample: Sample, side: int) -> tuple[Tensor, Labels]:
    image, truth = dataset.image_and_truth(sample)
    return pixels(image, (side, side)), squeezed_labels(truth)


# --- shared -------------------------------------------------------------------------------------------------


def _conditionals(model: ClipSeg, prompts: Prompts, texts: dict[str, Tensor]) -> Tensor:
    """Embed prompts into (P, E); ``texts`` caches text embeddings."""
    images = [prompt for prompt in prompts if isinstance(prompt, Tensor)]
    shown = iter(
        [
            row
            for start in range(0, len(images), _PROMPT_IMAGES_AT_ONCE)
            for row in model.encode_prompt_images(
                _to_model(torch.stack(images[start : start + _PROMPT_IMAGES_AT_ONCE]), model)
            )
        ]
    )
    new = [text for text in dict.fromkeys(prompts) if isinstance(text, str) and text not in texts]
    if new:
        texts.update(zip(new, model.encode_text(new), strict=True))
    return torch.stack([texts[prompt] if isinstance(prompt, str) else next(shown) for prompt in prompts])


def _to_model(pixels: Tensor, model: ClipSeg) -> Tensor:
    return pixels.to(model.clip.device, model.clip.dtype)


def _stretched(probability: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Resize (..., S, S) to (..., *shape); see ``Query.truths``."""
    side = max(shape)
    if side != probability.shape[-1]:
        flat = probability.reshape(-1, 1, *probability.shape[-2:])
        flat = F.interpolate(flat, (side, side), mode="bilinear", align_corners=True)
        probability = flat.reshape(*probability.shape[:-2], side, side)
    return probability[..., : shape[0], : shape[1]]


def _read_ahead(reads: Sequence[Callable[[], _Item]]) -> Iterator[_Item]:
    """Yield the functions' results in order, while threads run a few of them ahead."""
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
