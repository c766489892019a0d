"""Students of MaskCLIP+ (arXiv 2112.01071 §3.4): DeepLabs whose last layer is CLIP's text classifier.

Shapes: B batch, C classes, P classifier rows, D embedding channels, H W pixels, h w feature grid.

The network computes non-negative features of CLIP's width; a class's score is their product with the
embedding of its name. The embeddings are buffers and never trained, so they can be replaced by those of other
class names at any time.

* ``deeplabv2``: four parallel dilated convolutions to D channels, summed (arXiv 1606.00915).
* ``deeplabv3plus``: image pooling and separable dilated convolutions, refined with low features (arXiv
  1802.02611).
* ``light``: high features added to the low ones, then summed dilated convolutions on that grid.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clip.text import TextClassifier, row_table
from models.errors import WrongUse
from models.settings import StudentConfig
from models.student.backbones import build_backbone, conv_bn, load_weights

_SKIP_CHANNELS = 48
# ImageNet's, in thousandths of a grey level: integer buffers do not change with the model's dtype.
_MEAN = (123_675, 116_280, 103_530)
_STD = (58_395, 57_120, 57_375)


class DeepLab(nn.Module):
    """A student: RGB images to class scores at their size.

    It works with ``torch.export``, ``torch.onnx.export`` and ``torch.compile``; batch, height and width may
    be dynamic there if both sides are at least 16 pixels.

    Weights are random (``torch.manual_seed``); ``load_backbone_weights`` initialises the backbone from
    ImageNet.

    Args:
        text: the classifier; with ``config.learned_background`` its class 0 becomes class 1.

    Raises:
        MaskMillError: ``weights_do_not_fit`` if its D is not the config's.
    """

    text_rows: Tensor
    text_class_ids: Tensor
    _row_table: Tensor
    _mean: Tensor
    _std: Tensor

    def __init__(self, config: StudentConfig, text: TextClassifier) -> None:
        super().__init__()
        self.config = config
        self.backbone, channels = build_backbone(config.backbone, width=config.width, depth=config.depth)
        self.decoder = _build_decoder(config, channels)
        self.background = (
            nn.Parameter(torch.randn(1, config.embed_dim)) if config.learned_background else None
        )
        for name, values in (("_mean", _MEAN), ("_std", _STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        for name in ("text_rows", "text_class_ids"):
            self.register_buffer(name, None)
        self.register_buffer("_row_table", None, persistent=False)
        self.register_load_state_dict_post_hook(_index_rows)
        self.set_classifier(text)

    @property
    def num_classes(self) -> int:
        """C, a learned background included."""
        return len(self._row_table) + (self.background is not None)

    @property
    def text(self) -> TextClassifier:
        """The classifier in use, on the CPU."""
        class_ids = self.text_class_ids.cpu()
        return TextClassifier(self.text_rows.float().cpu(), class_ids, int(class_ids[-1]) + 1)

    def set_classifier(self, text: TextClassifier) -> None:
        """Replace the classes; nothing is trained. A learned background stays class 0.

        Raises:
            MaskMillError: ``weights_do_not_fit``.
        """
        if text.embeddings.shape[1] != self.config.embed_dim:
            raise WrongUse(
                "weights_do_not_fit",
                f"The classifier has {text.embeddings.shape[1]} channels; the student has "
                f"{self.config.embed_dim}.",
                "Build it with the CLIP that the student was trained with.",
            )
        device = self._mean.device
        # Copy, so that the caller may change the tensors later.
        self.text_rows = text.embeddings.detach().to(device, torch.float32, copy=True)
        self.text_class_ids = text.class_ids.to(device, copy=True)
        self.index_rows()

    def index_rows(self) -> None:
        """Recompute which rows belong to which class, after ``text_rows`` or their ids have changed."""
        self._row_table = row_table(self.text).to(self.text_rows.device)

    def features(self, images: Tensor) -> Tensor:
        """Map images to features on the grid.

        Args:
            images: (B, 3, H, W) RGB, uint8 or any float dtype, in [0, 255].

        Returns:
            (B, D, h, w), non-negative, in the model's dtype, or autocast's; h = ceil(H/8), w = ceil(W/8),
            or ceil(H/4), ceil(W/4) with ``deeplabv3plus`` and ``light``.
        """
        exact = torch.float64 if self._dtype == torch.float64 else torch.float32
        normalised = (images.to(exact) * 1000 - self._mean.to(exact)) / self._std.to(exact)
        low, high = self.backbone(normalised.to(self._dtype))
        return self.decoder(low, high)

    def grid_logits(self, features: Tensor) -> Tensor:
        """Map features (B, D, h, w) to class scores.

        Returns:
            (B, C, h, w), fp32, or fp64 if the features are; the maximum over each class's rows.
        """
        device = features.device.type
        if torch.is_autocast_enabled(device):
            # Half precision would round scores to multiples of 1/16, and the product is cheap.
            with torch.autocast(device, enabled=False):
                return self._grid_logits(features)
        return self._grid_logits(features)

    def _grid_logits(self, features: Tensor) -> Tensor:
        features = features if features.dtype == torch.float64 else features.float()
        if self.config.normalize_features:
            features = F.normalize(features, dim=1, eps=1e-6)
        rows = self.text_rows.to(features.dtype)
        if self.background is not None:
            rows = torch.cat([F.normalize(self.background.to(features.dtype), dim=1), rows])
        scores = F.conv2d(features, rows[:, :, None, None]) * self.config.logit_scale
        if self._row_table.shape[1] == 1:
            return scores
        if self.background is None:
            return scores[:, self._row_table].amax(2)
        return torch.cat([scores[:, :1], scores[:, 1:][:, self._row_table].amax(2)], 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to class scores at their size.

        Args:
            images: see ``features``; any size from 1x1.

        Returns:
            (B, C, H, W), fp32 or fp64: the grid's scores resized bilinearly (``align_corners=False``).
        """
        logits = self.grid_logits(self.features(images))
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype


