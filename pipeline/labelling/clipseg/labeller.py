"""CLIPSeg as a Labeller: each class is prompted separately, and the answers become one label map.

Shapes: B batch, C classes, K prompted classes, P prompts, E joint embedding; H W the image's own
size; Hn Wn the network's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.clip.text import TextClassifier, row_table
from models.errors import WrongUse
from models.mosaic import Rule
from pipeline.labelling.base import BaseLabeller
from pipeline.labelling.clipseg.model import ClipSegWeights
from pipeline.labelling.clipseg.options import ClipSegOptions
from pipeline.labelling.clipseg.prompting import check_finite, network_pixels, stretched
from pipeline.labelling.labeller import LabellerSettings
from pipeline.labelling.windows import WindowScores
from pipeline.ontology.ontology import Ontology

BAND_BYTES = {"cpu": 16_000_000, "cuda": 256_000_000}
"""Bytes of probabilities resized at a time, by device."""


@dataclass(frozen=True)
class Resolution:
    """How K independent yes-or-no answers become one label.

    A class is a candidate at a pixel if its probability reaches its threshold. The candidate with the highest
    probability (times its factor) becomes the label; ties go to the first. Without a candidate, the label is
    ``none_id``. Probabilities are not normalised across classes or over the image.

    Attributes:
        class_ids: K class ids, increasing.
        factors: K, above 0; they affect the ranking but not thresholds or confidence.
        none_id: label without a candidate: the ignore index, or the id of the background as the remainder.
        none_is_a_class: whether ``none_id`` is the background. Its confidence is one minus the highest
            probability; that of an ignored pixel is the probability of the highest class, as usual.
    """

    class_ids: tuple[int, ...]
    factors: tuple[float, ...]
    none_id: int
    none_is_a_class: bool


def resolution_of(ontology: Ontology, options: ClipSegOptions, thresholds: Sequence[float]) -> Resolution:
    """Which classes to prompt, and how to merge the answers into one label.

    Args:
        ontology: the classes.
        options: how to treat the background.
        thresholds: C, in [0, 1].

    Raises:
        MaskMillError: ``setting_invalid`` if the background is the remainder and a class has no threshold.
    """
    ids = tuple(range(ontology.num_classes))
    if ontology.background is None:
        return Resolution(ids, (1.0,) * len(ids), ontology.ignore_index, False)
    if options.background == "words":
        factors = (options.background_factor, *(1.0,) * (len(ids) - 1))
        return Resolution(ids, factors, ontology.ignore_index, False)
    boundless = [ontology.names[index] for index in ids[1:] if not thresholds[index]]
    if boundless:
        raise WrongUse(
            "setting_invalid",
            f"There can be no background beside {', '.join(boundless[:5])}: without a threshold "
            f"{'they are' if len(boundless) > 1 else 'it is'} everywhere.",
            "Set min_confidence (the paper has 0.1 to 0.3) or a threshold for each class; or ask for the "
            "background by its words: --set clipseg.background=words.",
        )
    return Resolution(ids[1:], (1.0,) * (len(ids) - 1), 0, True)


def resolve(
    probabilities: Tensor, size: tuple[int, int], how: Resolution, thresholds: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """One label per pixel from the probabilities of K classes.

    Resizes the probabilities bilinearly (align_corners=False) in bands of rows, so that memory does not grow
    with the image size times K.

    Args:
        probabilities: fp32 (K, Hn, Wn) in [0, 1], on any device.
        size: (H, W).
        how: the rule.
        thresholds: K, in [0, 1].

    Returns:
        Labels int32 and confidence uint8, both (H, W), on the device of the probabilities.
    """
    device = probabilities.device
    count, height, width = len(probabilities), *size
    limits, factors = (
        torch.tensor(values, dtype=torch.float32)[:, None, None].to(device, non_blocking=True)
        for values in (thresholds, how.factors)
    )
    ids = torch.tensor(how.class_ids, dtype=torch.int32).to(device, non_blocking=True)
    labels = torch.empty(height, width, dtype=torch.int32, device=device)
    confidence = torch.empty(height, width, dtype=torch.uint8, device=device)
    rows = max(1, BAND_BYTES.get(device.type, 16_000_000) // (4 * count * width))
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        p = stretched(probabilities, size, top, bottom)
        score = p * factors
        best, index = torch.where(p >= limits, score, -1.0).max(0)
        found = best >= 0
        label = torch.where(found, ids[index], how.none_id)
        highest = score.argmax(0, keepdim=True)
        otherwise = 1 - p.amax(0) if how.none_is_a_class else p.gather(0, highest)[0]
        sure = torch.where(found, p.gather(0, index[None])[0], otherwise)
        labels[top:bottom] = label
        confidence[top:bottom] = (sure.clamp(0, 1) * 255).round_()
    return labels, confidence


class ClipSegLabeller(BaseLabeller):
    """CLIPSeg with a list of prompts (arXiv 2112.10003).

    Args:
        settings: see ``LabellerSettings``.
        weights: which CLIPSeg.
        text: K classes of ``resolution``, not of the ontology; the rows are conditionals, not normalised. If
            a class has several rows, the highest logit counts.
        resolution: how to merge the answers into one label.

    Raises:
        MaskMillError: as ``ClipSegWeights.load``.
    """

    GPU_BATCH = 8

    def __init__(
        self,
        settings: LabellerSettings,
        *,
        weights: ClipSegWeights,
        text: TextClassifier,
        resolution: Resolution,
    ) -> None:
        super().__init__(settings)
        self._resolution = resolution
        self._conditionals = text.embeddings.to(self.device)
        self._row_table = row_table(text).to(self.device)
        self._model = weights.load(device=self.device, dtype=self.dtype, towers="visual")

    def scores(self, images: Tensor) -> Iterator[Tensor]:
        """Probabilities fp32 (K, Hn, Wn) of each image.

        The tower reads all images at once, the decoder one at a time, as its memory grows with the prompts.
        """
        activations = self._model.encode_image(network_pixels(images, self._model))
        for index in range(len(images)):
            layers = tuple(layer[index : index + 1] for layer in activations.layers)
            logits = self._model.decode(activations._replace(layers=layers), self._conditionals)[0]
            check_finite(logits)
            if self._row_table.shape[1] > 1:
                logits = logits[self._row_table].amax(1)
            yield logits.float().sigmoid()

    def label_of(
        self, scores: Tensor, network_size: tuple[int, int], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """See ``BaseLabeller.label_of``: the rule is ``Resolution``."""
        limits = self.settings.thresholds or (0.0,) * self.settings.num_classes
        thresholds = [limits[class_id] for class_id in self._resolution.class_ids]
        return resolve(scores, size, self._resolution, thresholds)

    @property
    def scored_classes(self) -> int:
        """See ``BaseLabeller.scored_classes``: those of ``Resolution``."""
        return len(self._resolution.class_ids)

    def window_of(self, scores: Tensor, network_size: tuple[int, int], size: tuple[int, int]) -> WindowScores:
        """See ``BaseLabeller.window_of``: probabilities, which have no temperature."""
        return WindowScores(scores, network_size, None)

    def rule(self) -> Rule:
        """See ``BaseLabeller.rule``."""

        def choose(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            return self.label_of(
                scores.transpose(0, 1).contiguous(), (0, 0), (scores.shape[0], scores.shape[2])
            )

        return choose
