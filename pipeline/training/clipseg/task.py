"""CLIPSeg's task for the shared training loop: a frozen CLIP, a trained decoder, one loss.

CLIPSeg (arXiv 2112.10003, section 3 and its supplement) minimises the binary cross entropy between the
decoder's logits and the mask of what a phrase, an example picture or a mixture of both means in an image.
Only the decoder is trained, synchronised over workers and checkpointed; the task holds CLIP.

Shapes: B images, E joint embedding, S side of the images, V side of the example pictures.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clip.loading import load_clip
from models.clipseg.baselines import ClipDeconvConfig, ViTSegConfig, build_clip_deconv, build_vitseg
from models.clipseg.decoder import ClipSeg, PromptDecoder, build_clipseg, mix, normalize
from models.clipseg.whitening import whiten
from models.errors import MaskMillError, WrongUse
from pipeline.labelling.clipseg.model import ClipSegWeights, split_clip
from pipeline.training.clipseg.recipes import PromptModel
from pipeline.training.clipseg.sources.base import IGNORED, OBJECT
from pipeline.training.clipseg.triplets import decode_phrase
from pipeline.training.loop.protocols import Samples

KNOWN_TEXTS = 65_536
_READ_AHEAD = 32  # samples at a time
_AHEAD_SEED = 0


def build_model(settings: PromptModel, device: torch.device, *, seed: int = 0) -> ClipSeg:
    """Build the model that training starts from, CLIP and decoder in fp32.

    Args:
        settings: which model.
        device: of the model.
        seed: for a new decoder.

    Raises:
        MaskMillError: errors of ``load_clip``, ``load_clipseg`` and the baselines' ``build_*``;
            ``model_unsupported`` for a baseline with start weights.
    """
    if settings.start:
        return _load_start(settings, device)
    name, pretrained = split_clip(settings.clip)
    clip = load_clip(name, pretrained, device=device)
    if settings.kind == "clip-deconv":
        layer = settings.decoder.extract_layers[-1]
        width = settings.decoder.reduce_dim
        deconv = ClipDeconvConfig(reduce_dim=width, reduce2_dim=width, extract_layer=layer)
        return build_clip_deconv(clip, deconv, seed=seed)
    if settings.kind == "vitseg":
        config = ViTSegConfig(**settings.decoder.model_dump(), tower=settings.tower)
        return build_vitseg(clip, config, weights=settings.tower_weights, seed=seed)
    return build_clipseg(clip, settings.decoder, seed=seed)


def _load_start(settings: PromptModel, device: torch.device) -> ClipSeg:
    if settings.kind != "clipseg":
        raise WrongUse(
            "model_unsupported",
            f"A {settings.kind} is trained from scratch; it cannot start from {settings.start}.",
            "Leave model.start out, or train kind clipseg.",
        )
    model = ClipSegWeights(settings.start, settings.clip, settings.start_layers).load(device=device)
    decoder = model.decoder
    decoder.config = decoder.config.replace(dropout=settings.decoder.dropout)
    for module in decoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = settings.decoder.dropout
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = settings.decoder.dropout
    return model


class ClipSegTask:
    """Trains the decoder of a CLIPSeg or of a baseline: a ``pipeline.training.loop.protocols.Task``.

    Batches have the columns of ``pipeline.training.clipseg.triplets.TripletSamples``.

    Args:
        make_model: builds the model on a device, the same one in every worker.
        ahead: training samples whose first ``whiten`` estimate the whitening of the decoder's inputs
            (``models.clipseg.whitening``); they are the same in every worker and run.
        whiten: number of these samples; 0 does not whiten.
        keep: whether the decoder is already trained, so that whitening must preserve its function.
    """

    host_columns: frozenset[str] = frozenset({"phrase", "text_weight"})

    def __init__(
        self,
        make_model: Callable[[torch.device], ClipSeg],
        *,
        ahead: Samples | None = None,
        whiten: int = 0,
        keep: bool = False,
    ) -> None:
        self._make_model = make_model
        self._ahead, self._whiten, self._keep = ahead, whiten, keep

    def build(self, device: torch.device) -> nn.Module:
        """Build the model and return its decoder; CLIP stays in the task.

        Raises:
            Exception: the last sample's error if none of the samples for whitening can be read.
        """
        self.model = self._make_model(device)
        self._texts = _TextCache(self.model)
        if self._ahead is not None and self._whiten:
            whiten(self.model.decoder, functools.partial(self._decode_ahead, self._ahead), keep=self._keep)
        return self.model.decoder.train()

    def _decode_ahead(self, samples: Samples) -> None:
        """Decode the first samples; unreadable ones are skipped here and counted by the training loop."""
        chosen = samples.order(0, 0)[: self._whiten].tolist()
        failure: Exception | None = None
        read = 0
        for start in range(0, len(chosen), _READ_AHEAD):
            loaded = []
            for index in chosen[start : start + _READ_AHEAD]:
                try:
                    loaded.append(samples.load(index, np.random.default_rng((_AHEAD_SEED, index))))
                except Exception as error:
                    failure = error
            read += len(loaded)
            if loaded:
                columns = {name: np.stack([sample[name] for sample in loaded]) for name in loaded[0]}
                batch = {name: torch.from_numpy(rows) for name, rows in columns.items()}
                for name in batch.keys() - self.host_columns:
                    batch[name] = batch[name].to(self.model.clip.device)
                self._decode(batch)
        if failure is not None and not read:
            raise failure

    def _decode(self, batch: Mapping[str, Tensor], decoder: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Logits fp32 (B, S, S), and whether each prompt is readable, bool (B,)."""
        conditionals, read = self._conditionals(batch)
        # Grouped recipes repeat an image for each of its phrases: encode consecutive equal images once.
        images = batch["image"]
        new = torch.ones(len(images), dtype=torch.bool, device=images.device)
        new[1:] = (images[1:] != images[:-1]).flatten(1).any(1)
        which = new.cumsum(0) - 1
        activations = self.model.encode_image(normalize(images[new]))
        activations = activations._replace(layers=tuple(layer[which] for layer in activations.layers))
        model = copy.copy(self.model)
        if decoder is not None:
            model.decoder = cast("PromptDecoder", decoder)
        return model.decode(activations, conditionals[:, None])[:, 0], read

    def loss(
        self, module: nn.Module, batch: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted binary cross entropy, divided by the number of all pixels.

        Dividing by the sum of the weights instead would make the loss depend on how samples fall into workers
        and micro-batches, and would let unsure labels count as much as sure ones.

        Figures: ``iou`` of prediction (at 0.5) and truth over the batch's pixels with a weight, 1 if both are
        empty; ``found`` and ``there``, predicted and true share of the pixels; ``negatives``, share of
        samples whose prompt does not belong to the image; ``unread``, share of samples whose phrase is too
        long for CLIP, which do not count in the loss.
        """
        # Call the wrapped decoder: it synchronises gradients.
        logits, read = self._decode(batch, module)
        mask = batch["mask"]
        target = mask == OBJECT
        weight = batch["weight"] * (mask != IGNORED) * read[:, None, None]
        loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), weight)
        with torch.no_grad():
            counted = weight > 0
            found, there = counted & (logits > 0), counted & target
            union = (found | there).sum()
            iou = torch.where(union > 0, (found & there).sum() / union.clamp(min=1), 1.0)
            figures = {
                "iou": iou,
                "found": found.float().mean(),
                "there": there.float().mean(),
                "negatives": batch["negative"].float().mean(),
                "unread": 1 - read.float().mean(),
            }
        return loss, figures

    @torch.no_grad()
    def _conditionals(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Conditionals fp32 (B, E), and whether each is valid, bool (B,)."""
        share = batch["text_weight"]
        texts, read = self._texts([decode_phrase(row) for row in batch["phrase"].numpy()])
        there = share < 1
        if bool(there.any()):
            shown, weights = (
                column.to(texts.device, non_blocking=True) for column in (there.nonzero()[:, 0], share[there])
            )
            pictures = self.model.encode_prompt_images(normalize(batch["support"][shown]))
            texts = texts.index_copy(0, shown, mix(texts[shown], pictures, weights))
        return texts, (read | (share == 0)).to(texts.device, non_blocking=True)

    def after_step(self, step: int) -> None:
        """No-op: only the decoder changes."""

    def milestones(self) -> Sequence[int]:
        """None: there are no phases."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Empty: cached text embeddings are recomputed."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``state_dict``."""


class _TextCache:
    """Embeds phrases and caches them, up to 128 MB at E = 512."""

    def __init__(self, model: ClipSeg) -> None:
        self._model = model
        self._known: dict[str, Tensor | None] = {}

    def __call__(self, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings fp32 (B, E), zero for phrases too long for CLIP.

        Returns:
            The embeddings on the model's device; and which phrases are readable, bool (B,) on the CPU.
        """
        fresh = [phrase for phrase in dict.fromkeys(phrases) if phrase not in self._known]
        if len(self._known) + len(fresh) > KNOWN_TEXTS:
            self._known, fresh = {}, list(dict.fromkeys(phrases))
        if fresh:
            self._known |= self._embed(fresh)
        found = [self._known[phrase] for phrase in phrases]
        nothing = torch.zeros(self._model.clip.embed_dim, device=self._model.clip.device)
        rows = torch.stack([nothing if row is None else row for row in found])
        return rows, torch.tensor([row is not None for row in found])

    def _embed(self, phrases: list[str]) -> dict[str, Tensor | None]:
        try:
            return dict(zip(phrases, self._model.encode_text(phrases), strict=True))
        except MaskMillError as error:
            if error.code != "prompt_invalid":
                raise
            if len(phrases) == 1:
                return {phrases[0]: None}
        return {key: row for phrase in phrases for key, row in self._embed([phrase]).items()}
