"""MaskCLIP (arXiv 2112.01071): class scores on the patch grid from images and a text classifier.

Shapes: B batch, C classes, P classifier rows, D embedding channels, H W pixels, h w grid, L = h*w, K key
channels.

The order is the reference's: cosines, prompt denoising, key smoothing, then resizing and argmax in
``models.labelmap``. Cosines are resized before the temperature is applied.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.candidates import ambiguous, likely_classes, redundant
from models.clip.dense import Dense, dense_encoder
from models.clip.heads.base import HeadOptions
from models.clip.loading import Clip
from models.clip.published import check_reading
from models.clip.refiners.base import Refined, RefineOptions, refine
from models.clip.text import TextClassifier, row_table
from models.denoising import DENIED, key_smoothing, prompt_denoising
from models.errors import WrongUse
from models.helper import Helper
from models.labelmap import Subset, label_map
from models.memory import Memory
from models.regions import means, regions_of
from models.settings import MaskClipSettings

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Described(NamedTuple):
    """What a memory keeps of images.

    Attributes:
        features: (B, D, h, w), of length 1.
        keys: (B, K, h, w).
        scores: (B, C, h, w), as ``MaskClip.grid_scores`` has them without a memory.
    """

    features: Tensor
    keys: Tensor
    scores: Tensor


class MaskClip:
    """A CLIP with a dense head and a text classifier.

    Args:
        clip: its visual tower is shared and not changed; the text tower is not used.
        text: the classifier, with the CLIP's D.
        config: the settings.
        memory: what ``config.memory`` names, loaded; None if it names nothing.
        key_block: for ``describe`` without a memory: the block whose tokens are keys.
        helper: what ``config.helper`` names, loaded on the CLIP's device; None if it names nothing.

    Raises:
        MaskMillError: ``setting_invalid`` for settings that do not suit this CLIP; ``weights_do_not_fit`` for
            a classifier of another width.
    """

    def __init__(
        self,
        clip: Clip,
        text: TextClassifier,
        config: MaskClipSettings | None = None,
        *,
        memory: Memory | None = None,
        key_block: int | None = None,
        helper: Helper | None = None,
    ) -> None:
        config = config or MaskClipSettings()
        assert bool(config.memory) == (memory is not None), "the memory that the settings name"
        assert bool(config.helper) == (helper is not None), "the helper that the settings name"
        if text.embeddings.shape[1] != clip.embed_dim:
            raise WrongUse(
                "weights_do_not_fit",
                f"The classifier has {text.embeddings.shape[1]} channels; {clip.name} has {clip.embed_dim}.",
                "Build it with the same CLIP.",
            )
        cell = math.lcm(clip.stride, 1 if helper is None else helper.stride)
        for name, pixels in (("window", config.window), ("window_stride", config.window_stride)):
            if pixels % cell:
                raise WrongUse(
                    "setting_invalid",
                    f"{name} = {pixels} is no multiple of the {cell} pixels of a grid cell.",
                    f"Use {max(1, round(pixels / cell)) * cell}.",
                )
        config.classes.refuse_unfit(text.num_classes)
        check_reading(clip.name, clip.source.config, config)
        self.clip = clip
        self.text = text
        self.config = config
        self.memory = memory
        self.helper = helper
        exact = torch.float64 if clip.dtype == torch.float64 else torch.float32
        mean, std = (
            (IMAGENET_MEAN, IMAGENET_STD) if config.image_stats == "imagenet" else (clip.mean, clip.std)
        )
        # uint8 -> (x - 255 mean) / (255 std), per channel
        self._mean = 255 * torch.tensor(mean, dtype=exact, device=clip.device)[:, None, None]
        self._std = 255 * torch.tensor(std, dtype=exact, device=clip.device)[:, None, None]
        self.encoder = dense_encoder(
            clip.visual,
            head=config.head,
            profile=config.profile,
            keys=config.ks_source if config.ks_threshold > 0 else None,
            positions=config.positions,
            options=HeadOptions(config.sigma, config.alpha),
            whole=config.classes.asks_class_token,
            early=key_block if memory is None else memory.key_block,
            helper=None if helper is None else helper.view(self._mean, self._std),
        )
        self._rows = text.embeddings.to(clip.device, exact)
        self._row_table = row_table(text).to(clip.device)
        self._bias: Tensor | None = None
        if config.classes.bias:
            self._bias = torch.tensor(config.classes.bias, dtype=exact, device=clip.device)[:, None, None]

    @property
    def confidence_temperature(self) -> float | None:
        """The ``temperature`` for ``models.labelmap.label_map``.

        None with key smoothing, whose scores are sums of probabilities, not cosines.
        """
        return None if self.config.ks_threshold > 0 else self.config.temperature

    @torch.inference_mode()
    def grid_scores(self, images: Tensor) -> Tensor:
        """Class scores on the patch grid.

        On a CPU the images of a batch run one by one, which is faster there and makes scores independent of
        the batch.

        Args:
            images: uint8 (B, 3, H, W) RGB at the network's input size.

        Returns:
            fp32 (B, C, h, w), or fp64 for an fp64 CLIP, on the CLIP's device: cosines, with ``DENIED`` for
            removed classes; with key smoothing, its unnormalised scores. With windows averaged by pixels the
            grid is that of the image's pixels.
        """
        if images.device.type == "cpu" and self.clip.device.type == "cpu" and len(images) > 1:
            return torch.cat([self.grid_scores(image[None]) for image in images])
        images = (images.to(self.clip.device) - self._mean) / self._std
        if self.config.windows == "pixels":
            return self._refine(*self._pixel_windows(images))
        if self.config.window:
            return self._refine(*self._windows(images))
        dense = self._seen(images)
        scores = self._purify(images, dense, self.scores(dense))
        return scores if self.memory is None else self._supported(scores, dense, self.memory, images)

    @torch.inference_mode()
    def describe(self, images: Tensor) -> Described:
        """What a memory keeps of images; needs ``key_block``.

        Args:
            images: as for ``grid_scores``.
        """
        normalised = (images.to(self.clip.device) - self._mean) / self._std
        dense = self._seen(normalised)
        assert dense.early is not None, "made with a key_block"
        return Described(self._unit(dense.features), dense.early, self.scores(dense))

    def label(self, image: Tensor, *, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Label every pixel of an image with its best class.

        Args:
            image: uint8 (3, H, W) RGB at the network's input size (about 512 pixels on the short side for
                ViT-B/16).
            size: (H, W) of the result; None is that of the image.

        Returns:
            labels (H, W), uint8 class ids, uint16 with more than 254 classes; confidence uint8 (H, W),
            round(255 p) of the chosen class. Both are on the CLIP's device.

        Raises:
            MaskMillError: ``labelling_failed``.
        """
        scores = self.grid_scores(image[None])[0]
        return self.label_scores(
            image,
            scores,
            size or (image.shape[-2], image.shape[-1]),
            ignore_index=max(255, self.text.num_classes),
        )

    def label_scores(
        self,
        image: Tensor,
        scores: Tensor,
        size: tuple[int, int],
        *,
        thresholds: Tensor | None = None,
        ignore_index: int = 255,
    ) -> tuple[Tensor, Tensor]:
        """``label`` with the scores (C, h, w) of the image, refined as the settings say.

        Args:
            image: as in ``label``.
            scores: of ``grid_scores``.
            size: (H, W) of the result.
            thresholds, ignore_index: see ``models.labelmap.label_map``.
        """
        found, network, ids = self.final_scores(image, scores, size)
        return label_map(
            found,
            network_size=network,
            image_size=size,
            temperature=self.confidence_temperature,
            thresholds=thresholds,
            ignore_index=ignore_index,
            subset=None if ids is None else Subset(ids, self.text.num_classes),
        )

    def final_scores(
        self, image: Tensor, scores: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """The scores from which labels are taken, refined as the settings say.

        Args:
            image, scores, size: as in ``label_scores``.

        Returns:
            fp32 (K, h, w); the (H, W) on which their grid lies; int64 (K,) ids of the classes, None if all.
        """
        if self.config.refine == "none":
            return scores.float(), (image.shape[-2], image.shape[-1]), None
        refined = self.refine(image[None], scores[None], size)
        return refined.scores[0].float(), size, None if refined.classes is None else refined.classes[0]

    def refine(self, images: Tensor, scores: Tensor, size: tuple[int, int]) -> Refined:
        """Refine scores by their images, as the settings say; without a refiner they stay as they are.

        Args:
            images: uint8 (B, 3, H, W) RGB at the network's input size.
            scores: (B, C, h, w), from ``grid_scores``.
            size: of the images themselves.
        """
        config = self.config
        if config.refine == "none":
            return Refined(scores, None)
        options = RefineOptions(
            config.refine_steps,
            config.refine_classes,
            config.refine_pixels,
            config.refine_cells,
            config.refine_dilations,
        )
        return refine(config.refine, images, scores, size, options)

    def scores(self, dense: Dense) -> Tensor:
        """``grid_scores`` from the output of ``self.encoder``, before classes are purified."""
        (cosines,) = self._agreed([dense], [(0, 0)])
        return self._refine(cosines, dense.keys, self._class_scores(dense.whole))

    def _agreed(self, seen: Sequence[Dense], corners: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Cosines (B, P, h, w) of each window of images, which some heads make agree with each other.

        Args:
            seen: the windows.
            corners: row and column of their first pixels.
        """
        cosines = [self._cosines(dense.features) for dense in seen]
        if self.encoder.spread is None:
            return cosines
        features = [dense.helper for dense in seen if dense.helper is not None]
        return self.encoder.spread(cosines, features, corners, self.encoder.stride)

    def _seen(self, images: Tensor) -> Dense:
        """Dense features of normalised images, embedded."""
        dense: Dense = self.encoder(images)
        return dense._replace(features=self._embedded(dense.features))

    def _embedded(self, features: Tensor) -> Tensor:
        """Features of whole images in the joint embedding, where the encoder leaves that last step."""
        return features if self.encoder.embedded is None else self.encoder.embedded(features)

    def _whole(self, parts: Tensor, count: Tensor) -> Tensor:
        """Embedded features of whole images from the sums of their windows' features."""
        return parts if self.encoder.embedded is None else self._embedded(parts / count)

    def _refine(self, cosines: Tensor, keys: Tensor | None, whole: Tensor | None) -> Tensor:
        """(B, P, h, w) cosines of all rows -> (B, C, h, w) scores.

        Args:
            cosines: of the cells.
            keys: for key smoothing.
            whole: (B, C) cosines of the class token, for candidates.
        """
        config = self.config
        scores = self._merge(cosines)
        if self._bias is not None:
            scores = scores - self._bias
        if whole is not None:
            possible = likely_classes(whole, config.classes.candidates, config.classes.candidates_above)
            scores = torch.where(possible[:, :, None, None], scores, DENIED)
        scores = prompt_denoising(scores, config.pd_threshold, temperature=config.temperature)
        if keys is not None and config.ks_threshold > 0:
            scores = key_smoothing(
                scores, keys, config.ks_threshold, axis=config.ks_axis, temperature=config.temperature
            )
        return scores

    def _cosines(self, features: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, P, h, w); the classifier's rows already have length 1."""
        features = features.to(self._rows.dtype)
        norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
        return torch.einsum("pd,bdhw->bphw", self._rows, features) / norm

    def _class_scores(self, whole: Tensor | None) -> Tensor | None:
        """Embeddings (B, D) of whole images -> cosines (B, C)."""
        return None if whole is None else self._merge(self._cosines(whole[:, :, None, None]))[..., 0, 0]

    def _purify(self, images: Tensor, dense: Dense, scores: Tensor) -> Tensor:
        """Scores (B, C, h, w) without the classes that class purification drops.

        Args:
            images: normalised (B, 3, H, W).
            dense: their features.
            scores: of ``self.scores``.
        """
        config = self.config.classes
        if not config.purifies:
            return scores
        scores = scores.clone()
        for image, features, own in zip(images, self._unit(dense.features), scores, strict=True):
            if config.redundant_below > 0:
                own[redundant(self._probabilities(own), features, config.redundant_below)] = DENIED
            if config.ambiguous_above > 0:
                classify = functools.partial(self._classify, image)
                own[ambiguous(self._probabilities(own), features, config.ambiguous_above, classify)] = DENIED
        return scores

    def _supported(self, scores: Tensor, dense: Dense, memory: Memory, images: Tensor) -> Tensor:
        """Scores (B, C, h, w), mixed with those of the regions of the memory that are like the image's own.

        Args:
            scores: of the images alone.
            dense: what they are of.
            memory: the memory.
            images: normalised (B, 3, H, W).
        """
        assert dense.early is not None, "asked for by the memory"
        share, features = self.config.memory_share, self._unit(dense.features)
        mixed = []
        for own, unit, keys, image in zip(scores, features, dense.early, images, strict=True):
            regions = regions_of(
                memory.regions,
                labels=own.argmax(0).cpu().numpy(),
                features=unit,
                image=(image * self._std + self._mean).round().clamp(0, 255).to(torch.uint8),
            )
            support = memory.support(means(keys.float(), regions), self.config.memory_neighbours)
            classes = self._merge(self._cosines(support[:, :, None, None].to(own.device)))[..., 0, 0]
            spread = classes[torch.from_numpy(regions).to(own.device)].permute(2, 0, 1)
            if self._bias is not None:
                spread = spread - self._bias
            mixed.append(torch.where(own == DENIED, DENIED, (1 - share) * own + share * spread))
        return torch.stack(mixed)

    def _probabilities(self, scores: Tensor) -> Tensor:
        return (self.config.temperature * scores).softmax(0)

    def _classify(self, image: Tensor, box: tuple[int, int, int, int]) -> Tensor:
        """Cosines (C,) of the class token of a part of an image, at half the tower's own side.

        Args:
            image: normalised (3, H, W).
            box: cells (top, bottom, left, right).
        """
        top, bottom, left, right = (place * self.encoder.stride for place in box)
        part = image[None, :, top : max(bottom, top + 1), left : max(right, left + 1)]
        native: Any = self.clip.visual.image_size
        side = max(self.encoder.stride, (native if isinstance(native, int) else min(native)) // 2)
        part = F.interpolate(part, (side, side), mode="bilinear", align_corners=False)
        found = self._class_scores(self.encoder.image_embedding(part))
        assert found is not None
        return found[0]

    def _unit(self, features: Tensor) -> Tensor:
        """Features (B, D, h, w) of length 1."""
        return F.normalize(features.to(self._rows.dtype), dim=1)

    def _merge(self, cosines: Tensor) -> Tensor:
        """(B, P, h, w) -> (B, C, h, w), the maximum over each class's rows."""
        if self._row_table.shape[1] == 1:
            return cosines
        return cosines[:, self._row_table].amax(2)

    def _windows(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Cosines and keys on the whole image's grid, averaged where windows overlap, and class scores.

        The class token likes a class as much as the window does that likes it best.

        The image is padded to whole cells, and the last window of each row or column is aligned with its end,
        so all windows have the same size and lie on the grid. PD and KS run on the assembled image. With
        ``splice`` features are averaged, of length 1 each unless they are not embedded yet, and cosines taken
        of the result.
        """
        stride, splice = self.encoder.stride, self.config.windows == "splice"
        images = F.pad(images, (0, -images.shape[-1] % stride, 0, -images.shape[-2] % stride))
        h, w = images.shape[-2] // stride, images.shape[-1] // stride
        parts: Tensor | None = None
        keys: Tensor | None = None
        whole: Tensor | None = None
        count = images.new_zeros(h, w)
        for rows, columns, dense, part in self._windows_seen(images):
            cell = (
                ...,
                slice(rows.start // stride, rows.stop // stride),
                slice(columns.start // stride, columns.stop // stride),
            )
            if parts is None:
                parts = images.new_zeros(len(images), part.shape[1], h, w)
            parts[cell] += part
            count[cell] += 1
            whole = _highest(whole, self._class_scores(dense.whole))
            if dense.keys is not None:
                if keys is None:
                    keys = images.new_zeros(len(images), dense.keys.shape[-1], h, w)
                keys[cell] += dense.keys.transpose(1, 2).unflatten(2, part.shape[-2:])
        assert parts is not None, "an image has at least one window"
        cosines = self._cosines(self._whole(parts, count)) if splice else parts / count
        return cosines, None if keys is None else (keys / count).flatten(2).transpose(1, 2), whole

    def _pixel_windows(self, images: Tensor) -> tuple[Tensor, None, Tensor | None]:
        """As ``_windows``, with cosines (B, P, H, W) at pixels, which are averaged as mmseg does it.

        A window's cosines are resized to its pixels before they are averaged. The last window of each row or
        column is moved back to the image's end, which need not lie on the grid.
        """
        cosines = images.new_zeros(len(images), len(self._rows), *images.shape[-2:])
        count = images.new_zeros(images.shape[-2:])
        stride = self.encoder.stride
        whole: Tensor | None = None
        for rows, columns, dense, part in self._windows_seen(images):
            whole = _highest(whole, self._class_scores(dense.whole))
            # An image smaller than a window may end within a cell.
            cells = (part.shape[-2] * stride, part.shape[-1] * stride)
            part = F.interpolate(part, cells, mode="bilinear", align_corners=False)
            cosines[..., rows, columns] += part[..., : rows.stop - rows.start, : columns.stop - columns.start]
            count[rows, columns] += 1
        return cosines / count, None, whole

    def _windows_seen(self, images: Tensor) -> Iterator[tuple[slice, slice, Dense, Tensor]]:
        """Rows and columns of every window, what was seen there, and its cosines (or features to splice)."""
        splice = self.config.windows == "splice"
        raw = splice and self.encoder.embedded is not None
        see = self.encoder if raw else self._seen
        found = ((rows, columns, see(images[..., rows, columns])) for rows, columns in self._places(images))
        if self.encoder.spread is None:
            for rows, columns, dense in found:
                features = dense.features
                if not raw:
                    features = self._unit(features) if splice else self._cosines(features)
                yield rows, columns, dense, features
            return
        windows = list(found)
        corners = [(rows.start, columns.start) for rows, columns, _ in windows]
        parts = self._agreed([dense for *_, dense in windows], corners)
        for (rows, columns, dense), part in zip(windows, parts, strict=True):
            yield rows, columns, dense, part

    def _places(self, images: Tensor) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of every window of images (B, 3, H, W)."""
        (tops, height), (lefts, width) = (
            _spans(side, self.config.window, self.config.window_stride) for side in images.shape[-2:]
        )
        for top in tops:
            for left in lefts:
                yield slice(top, top + height), slice(left, left + width)


def per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """Values (3,) as (3, 1, 1) of another tensor's dtype, on its device, without waiting for the device."""
    return torch.tensor(values, dtype=like.dtype)[:, None, None].to(like.device, non_blocking=True)


def _highest(scores: Tensor | None, others: Tensor | None) -> Tensor | None:
    """The maximum of two, either of which may not be there."""
    return others if scores is None or others is None else torch.maximum(scores, others)


def _spans(length: int, window: int, step: int) -> tuple[list[int], int]:
    """Starts of the windows along an axis, and their length; the last window ends at the end."""
    if length <= window:
        return [0], length
    return [*range(0, length - window, step), length - window], window
