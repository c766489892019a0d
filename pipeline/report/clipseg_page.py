"""The page of a trained CLIPSeg or baseline: it answers samples of its own training.

Shapes: S pixels of a training sample, V of CLIP's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.errors import MaskMillError
from pipeline.labelling.clipseg.model import THRESHOLD
from pipeline.metrics.names import percent
from pipeline.report.pictures import Found, heat_map, overlay_mask, overview, tile
from pipeline.report.training_page import SHOWN, Card, TrainingPage, shown, write_page_and_sheet
from pipeline.trained import clipseg as clipseg_folder
from pipeline.trained.clipseg import ClipSegRecord
from pipeline.training.clipseg.sources.base import IGNORED, OBJECT
from pipeline.training.clipseg.triplets import decode_phrase

if TYPE_CHECKING:
    from models.clipseg.decoder import ClipSeg
    from pipeline.training.clipseg.triplets import TripletSamples

_CURVES = {
    "loss": "loss",
    "iou": "IoU at p ≥ 0.5, per batch",
    "learning_rate": "learning rate",
    "found": "share of pixels found",
    "gradient_norm": "gradient norm",
}
_TITLES = {"clipseg": "CLIPSeg", "clip-deconv": "CLIP-Deconv", "vitseg": "ViTSeg"}


@dataclass(frozen=True, eq=False)
class Answer:
    """A training sample and the model's answer.

    Attributes:
        phrase: the words of the prompt; "" for a picture alone.
        text_share: weight of the words in the prompt; the rest is the example's.
        image: uint8 (S, S, 3).
        there: bool (S, S), the truth.
        probability: float (S, S) in [0, 1].
        example: uint8 (V, V, 3), as CLIP sees it, or None.
        known: bool (S, S), where the truth is known; other pixels are not counted. None means everywhere.
    """

    phrase: str
    text_share: float
    image: NDArray[np.uint8]
    there: NDArray[np.bool_]
    probability: NDArray[np.float32]
    example: NDArray[np.uint8] | None = None
    known: NDArray[np.bool_] | None = None

    @property
    def found(self) -> NDArray[np.bool_]:
        """The mask, (S, S), at the default threshold."""
        return np.asarray(self.probability >= THRESHOLD)

    @property
    def heat(self) -> NDArray[np.uint8]:
        """round(255 p), (S, S)."""
        return np.rint(self.probability * 255).astype(np.uint8)

    @property
    def caption(self) -> str:
        """The kind of prompt, and the quality of the answer."""
        asked = "text" if self.text_share == 1 else f"text {self.text_share:.0%}, example"
        there, found = self._counted(self.there), self._counted(self.found)
        if not there.any():
            answered = "a false alarm" if found.any() else "rightly not found"
            return f"{asked}; not in the image: {answered}"
        return f"{asked}; IoU {percent((there & found).sum() / (there | found).sum())} %"

    @property
    def share(self) -> float:
        """Share of the object among the pixels with known truth."""
        there = self._counted(self.there)
        return float(there.mean()) if there.size else 0.0

    def _counted(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return mask.ravel() if self.known is None else mask[self.known]


def clipseg_page(
    record: ClipSegRecord, answers: Sequence[Answer], *, uri: str, commands: Mapping[str, str]
) -> TrainingPage:
    """The page of a trained CLIPSeg or baseline.

    Args:
        record: record of the model.
        answers: samples to show.
        uri: folder of the model.
        commands: commands to run next, by purpose.
    """
    clip, config = record.clip, record.config
    files = [("folder", uri), ("decoder", f"{clipseg_folder.DECODER_FILE}, {clipseg_folder.RECORD_FILE}")]
    if record.hugging_face:
        files.append(("for transformers", "model.safetensors, config.json, …"))
    files += [("curves as numbers", "metrics.jsonl"), ("checkpoints to resume from", "checkpoints/")]
    iou = record.metrics.get("iou")
    names = {"triplets": "pairs of image and phrase"}
    layers = config.get("extract_layers") or [config["extract_layer"]]
    return TrainingPage(
        title=f"{_TITLES.get(record.model, record.model)} over {clip['model']}",
        toy=clip["model"] == "toyclip",
        training=record.training,
        samples="samples",
        tiles=[
            *([("IoU at p ≥ 0.5, last batches", f"{percent(iou)} %")] if isinstance(iou, float) else []),
            ("decoder", f"{config['reduce_dim']} wide, layers {' '.join(str(each) for each in layers)}"),
        ],
        cards=[_answer_card(answer) for answer in answers],
        note=f"Training samples with their prompts below; the mask is p ≥ {THRESHOLD:g}.",
        curves=_CURVES,
        curves_note="By step, on the training data. For other data, run maskmill evaluate.",
        data=[
            (names.get(name, name), shown(value))
            for name, value in record.data.items()
            if name != "fingerprint"
        ],
        files=files,
        commands=commands,
        settings={"recipe": record.recipe, "clip": clip, "versions": record.versions},
    )


def clipseg_sheet(answers: Sequence[Answer], *, columns: int = 3) -> Image.Image:
    """All samples on one picture: image, truth and prediction."""
    panels = []
    for answer in answers:
        there = answer.there.astype(np.uint8) * 255
        asked = answer.phrase or "(the example alone)"
        cells = [
            Found("there", there, answer.there, f"{answer.share:.1%} of the pixels"),
            Found(asked, answer.heat, answer.found, answer.caption, answer.example),
        ]
        panels.append(overview("", answer.image, cells, side=160))
    return tile(panels, columns=columns, gap=0)


def _answer_card(answer: Answer) -> Card:
    pictures = [
        ("image", answer.image),
        ("there", overlay_mask(answer.image, answer.there)),
        ("found", overlay_mask(answer.image, answer.found)),
        ("probability", np.asarray(heat_map(answer.heat).convert("RGB"))),
    ]
    if answer.example is not None:
        pictures.append(("example", answer.example))
    asked = f"“{answer.phrase}”" if answer.phrase else "the example alone"
    return Card(f"{asked}: {answer.caption}", pictures)


def write_clipseg_page(
    folder: Path,
    lines: Sequence[Mapping[str, Any]],
    samples: TripletSamples,
    *,
    seed: int,
    commands: Mapping[str, str],
    count: int = SHOWN,
) -> list[str]:
    """Write the page and the picture into the model's folder.

    Args:
        folder: folder of the model.
        lines: records of ``metrics.jsonl``.
        samples: the training samples.
        seed: seed for choosing samples.
        commands: commands to run next, by purpose.
        count: number of samples to show.

    Returns:
        The files, the page last.
    """
    from models.device import best_device

    model = clipseg_folder.load_trained(folder, device=best_device())
    answers = find_answers(model, samples, seed=seed, count=count)
    page = clipseg_page(
        clipseg_folder.read_clipseg_record(folder), answers, uri=str(folder), commands=commands
    )
    return write_page_and_sheet(folder, page, clipseg_sheet(answers) if answers else None, lines)


def find_answers(model: ClipSeg, samples: TripletSamples, *, seed: int, count: int) -> list[Answer]:
    """Answers of a model to some of its training samples; deterministic, preferring different images.

    Args:
        model: the trained model.
        samples: the training samples; unreadable ones are skipped.
        seed: seed for choosing and augmenting samples.
        count: number of answers.
    """
    import torch

    from models.clipseg.decoder import mix, normalize

    device = model.clip.device
    answers: list[Answer] = []
    order = np.random.default_rng(seed).permutation(samples.order(0, seed))
    _, first = np.unique(samples.source.pairs.image[order], return_index=True)
    order = np.concatenate([order[np.sort(first)], np.delete(order, first)])
    for index in order[: 4 * count].tolist():
        if len(answers) == count:
            break
        try:
            sample = samples.load(index, np.random.default_rng((seed, index)))
            phrase, share = decode_phrase(sample["phrase"]), float(sample["text_weight"])
            image, support = (
                torch.from_numpy(sample[name])[None].to(device) for name in ("image", "support")
            )
            with torch.no_grad():
                texts = model.encode_text([phrase]) if share > 0 else None
                pictures = model.encode_prompt_images(normalize(support)) if share < 1 else texts
                assert pictures is not None
                conditional = pictures if texts is None else mix(texts, pictures, share)
                p = model(normalize(image), conditional)[0, 0].sigmoid().cpu().numpy()
        except MaskMillError:
            continue
        answers.append(
            Answer(
                phrase=phrase if share > 0 else "",
                text_share=share,
                image=_pixels(sample["image"]),
                there=sample["mask"] == OBJECT,
                known=sample["mask"] != IGNORED,
                probability=p,
                example=_pixels(sample["support"]) if share < 1 else None,
            )
        )
    return answers


def _pixels(planes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(planes.transpose(1, 2, 0))
