"""CLIPSeg's protocols against recomputations: other resizing code, one prompt at a time, plain counting."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import map_coordinates
from sklearn.metrics import confusion_matrix as sklearn_confusion
from torch import Tensor

from models.clip.loading import Activations, load_source
from models.clip.weights import OPENAI_MEAN, OPENAI_STD, WeightSource
from models.clipseg.decoder import ClipSeg, build_clipseg
from models.clipseg.visual_prompts import STYLES
from models.errors import MaskMillError
from models.settings import ClipSegConfig
from pipeline.datasets.oneshot import Episode
from pipeline.datasets.phrasecut import PhraseCutDataset, PhraseSample, open_phrasecut
from pipeline.datasets.voc import open_voc
from pipeline.evaluation.prompts.protocols import (
    ZERO_SHOT_NAMES,
    Query,
    answers,
    coco_queries,
    pascal_queries,
    phrase_image_queries,
    phrase_queries,
    score,
    total,
    zero_shot_confusion,
    zero_shot_metrics,
)
from pipeline.metrics.breakdown import OBJECT_SIZE, PHRASE, PROMPT, WORDS, break_down, size_group
from pipeline.metrics.foreground import THRESHOLDS, ForegroundStatistics

S = 352
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def tiny_clipseg() -> ClipSeg:
    """Random weights whose probabilities spread over all thresholds and differ between prompts."""
    clip = load_source(WeightSource("small", "random:0", SMALL, None, 0, OPENAI_MEAN, OPENAI_STD))
    config = ClipSegConfig(reduce_dim=8, extract_layers=(0, 1, 2), feedforward=16, heads=2)
    model = build_clipseg(clip, config)
    with torch.no_grad():
        model.decoder.film_mul.weight.mul_(4)
        model.decoder.film_add.weight.mul_(4)
        head = model.decoder.get_submodule("trans_conv")
        head.get_parameter("weight").mul_(8)
        head.get_parameter("bias").fill_(-1.5)
    return model


@pytest.fixture(scope="module")
def model() -> ClipSeg:
    return tiny_clipseg()


def picture(height: int, width: int, seed: int) -> bytes:
    """A JPEG of coloured blotches."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write(root: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, np.ndarray):
            Image.fromarray(content).save(path)
        else:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            path.write_bytes(data)
    return root


def box(left: int, top: int, width: int, height: int) -> list[list[int]]:
    return [[left, top], [left + width, top], [left + width, top + height], [left, top + height]]


def write_phrasecut(root: Path) -> Path:
    """Three images, five phrases: one of them three times, two once."""
    sizes = {3: (60, 90), 7: (120, 80), 9: (70, 70)}
    shown = [(3, "red dog", box(10, 5, 40, 30)), (3, "tall tree", box(50, 20, 30, 35)),
             (7, "red dog", box(20, 40, 50, 60)), (9, "red dog", box(5, 30, 25, 30)),
             (9, "old car", box(40, 10, 20, 45))]  # fmt: skip
    tasks = [
        {"task_id": f"{image}__{number}", "image_id": image, "phrase": phrase,
         "phrase_structure": {"name": "x", "attributes": ["y"] if "dog" in phrase else []},
         "instance_boxes": [[0, 0, 9, 9]], "Polygons": [[polygon]]}
        for number, (image, phrase, polygon) in enumerate(shown)
    ]  # fmt: skip
    return write(
        root,
        {
            "refer_test.json": tasks,
            "image_data_split.json": [
                {"image_id": image, "height": h, "width": w} for image, (h, w) in sizes.items()
            ],
        }
        | {f"images/{image}.jpg": picture(h, w, image) for image, (h, w) in sizes.items()},
    )


def write_voc(root: Path, sizes: dict[str, tuple[int, int]], labels: dict[str, np.ndarray]) -> Path:
    files: dict[str, Any] = {"ImageSets/Segmentation/val.txt": "\n".join(sizes).encode()}
    for number, (name, (height, width)) in enumerate(sizes.items()):
        files[f"JPEGImages/{name}.jpg"] = picture(height, width, 50 + number)
        files[f"SegmentationClass/{name}.png"] = labels[name]
    return write(root, files)


