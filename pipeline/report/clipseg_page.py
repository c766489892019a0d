"""What the training page of a CLIPSeg shows: training samples, what is there, and what the model finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.labelling.clipseg.model import THRESHOLD
from pipeline.report.prompts import Found, heat_map, overlay_mask, overview
from pipeline.report.training_page import Card, TrainingPage, thousands
from pipeline.trained.clipseg import DECODER_FILE, RECORD_FILE, ClipSegRecord

_TITLES = {"clipseg": "CLIPSeg", "clip-deconv": "CLIP-Deconv", "vitseg": "ViTSeg"}
_CURVES = {
    "loss": "loss",
    "iou": "IoU at 0.5, of the batches",
    "learning_rate": "learning rate",
    "found": "share of pixels that are found",
    "gradient_norm": "gradient norm",
}


@dataclass(frozen=True, eq=False)
class Answer:
    """A training sample, and what the model says to it.

    Attributes:
        phrase: what is asked for; "" if by a picture alone.
        text_share: share of the words in the prompt, the rest being the example's.
        image: uint8 (S, S, 3).
        there: bool (S, S), the truth.
        probability: float (S, S) in [0, 1].
        example: uint8 (V, V, 3), what CLIP was shown of it; None without one.
        known: bool (S, S), where the truth is known; the other pixels count neither way. None is everywhere.
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
        """The mask, (S, S), at the usual threshold."""
        return np.asarray(self.probability >= THRESHOLD)

    @property
    def heat(self) -> NDArray[np.uint8]:
        """round(255 p), (S, S)."""
        return np.rint(self.probability * 255).astype(np.uint8)

    @property
    def caption(self) -> str:
        """How it was asked, and how well it was answered."""
        asked = "text" if self.text_share == 1 else f"text {self.text_share:.0%}, example"
        there, found = self._counted(self.there), self._counted(self.found)
        if not there.any():
            answered = "found all the same" if found.any() else "rightly nothing found"
            return f"{asked}; not there, and {answered}"
        return f"{asked}; IoU {(there & found).sum() / (there | found).sum():.2f}"

    @property
    def share(self) -> float:
        """Share of the object in the pixels whose truth is known."""
        there = self._counted(self.there)
        return float(there.mean()) if there.size else 0.0

    def _counted(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return mask.ravel() if self.known is None else mask[self.known]


def clipseg_page(
    record: ClipSegRecord, answers: Sequence[Answer], *, uri: str, commands: Mapping[str, str]
) -> TrainingPage:
    """The page of a trained CLIPSeg or baseline.

    Args:
        record: of its folder.
        answers: samples to show.
        uri: of its folder.
        commands: what to run next, by purpose.
    """
    clip, config = record.clip, record.config
    files = [("folder", uri), ("decoder", f"{DECODER_FILE}, {RECORD_FILE}")]
    if record.hugging_face:
        files.append(("for transformers", "model.safetensors, config.json, …"))
    files += [("curves as numbers", "metrics.jsonl"), ("to go on from", "checkpoints/")]
    iou = record.metrics.get("iou")
    layers = config.get("extract_layers") or [config["extract_layer"]]
    return TrainingPage(
        title=f"{_TITLES.get(record.model, record.model)} over {clip['model']}",
        toy=clip["model"] == "toyclip",
        training=record.training,
        samples="samples",
        tiles=[
            *([("IoU at 0.5, last batches", f"{100 * iou:.1f}")] if isinstance(iou, float) else []),
            ("decoder", f"{config['reduce_dim']} wide, layers {' '.join(str(each) for each in layers)}"),
        ],
        cards=[_card(answer) for answer in answers],
        note=f"Samples of the training: what was asked is beneath, and found is what has p ≥ {THRESHOLD:g}.",
        curves=_CURVES,
        curves_note="By step, on what was trained with. What it is worth elsewhere, maskmill evaluate says.",
        data=_data(record.data),
        files=files,
        commands=commands,
        settings={"recipe": record.recipe, "clip": clip, "versions": record.versions},
    )


def preview_sheet(answers: Sequence[Answer], *, columns: int = 3) -> Image.Image:
    """All samples on one picture: image, what is there, what is found."""
    panels = [
        overview(
            "",
            answer.image,
            [
                Found(
                    "there",
                    answer.there.astype(np.uint8) * 255,
                    answer.there,
                    f"{answer.share:.1%} of the pixels",
                ),
                Found(
                    answer.phrase or "(the example alone)",
                    answer.heat,
                    answer.found,
                    answer.caption,
                    answer.example,
                ),
            ],
            side=160,
        )
        for answer in answers
    ]
    columns = min(columns, len(panels)) or 1
    width = max((panel.width for panel in panels), default=1)
    height = max((panel.height for panel in panels), default=1)
    sheet = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height or 1), "white")
    for position, panel in enumerate(panels):
        sheet.paste(panel, (position % columns * width, position // columns * height))
    return sheet


def _card(answer: Answer) -> Card:
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


def _data(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {"triplets": "pairs of image and phrase"}
    return [
        (names.get(name, name), thousands(value)) for name, value in data.items() if name != "fingerprint"
    ]