def load_backbone_weights(model: DeepLab, source: str | Path) -> None:
    """Initialise a student's backbone.

    Args:
        model: changed in place.
        source: ``imagenet``, a file, or ``none``; see ``models.student.backbones.load_weights``.

    Raises:
        MaskMillError: ``weights_missing``, ``model_damaged``, ``weights_do_not_fit``.
    """
    load_weights(model.backbone, model.config.backbone, source)


# --- decoders -----------------------------------------------------------------------------------------------


class _SummedBranches(nn.ModuleList):
    """Parallel dilated 3x3 convolutions, each with batch norm and ReLU, summed."""

    def __init__(self, channels_in: int, channels: int, dilations: tuple[int, ...]) -> None:
        super().__init__(conv_bn(channels_in, channels, 3, dilation=dilation) for dilation in dilations)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self
        total = first(x)
        for branch in others:
            total = total + branch(x)
        return total


class _DeepLabV2(nn.Module):
    def __init__(self, high: int, channels: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = _SummedBranches(high, channels, dilations)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.branches(high)


class _Light(nn.Module):
    def __init__(self, low: int, high: int, channels: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.skip = conv_bn(low, _SKIP_CHANNELS, 1, relu=False)
        self.lateral = conv_bn(high, _SKIP_CHANNELS, 1, relu=False)
        self.branches = _SummedBranches(_SKIP_CHANNELS, channels, dilations)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.branches((self.skip(low) + _resize(self.lateral(high), low)).relu())


class _DeepLabV3Plus(nn.Module):
    def __init__(self, low: int, high: int, channels: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.pool = conv_bn(high, channels, 1)
        self.branches = nn.ModuleList(
            conv_bn(high, channels, 1) if dilation == 1 else _separable(high, channels, dilation)
            for dilation in dilations
        )
        self.bottleneck = conv_bn((1 + len(dilations)) * channels, channels, 3)
        self.skip = conv_bn(low, _SKIP_CHANNELS, 1)
        self.refine = nn.Sequential(
            _separable(channels + _SKIP_CHANNELS, channels), _separable(channels, channels)
        )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        pooled = self.pool(high.mean((2, 3), keepdim=True)).expand(-1, -1, *high.shape[2:])
        context = self.bottleneck(torch.cat([pooled, *(branch(high) for branch in self.branches)], 1))
        return self.refine(torch.cat([_resize(context, low), self.skip(low)], 1))


def _separable(channels_in: int, channels: int, dilation: int = 1) -> nn.Sequential:
    """A depthwise 3x3 and a pointwise convolution, each with batch norm and ReLU."""
    return nn.Sequential(
        conv_bn(channels_in, channels_in, 3, dilation=dilation, groups=channels_in),
        conv_bn(channels_in, channels, 1),
    )


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def _build_decoder(config: StudentConfig, channels: tuple[int, int]) -> nn.Module:
    low, high = channels
    if config.decoder == "deeplabv2":
        return _DeepLabV2(high, config.embed_dim, config.dilations)
    if config.decoder == "light":
        return _Light(low, high, config.embed_dim, config.dilations)
    return _DeepLabV3Plus(low, high, config.embed_dim, config.dilations)


def _index_rows(model: DeepLab, _: object) -> None:
    """Run after ``load_state_dict``, which may bring other classes."""
    model.index_rows()
