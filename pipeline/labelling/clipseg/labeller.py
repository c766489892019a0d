"""CLIPSeg as a Labeller: every class is asked for by itself, and one label is made of the answers.

Shapes: B batch, K classes that are asked for, P prompts, E joint embedding; H W the image's own size; Hn Wn
the network's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.loading import Activations
from models.device import DTYPES, best_device
from pipeline.labelling.clipseg.model import ClipSegWeights
from pipeline.labelling.clipseg.prompting import check_finite, network_pixels
from pipeline.labelling.labeller import Prediction

_BAND_BYTES = {"cpu": 16_000_000, "cuda": 256_000_000}


@dataclass(frozen=True)
class Resolution:
    """How K independent yes-or-no answers become one label.

    A class is a candidate at a pixel where its probability reaches its threshold. Of the candidates the one
    of the highest probability (times its factor) is the label; ties go to the first. Where there is none,
    the label is ``none_id``. No probability is rescaled by what others are, or by its range in the image.

    Attributes:
        class_ids: K ids of the classes, increasing.
        thresholds: K, in [0, 1].
        factors: K, above 0; they matter for which is highest, not for thresholds or confidence.
        none_id: where no class is a candidate: the ignore index, or the id of a background that is defined
            as what is left.
        none_is_a_class: the background that is left. Its confidence is one minus the highest probability;
            that of an ignored pixel is the probability of the highest class, as everywhere.
    """

    class_ids: tuple[int, ...]
    thresholds: tuple[float, ...]
    factors: tuple[float, ...]
    none_id: int
    none_is_a_class: bool


def resolve(probabilities: Tensor, size: tuple[int, int], how: Resolution, *, wide: bool) -> Prediction:
    """One label per pixel from the probabilities of K classes.

    The probabilities are brought to image size bilinearly (align_corners False) in bands of rows, so that
    memory does not grow with the image times K.

    Args:
        probabilities: fp32 (K, Hn, Wn) in [0, 1], on any device.
        size: (H, W).
        how: the rule.
        wide: whether ids need 16 bits.
    """
    device = probabilities.device
    count, height, width = len(probabilities), *size
    thresholds, factors = (
        torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
        for values in (how.thresholds, how.factors)
    )
    ids = torch.tensor(how.class_ids, dtype=torch.int32, device=device)
    labels = torch.empty(height, width, dtype=torch.int32, device=device)
    confidence = torch.empty(height, width, dtype=torch.uint8, device=device)
    rows = max(1, _BAND_BYTES.get(device.type, 16_000_000) // (4 * count * width))
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        p = stretched(probabilities, size, top, bottom)
        score = p * factors
        best, index = torch.where(p >= thresholds, score, -1.0).max(0)
        found = best >= 0
        label = torch.where(found, ids[index], how.none_id)
        highest = score.argmax(0, keepdim=True)
        otherwise = 1 - p.amax(0) if how.none_is_a_class else p.gather(0, highest)[0]
        sure = torch.where(found, p.gather(0, index[None])[0], otherwise)
        labels[top:bottom] = label
        confidence[top:bottom] = (sure.clamp(0, 1) * 255).round_()
    return Prediction(labels.cpu().numpy().astype(np.uint16 if wide else np.uint8), confidence.cpu().numpy())


def stretched(maps: Tensor, size: tuple[int, int], top: int = 0, bottom: int | None = None) -> Tensor:
    """Rows ``top`` to ``bottom`` of ``F.interpolate(maps, size, bilinear, align_corners=False)``.

    Args:
        maps: float (K, h, w).
        size: (H, W) of the whole.
        top: first row.
        bottom: one past the last row; None is H.

    Returns:
        (K, bottom - top, W).
    """
    height, width = size
    source = maps.shape[1]
    wanted = torch.arange(top, height if bottom is None else bottom, device=maps.device, dtype=torch.float64)
    position = ((wanted + 0.5) * (source / height) - 0.5).clamp_(min=0)
    low = position.floor().long().clamp_(max=source - 1)
    part = (position - low).to(maps.dtype)[:, None]
    high = (low + 1).clamp_(max=source - 1)
    between = torch.lerp(maps[:, low], maps[:, high], part)
    return F.interpolate(between[None], (len(wanted), width), mode="bilinear", align_corners=False)[0]


class ClipSegLabeller:
    """CLIPSeg with a list of prompts (arXiv 2112.10003).

    Args:
        weights: which CLIPSeg.
        conditionals: (P, E) float32, what is asked.
        rows: (P,) int64, the class each is of as an index into ``resolution.class_ids``; every one occurs.
            Of several for one class the highest logit counts.
        resolution: how one label is made.
        precision: ``fp32``, ``bf16`` or ``fp16``; logits and probabilities are fp32 in any case.
        batch_size: images whose tower runs together; 0 chooses 1 on a CPU and 8 on a GPU.
        num_classes: C, background included.
        ignore_index: id of pixels without a label.
        threads: CPU threads of each call of ``label``, of which several may run at a time in threads of their
            own; 0 leaves torch's choice.
    """

    def __init__(
        self,
        *,
        weights: ClipSegWeights,
        conditionals: np.ndarray,
        rows: np.ndarray,
        resolution: Resolution,
        precision: str,
        batch_size: int,
        num_classes: int,
        ignore_index: int,
        threads: int = 0,
    ) -> None:
        self._threads = threads
        self.device = best_device()
        self.batch_size = batch_size or (1 if self.device.type == "cpu" else 8)
        self._pad_batches = self.device.type != "cpu"
        self._resolution = resolution
        self._wide = num_classes > 254 or ignore_index > 255  # as the stages that encode the table
        self._conditionals = torch.from_numpy(conditionals).to(self.device)
        self._rows = torch.from_numpy(rows).to(self.device)
        self._model = weights.load(device=self.device, dtype=DTYPES[precision], towers="visual")

    @torch.inference_mode()
    def label(self, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """See ``Labeller.label``."""
        if self._threads:
            torch.set_num_threads(self._threads)  # holds for the calling thread
        count = len(images)
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        if self._pad_batches and count < self.batch_size:
            # One shape for every batch: the same kernels run, so that an image's labels do not depend on
            # how many others were in its batch. The decoder gets one image at a time anyway.
            batch = torch.cat([batch, batch[-1:].expand(self.batch_size - count, -1, -1, -1)])
        activations = self._model.encode_image(network_pixels(batch, self._model))
        return [
            resolve(self._probabilities(activations, index), size, self._resolution, wide=self._wide)
            for index, size in enumerate(sizes)
        ]

    def _probabilities(self, activations: Activations, index: int) -> Tensor:
        """fp32 (K, Hn, Wn) of one image of the batch."""
        layers = tuple(layer[index : index + 1] for layer in activations.layers)
        logits = self._model.decode(activations._replace(layers=layers), self._conditionals)[0]
        check_finite(logits)
        if len(self._rows) > len(self._resolution.class_ids):
            merged = logits.new_full((len(self._resolution.class_ids), *logits.shape[1:]), -torch.inf)
            where = self._rows[:, None, None].expand_as(logits)
            logits = merged.scatter_reduce(0, where, logits, "amax")
        else:
            logits = logits[self._rows.argsort()]
        return logits.float().sigmoid()