@pytest.fixture(scope="module")
def phrasecut(tmp_path_factory: pytest.TempPathFactory) -> PhraseCutDataset:
    return open_phrasecut(str(write_phrasecut(tmp_path_factory.mktemp("phrasecut"))))


# --- recomputation ------------------------------------------------------------------------------------------


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Corners on corners, by SciPy."""
    rows = np.linspace(0, image.shape[0] - 1, height)
    columns = np.linspace(0, image.shape[1] - 1, width)
    grid = np.meshgrid(rows, columns, indexing="ij")
    flat = image.reshape(*image.shape[:2], -1).astype(np.float64)
    channels = [map_coordinates(flat[..., c], grid, order=1) for c in range(flat.shape[2])]
    return np.stack(channels, -1).reshape(height, width, *image.shape[2:])


def nearest(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = np.arange(height) * labels.shape[0] // height
    return labels[rows][:, np.arange(width) * labels.shape[1] // width]


def normalised(image: np.ndarray) -> Tensor:
    return torch.from_numpy((image / 255 - MEAN) / STD).permute(2, 0, 1).float()


@torch.no_grad()
def probability(model: ClipSeg, image: Tensor, prompt: str | Tensor) -> np.ndarray:
    """One image, one prompt."""
    condition = (
        model.encode_text([prompt]) if isinstance(prompt, str) else model.encode_prompt_images(prompt[None])
    )
    logits = model(image[None], condition)[0, 0].numpy()
    return 1 / (1 + np.exp(-logits))


def counts(p: np.ndarray, truth: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """(T, 4)."""
    if known is not None:
        p, truth = p[known], truth[known]
    rows = []
    for threshold in THRESHOLDS:
        above = p > np.float32(threshold)
        rows.append([(above & truth).sum(), (above & ~truth).sum(), (~above & truth).sum(),
                     (~above & ~truth).sum()])  # fmt: skip
    return np.array(rows)


def assert_counts(found: ForegroundStatistics, expected: Sequence[np.ndarray], ids: Sequence[int]) -> None:
    """Equal but for pixels that rounding moves over a threshold: 3 in 10,000."""
    assert found.class_ids.tolist() == sorted(set(ids))
    for number, theirs in zip(found.class_ids, found.counts, strict=True):
        ours = sum(part for part, own in zip(expected, ids, strict=True) if own == number)
        assert theirs.sum() == ours.sum()
        assert np.abs(theirs - ours).max() <= 3e-4 * ours[0].sum() + 2
    # Constant predictions would pass whatever the protocol.
    spread = found.counts.sum(0)[:, :2].sum(1) / found.counts.sum(0).sum(1)
    assert ((spread > 0.02) & (spread < 0.98)).sum() > 5


def squeezed(dataset: PhraseCutDataset, sample: PhraseSample) -> tuple[Tensor, np.ndarray]:
    image = normalised(bilinear(dataset.image(sample), S, S))
    return image, nearest(dataset.truth(sample), S, S) == 1


# --- PhraseCut ----------------------------------------------------------------------------------------------


def test_phrases_are_scored_at_352_squeezed(model: ClipSeg, phrasecut: PhraseCutDataset) -> None:
    told: list[tuple[int, int]] = []
    found = score(model, phrase_queries(phrasecut), progress=lambda *step: told.append(step))
    assert told == [(1, 3), (2, 3), (3, 3)]
    expected = []
    for sample in phrasecut.samples:
        assert isinstance(sample, PhraseSample)
        image, truth = squeezed(phrasecut, sample)
        expected.append(counts(probability(model, image, sample.phrase), truth))
    assert_counts(found, expected, range(5))


def test_another_image_size_is_measured_on_the_same_masks(
    model: ClipSeg, phrasecut: PhraseCutDataset
) -> None:
    found = score(model, phrase_queries(phrasecut, side=96))
    expected = []
    for sample in phrasecut.samples:
        assert isinstance(sample, PhraseSample)
        p = probability(model, normalised(bilinear(phrasecut.image(sample), 96, 96)), sample.phrase)
        expected.append(counts(bilinear(p, S, S).astype(np.float32), squeezed(phrasecut, sample)[1]))
    assert_counts(found, expected, range(5))


def test_groups_of_phrases(model: ClipSeg, phrasecut: PhraseCutDataset) -> None:
    found = answers(model, phrase_queries(phrasecut))
    samples = [sample for sample in phrasecut.samples if isinstance(sample, PhraseSample)]
    for answer, sample in zip(found, samples, strict=True):
        assert answer.groups == {
            OBJECT_SIZE: size_group(phrasecut.truth(sample) == 1),
            PROMPT: "text",
            WORDS: "2 words",
            PHRASE: "with attribute" if sample.phrase == "red dog" else "name alone",
        }
    assert len({answer.groups[OBJECT_SIZE] for answer in found}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("style", ["crop_blur_highlight352", "blur_highlight"])
def test_phrases_are_shown_by_a_sample_of_the_same_phrase(
    style: str, model: ClipSeg, phrasecut: PhraseCutDataset
) -> None:
    samples = [sample for sample in phrasecut.samples if isinstance(sample, PhraseSample)]
    made = {}
    for sample in samples:
        image, mask = squeezed(phrasecut, sample)
        made[sample.name] = STYLES[style](image[None], torch.from_numpy(mask)[None])[0]

    def shown(seed: int) -> list[str | None]:
        """Name of the example of each sample; None for the grey image."""
        names: list[str | None] = []
        for read in phrase_image_queries(phrasecut, style=style, seed=seed):
            for prompt in read().prompts:
                assert isinstance(prompt, Tensor)
                close = [name for name, like in made.items() if (prompt - like).abs().mean() < 1e-3]
                assert len(close) == bool(prompt.any())
                names.append(close[0] if close else None)
        return names

    draws = [shown(seed) for seed in range(4)]
    assert shown(3) == draws[3]
    dogs = {sample.name for sample in samples if sample.phrase == "red dog"}
    for number, sample in enumerate(samples):
        drawn = {names[number] for names in draws}
        # Four draws of three, itself among them; a phrase that occurs once has nothing to be shown by.
        assert drawn <= dogs and len(drawn) > 1 if sample.name in dogs else drawn == {None}
    found = score(model, phrase_image_queries(phrasecut, style=style, seed=3))
    expected = []
    for sample, name in zip(samples, draws[3], strict=True):
        image, truth = squeezed(phrasecut, sample)
        prompt = torch.zeros(3, S, S) if name is None else made[name]
        expected.append(counts(probability(model, image, prompt), truth))
    assert_counts(found, expected, range(5))


def test_the_tower_runs_once_per_image_and_each_text_is_embedded_once(phrasecut: PhraseCutDataset) -> None:
    class Counting(ClipSeg):
        images, decoded, texts = 0, (), ()

        def encode_image(self, pixels: Tensor) -> Activations:
            self.images += len(pixels)
            return super().encode_image(pixels)

        def decode(self, activations: Activations, conditionals: Tensor, **options: Any) -> Tensor:
            self.decoded += (len(conditionals),)
            return super().decode(activations, conditionals, **options)

        def encode_text(self, prompts: Sequence[str]) -> Tensor:
            self.texts += tuple(prompts)
            return super().encode_text(prompts)

    plain = tiny_clipseg()
    counting = Counting(plain.clip, plain.decoder)
    limited = score(counting, phrase_queries(phrasecut, limit=2))
    assert (counting.images, counting.decoded, counting.texts) == (2, (2, 1), ("red dog", "tall tree"))
    assert limited.class_ids.tolist() == [0, 1, 2]


def test_errors_of_reading_come_through(model: ClipSeg) -> None:
    def broken() -> Query:
        raise MaskMillError("dataset_invalid", "a.jpg cannot be read", "Get it again.")

    with pytest.raises(MaskMillError, match=r"a\.jpg"):
        score(model, [broken])
    assert len(score(model, []).class_ids) == 0


# --- one-shot -----------------------------------------------------------------------------------------------

SIZES = {"large": (400, 300), "wide": (190, 371), "small": (100, 60)}


def voc_labels(name: str, height: int, width: int) -> np.ndarray:
    labels = np.zeros((height, width), np.uint8)
    labels[height // 5 : height // 2, width // 4 : -width // 5] = 3
    labels[height // 2 :, : width // 3] = 9
    labels[:7] = labels[:, -5:] = 255
    return labels


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("voc")
    write_voc(root, SIZES, {name: voc_labels(name, *size) for name, size in SIZES.items()})
    return open_voc(str(root))


def on_black(image: np.ndarray, interpolation: int, fill: float) -> np.ndarray:
    """The longer side to 352 if it is larger, sides down to multiples of 8; by OpenCV."""
    height, width = image.shape[:2]
    if max(height, width) > S:
        ratio = S / max(height, width)
        height, width = (int(side * ratio + 1e-9) // 8 * 8 for side in (height, width))
    square = np.full((S, S, *image.shape[2:]), fill, np.float32)
    square[:height, :width] = cv2.resize(
        image.astype(np.float32), (width, height), interpolation=interpolation
    )
    return square


def test_a_text_next_to_an_image_prompt_is_in_no_total(model: ClipSeg, voc: Any) -> None:
    for queries, class_names in ((pascal_queries, ["bird", "chair"]), (coco_queries, ["bird", "chair"])):
        found = answers(model, queries(voc, EPISODES, also_text=True))
        assert [answer.uncounted for answer in found] == [False, True] * 3
        alone = answers(model, queries(voc, EPISODES))
        for one, other in zip(found[::2], alone, strict=True):
            assert one.groups == other.groups
            # Two prompts in one matrix product round differently: a few pixels cross a threshold.
            assert np.abs(one.statistics.counts - other.statistics.counts).max() <= 40
        assert (total(found).counts.sum() == total(alone).counts.sum()).all()
        parts = break_down((answer.statistics, answer.groups) for answer in found)
        assert {name: group.prompts for name, group in parts[PROMPT].items()} == {"text": 3, "image": 3}
        assert list(parts["class"]) == class_names
        if queries is pascal_queries:
            by_text = score(model, pascal_queries(voc, EPISODES, style=None)).counts.sum(0)
            assert np.abs(parts[PROMPT]["text"].statistics.counts[0] - by_text).max() <= 120


EPISODES = [Episode("large", ("small",), 3), Episode("small", ("wide",), 9), Episode("wide", ("large",), 3)]


@pytest.mark.parametrize("style", ["crop_blur_highlight352", None])
def test_pascal_in_pfenet_geometry(style: str | None, model: ClipSeg, voc: Any) -> None:
    by_name = {sample.name: sample for sample in voc.samples}
    expected = []
    for episode in EPISODES:
        image = normalised(on_black(voc.image(by_name[episode.query]), cv2.INTER_LINEAR, 0))
        prompt: str | Tensor = f"a photo of a {'bird' if episode.class_id == 3 else 'chair'}."
        if style is not None:
            support = by_name[episode.support[0]]
            mask = on_black(voc.truth(support), cv2.INTER_NEAREST, 255) == episode.class_id
            shown = normalised(on_black(voc.image(support), cv2.INTER_LINEAR, 0))
            prompt = STYLES[style](shown[None], torch.from_numpy(mask)[None])[0]
        truth = voc.truth(by_name[episode.query])
        longer = max(truth.shape)
        padded = np.full((longer, longer), 255, np.uint8)
        padded[: truth.shape[0], : truth.shape[1]] = truth
        p = bilinear(probability(model, image, prompt), longer, longer)
        expected.append(counts(p, padded == episode.class_id, padded != 255))
    found = score(model, pascal_queries(voc, EPISODES, style=style))
    assert_counts(found, expected, [episode.class_id for episode in EPISODES])


@pytest.mark.parametrize("side", [176, 416, 704])
@pytest.mark.parametrize("name", SIZES)
def test_at_another_size_an_image_covers_the_same_share_of_the_square(name: str, side: int, voc: Any) -> None:
    (image,) = (voc.image(sample) for sample in voc.samples if sample.name == name)
    usual = on_black(np.ones(image.shape[:2]), cv2.INTER_NEAREST, 0)
    height, width = (round(usual.any(axis).sum() * side / S) for axis in (1, 0))
    expected = np.zeros((side, side, 3))
    expected[:height, :width] = cv2.resize(image.astype(np.float32), (width, height))
    (read,) = pascal_queries(voc, [Episode(name, ("wide",), 3)], style=None, side=side)
    torch.testing.assert_close(read().image, normalised(expected), atol=1e-3, rtol=0)


def test_coco_squeezes_query_and_support(model: ClipSeg, voc: Any) -> None:
    # The reading of COCO's files is tested with the datasets; any set with masks has the geometry.
    by_name = {sample.name: sample for sample in voc.samples}
    for read, episode in zip(coco_queries(voc, EPISODES), EPISODES, strict=True):
        pixels, masks = [], []
        for name in (episode.query, episode.support[0]):
            small = Image.fromarray(voc.image(by_name[name])).resize((S, S), Image.Resampling.BILINEAR)
            pixels.append(normalised(np.asarray(small)))
            masks.append(nearest(voc.truth(by_name[name]), S, S) == episode.class_id)
        query = read()
        # Pillow rounds to whole grey values, once along each axis.
        assert (query.image - pixels[0]).abs().max() < 1.6 / 255 / STD.min()
        np.testing.assert_array_equal(query.truths[0], masks[0])
        like = STYLES["crop_blur_highlight352"](pixels[1][None], torch.from_numpy(masks[1])[None])
        (prompt,) = query.prompts
        assert isinstance(prompt, Tensor)
        assert (prompt - like[0]).abs().max() < 1.6 / 255 / STD.min()
    found = score(model, coco_queries(voc, EPISODES))
    assert found.counts[:, 0].sum() == 3 * S * S


# --- generalised zero-shot ----------------------------------------------------------------------------------


def test_zero_shot_takes_the_highest_of_21_names(model: ClipSeg, voc: Any) -> None:
    assert ZERO_SHOT_NAMES[:2] == ("background", "airplane")
    assert [ZERO_SHOT_NAMES[number] for number in (11, 14, 16, 20)] == [
        "diningtable", "motorbike", "pottedplant", "tvmonitor",
    ]  # fmt: skip
    expected = np.zeros((21, 21), int)
    for sample in voc.samples[:2]:
        # Half pixel centres without antialiasing, as OpenCV does it.
        image = normalised(cv2.resize(voc.image(sample).astype(np.float32), (S, S)))
        scores = np.stack([probability(model, image, name) for name in ZERO_SHOT_NAMES])
        scores[0] *= 3
        truth = nearest(voc.truth(sample), S, S)
        known = truth != 255
        expected += sklearn_confusion(truth[known], scores.argmax(0)[known], labels=range(21))
    found = zero_shot_confusion(model, voc, limit=2)
    assert found[:, 21].sum() == 0 and found.sum() == expected.sum()
    assert np.abs(found[:, :21] - expected).sum() <= 1e-3 * expected.sum()
    assert len(np.flatnonzero(found.sum(0))) > 1, "all of one class shows no mistake"

    # NaN counts 0 and stays in the mean.
    iou = {
        k: expected[k, k] / max(1, expected[k].sum() + expected[:, k].sum() - expected[k, k])
        for k in range(21)
    }
    metrics = zero_shot_metrics(found, (3, 9))
    assert metrics["miou_unseen"] == pytest.approx((iou[3] + iou[9]) / 2, abs=1e-3)
    assert metrics["miou_seen"] == pytest.approx((sum(iou.values()) - iou[3] - iou[9]) / 19, abs=1e-3)
    assert metrics["miou"] == pytest.approx(sum(iou.values()) / 21, abs=1e-3)
    product = metrics["miou_seen"] * metrics["miou_unseen"]
    total = metrics["miou_seen"] + metrics["miou_unseen"]
    assert metrics["hiou"] == pytest.approx(2 * product / total if total else 0)
