"""Student backbones (ResNets at output stride 8, and a light one for CPUs) and their initial weights.

Shapes: B batch, H W pixels. Every backbone maps normalised images (B, 3, H, W) to two feature maps: ``low``
at ceil(H/4) x ceil(W/4), which DeepLabV3+ and the light decoder use to refine borders, and ``high`` at
ceil(H/8) x ceil(W/8). ``low`` is the reference's C1, ``high`` its C4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
from torch import Tensor, nn

from models.clip.weights import read_state
from models.errors import WrongUse
from models.hub import HUB, fetch_by_hand, hub_file, in_hub_cache, reachable, same_cache


@dataclass(frozen=True)
class _Pretrained:
    """ImageNet weights: timm's hub repository, and other files that fit."""

    repository: str
    files: tuple[str, ...]


_MMCV = "https://download.openmmlab.com/pretrain/third_party"
_GLUON = "https://github.com/rwightman/pytorch-pretrained-gluonresnet/releases/download/v0.1"
_TORCHVISION = "https://download.pytorch.org/models"
# torchvision's first weights rather than timm's defaults, because segmentation networks start from those.
PRETRAINED = {
    "resnet50c": _Pretrained(
        "timm/resnet50c.gluon_in1k",
        (f"{_MMCV}/resnet50_v1c-2cccc1ad.pth", f"{_GLUON}/gluon_resnet50_v1c-48092f55.pth"),
    ),
    "resnet101c": _Pretrained(
        "timm/resnet101c.gluon_in1k",
        (f"{_MMCV}/resnet101_v1c-e67eebb6.pth", f"{_GLUON}/gluon_resnet101_v1c-1f26822a.pth"),
    ),
    "resnet50": _Pretrained("timm/resnet50.tv_in1k", (f"{_TORCHVISION}/resnet50-0676ba61.pth",)),
    "resnet101": _Pretrained("timm/resnet101.tv_in1k", (f"{_TORCHVISION}/resnet101-63fe2227.pth",)),
}
LIGHT = "light"
BACKBONES = (*PRETRAINED, LIGHT)

_HUB_FILE = "model.safetensors"


def conv_bn(
    channels_in: int, channels: int, kernel: int, *, stride: int = 1, dilation: int = 1, groups: int = 1,
    relu: bool = True,
) -> nn.Sequential:  # fmt: skip
    """Same-size convolution (at stride 1) without bias, batch norm, and optionally ReLU."""
    conv = nn.Conv2d(
        channels_in, channels, kernel, stride, padding=dilation * (kernel // 2), dilation=dilation,
        groups=groups, bias=False,
    )  # fmt: skip
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(channels)]
    if relu:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class _Residual(nn.Module):
    """A dilated 3x3 convolution with a shortcut."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = conv_bn(channels, channels, 3, dilation=dilation, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv(x)).relu()


class LightBackbone(nn.Module):
    """A small residual network for images of about 100 to 200 pixels a side.

    Args:
        width: channels after the first convolution; ``low`` has twice as many, ``high`` four times.
        depth: residual blocks at stride 8, with dilations 1, 2, 4, ...
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.low = nn.Sequential(
            conv_bn(3, width, 3, stride=2), conv_bn(width, 2 * width, 3, stride=2), _Residual(2 * width, 1)
        )
        self.high = nn.Sequential(
            conv_bn(2 * width, 4 * width, 3, stride=2), *(_Residual(4 * width, 2**i) for i in range(depth))
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        low = self.low(images)
        return [low, self.high(low)]


def build_backbone(name: str, *, width: int, depth: int) -> tuple[nn.Module, tuple[int, int]]:
    """Build a backbone with random weights.

    The ResNets have output stride 8 as in the reference: strides 1, 2, 1, 1 and dilations 1, 1, 2, 4 in the
    four stages, with half the dilation in the first 3x3 convolution of a dilated stage. ``resnet50c`` and
    ``resnet101c`` are the reference's ResNetV1c, with a stem of three 3x3 convolutions.

    Args:
        name: one of ``BACKBONES``.
        width, depth: used by ``light`` only.

    Returns:
        The module, which maps normalised images to ``[low, high]``, and the channels of the two.
    """
    if name == LIGHT:
        return LightBackbone(width, depth), (2 * width, 4 * width)
    net = timm.create_model(name, pretrained=False, features_only=True, output_stride=8, out_indices=(1, 4))
    low, high = net.feature_info.channels()
    return net, (low, high)


def load_weights(backbone: nn.Module, name: str, source: str | Path) -> None:
    """Load initial weights into a backbone.

    Args:
        backbone: from ``build_backbone``; changed in place.
        name: its name.
        source: ``imagenet`` (downloaded from the hub unless cached), a ``.safetensors`` or ``.pth`` file, or
            ``none``. A file may hold a state dict of timm, torchvision or OpenMMLab (backbone or whole
            segmentor); its classification or decode head is ignored. Any other missing or unexpected tensor
            is an error. Pickles are read without running code.

    Raises:
        MaskMillError: ``weights_missing`` with the file to get; ``model_damaged``;
            ``weights_do_not_fit`` with the names of missing, unexpected and misshapen tensors.
    """
    if source == "none":
        return
    path = _imagenet_file(name) if source == "imagenet" else Path(source).expanduser()
    if not path.is_file():
        raise WrongUse(
            "weights_missing",
            f"There is no weights file {path}.",
            "Check the path. --set backbone_weights=imagenet fetches ImageNet weights, and "
            "--set backbone_weights=none starts from random ones.",
        )
    state = _timm_names(read_state(path))
    own = backbone.state_dict()
    # Old files lack these counters, which evaluation never reads.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    misshapen = [key for key in own if key in state and state[key].shape != own[key].shape]
    if missing or unexpected or misshapen:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
            if names
        ]
        raise WrongUse(
            "weights_do_not_fit",
            f"{path} does not hold the weights of {name}: {'; '.join(parts)}.",
            f"Use weights of that architecture{_examples(name)}, or the backbone that they belong to "
            f"({', '.join(BACKBONES)}).",
        )
    backbone.load_state_dict(state, strict=False)


