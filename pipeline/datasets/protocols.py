"""Two evaluation protocols for the same datasets. Their numbers are not comparable.

``seed`` follows the code of MaskCLIP (arXiv 2112.01071): the whole image at a size per dataset, ImageNet
statistics, 85 templates, exact GELU. ``unified`` is shared by its training-free successors (SCLIP, arXiv
2312.01597; NACLIP and later): windows of 224 pixels at stride 112 put together by pixels as mmseg does it,
CLIP's statistics, 80 templates, softmax scale 40. The same MaskCLIP with ViT-B/16 scores 49.5 on Pascal VOC
under ``seed`` and 74.9 under ``unified``.

Its words are those of ``successors.yaml``: "ship" for a boat, "person in shirt" beside "person". Differences
from single tables remain: some tune the softmax scale or the windows per dataset, and ClearCLIP and ProxyCLIP
use plainer words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from models.errors import WrongUse
from pipeline.ontology.ontology import Ontology

ProtocolName = Literal["seed", "unified"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a dataset is evaluated.

    Attributes:
        name: ``seed`` or ``unified``.
        dataset: name in the registry.
        scale: image size in pixels, as in the label recipe.
        templates: name of a prompt template set.
        background: whether the dataset has no background label (``none``), has it ``ignored``, or has it as a
            ``class`` to predict.
        background_threshold: pixels whose confidence in the label table is below it become class 0; in
            [0, 1].
        image_stats: as in the label recipe.
        profile: as in the label recipe.
        window: side in pixels, 0 for the whole image.
        window_stride: pixels.
        windows: how they are put together, as in the label recipe.
        positions: as in the label recipe.
        temperature: factor applied to the cosines before the softmax.
    """

    name: ProtocolName
    dataset: str
    scale: tuple[int, int]
    templates: str
    background: Literal["none", "ignored", "class"]
    background_threshold: float = 0.0
    image_stats: Literal["imagenet", "clip"]
    profile: Literal["reference", "weights"]
    window: int
    window_stride: int
    windows: Literal["cells", "pixels"]
    positions: Literal["exact", "offset"]
    temperature: float

    def ontology(self, classes: Ontology) -> Ontology:
        """The dataset's classes with the templates and words of the protocol."""
        fields = classes.to_dict() | {"templates": self.templates}
        words = _successors().get(self.dataset, {}) if self.name == "unified" else {}
        for entry in fields["classes"]:
            if entry["name"] in words.get("classes", {}):
                entry["prompts"] = words["classes"][entry["name"]]
        if "background" in words:
            fields["background"] = words["background"]
        return Ontology.from_dict(fields)

    def recipe_overrides(self) -> dict[str, Any]:
        """The recipe fields that the protocol fixes, by dotted name."""
        return {
            "images.scale": self.scale,
            "images.keep_ratio": True,
            "images.resize": "opencv",
            "maskclip.image_stats": self.image_stats,
            "maskclip.profile": self.profile,
            "maskclip.window": self.window,
            "maskclip.window_stride": self.window_stride,
            "maskclip.windows": self.windows,
            "maskclip.positions": self.positions,
            "maskclip.temperature": self.temperature,
        }


@cache
def _successors() -> dict[str, Any]:
    """Words by dataset: ``background``, and ``classes`` by name."""
    words: dict[str, Any] = yaml.safe_load(
        (Path(__file__).parent / "successors.yaml").read_text(encoding="utf-8")
    )
    return words


def _seed(dataset: str, scale: tuple[int, int], background: Literal["none", "ignored"]) -> Protocol:
    return Protocol(
        name="seed", dataset=dataset, scale=scale, background=background, templates="openai85",
        image_stats="imagenet", profile="reference", window=0, window_stride=0,
        windows="cells", positions="exact", temperature=100.0,
    )  # fmt: skip


def _unified(
    dataset: str, short_side: int, background: Literal["none", "ignored", "class"], threshold: float = 0.0
) -> Protocol:
    return Protocol(
        name="unified", dataset=dataset, scale=(2048, short_side), background=background,
        background_threshold=threshold, templates="imagenet80", image_stats="clip", profile="weights",
        window=224, window_stride=112, windows="pixels", positions="offset", temperature=40.0,
    )  # fmt: skip


PROTOCOLS: Mapping[str, Mapping[ProtocolName, Protocol]] = {
    "voc20": {
        "seed": _seed("voc20", (2048, 512), "ignored"),
        "unified": _unified("voc20", 336, "ignored"),
    },
    "voc21": {"unified": _unified("voc21", 336, "class", 0.1)},
    "context59": {
        # (520, 520) limits the long side.
        "seed": _seed("context59", (520, 520), "ignored"),
        "unified": _unified("context59", 336, "ignored"),
    },
    "context60": {"unified": _unified("context60", 336, "class", 0.1)},
    "cocostuff171": {
        "seed": _seed("cocostuff171", (2048, 512), "none"),
        "unified": _unified("cocostuff171", 448, "none"),
    },
    "cocoobject81": {"unified": _unified("cocoobject81", 336, "class", 0.1)},
    "cityscapes19": {
        "seed": _seed("cityscapes19", (1024, 512), "none"),
        "unified": _unified("cityscapes19", 560, "none"),
    },
    "ade150": {
        # Label 0 of ADE20K is "other", not a background class.
        "seed": _seed("ade150", (2048, 512), "ignored"),
        "unified": _unified("ade150", 336, "ignored"),
    },
}
"""Protocols by dataset and name. MaskCLIP's code has no background class, so neither has ``seed``."""


def get_protocol(dataset: str, name: str) -> Protocol:
    """The protocol of a dataset.

    Raises:
        MaskMillError: ``name_unknown``, listing the known ones.
    """
    known = PROTOCOLS.get(dataset, {})
    for protocol in known.values():
        if protocol.name == name:
            return protocol
    raise WrongUse(
        "name_unknown",
        f"There is no protocol {name!r} for {dataset}.",
        f"Known for it: {', '.join(known)}."
        if known
        else f"Datasets with protocols: {', '.join(PROTOCOLS)}.",
    )


def check_comparable(first: Protocol, second: Protocol) -> None:
    """Refuse to compare numbers from different protocols or datasets.

    Raises:
        MaskMillError: ``output_differs``.
    """
    if (first.name, first.dataset) != (second.name, second.dataset):
        raise WrongUse(
            "output_differs",
            f"Numbers of {first.name} on {first.dataset} and of {second.name} on {second.dataset} are not "
            "comparable.",
            "Measure both under one protocol.",
        )