def _examples(name: str) -> str:
    if name not in PRETRAINED:
        return ""
    return " such as " + " or ".join(url.rpartition("/")[2] for url in PRETRAINED[name].files)


def _imagenet_file(name: str) -> Path:
    if name not in PRETRAINED:
        raise WrongUse(
            "weights_missing",
            f"There are no ImageNet weights of the backbone {name}.",
            "Train it from scratch with --set backbone_weights=none, or use another one: "
            f"--set student.backbone={next(iter(PRETRAINED))} (or {', '.join([*PRETRAINED][1:])}).",
        )
    known = PRETRAINED[name]
    cached = in_hub_cache(known.repository, _HUB_FILE)
    if cached is not None:
        return cached
    reason = "the network cannot be reached"
    if reachable(HUB):
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(known.repository, _HUB_FILE))
        except Exception as error:  # each HTTP library underneath raises its own exceptions
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    file = known.files[0].rpartition("/")[2]
    raise WrongUse(
        "weights_missing",
        f"The ImageNet weights of {name} are not on this machine and could not be fetched: {reason}.",
        f"{fetch_by_hand(known.files[:1])}Copy it here, and add to the command:\n"
        f"  --set backbone_weights={file}\n"
        f"{_also(known)}{same_cache(None)}To start from random weights: --set backbone_weights=none.",
    )


def _also(known: _Pretrained) -> str:
    """The other places of the same kind of weights."""
    others = [hub_file(known.repository, _HUB_FILE), *known.files[1:]]
    return f"These fit as well: {', '.join(others)}.\n"


_HEADS = re.compile(r"(fc|head|classifier|decode_head|auxiliary_head)\.")
_STEM = {"0": "conv1.0", "1": "conv1.1", "3": "conv1.3", "4": "conv1.4", "6": "conv1.6", "7": "bn1"}


def _timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors to timm's names, without heads and prefixes.

    OpenMMLab numbers the layers of the deep stem consecutively; timm's last one is ``bn1``.
    """
    renamed = {}
    for key, tensor in state.items():
        if _HEADS.match(key):
            continue
        key = key.removeprefix("backbone.")
        stem = re.fullmatch(r"stem\.(\d)\.(.+)", key)
        if stem and stem[1] in _STEM:
            key = f"{_STEM[stem[1]]}.{stem[2]}"
        renamed[key] = tensor
    return renamed
