"""Registry of the benchmark datasets."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.errors import WrongUse, did_you_mean
from pipeline.datasets import (
    ade20k,
    cityscapes,
    cocojson,
    cocoobject,
    cocostuff,
    context,
    lvis,
    pairs,
    phrasecut,
    toy,
    voc,
)
from pipeline.datasets.base import SegmentationDataset, Source


@dataclass(frozen=True)
class DatasetInfo:
    """A benchmark dataset.

    Attributes:
        description: one line.
        default_split: the split that papers report.
        source: origin and folder layout.
        opener: called with the root, ``split=`` and further options as keywords.
        official: number of samples by split, if the benchmark fixes it. A subset can be evaluated, but is not
            comparable.
    """

    description: str
    default_split: str
    source: Source
    opener: Callable[..., SegmentationDataset]
    official: Mapping[str, int]

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options besides root and split."""
        return tuple(name for name in inspect.signature(self.opener).parameters if name not in _COMMON)

    @property
    def needs_ontology(self) -> bool:
        """Whether the user must say what the ids of the masks mean; benchmarks bring their own classes."""
        given = inspect.signature(self.opener).parameters.get("ontology")
        return given is not None and given.default is inspect.Parameter.empty


_COMMON = ("root", "split", "classes")

DATASETS: Mapping[str, DatasetInfo] = {
    "voc20": DatasetInfo(
        "PASCAL VOC 2012, 20 classes, background ignored", "val", voc.SOURCE,
        functools.partial(voc.open_voc, classes="voc20"), {"train": 1464, "val": 1449},
    ),
    "voc21": DatasetInfo(
        "PASCAL VOC 2012, 20 classes and background", "val", voc.SOURCE,
        functools.partial(voc.open_voc, classes="voc21"), {"train": 1464, "val": 1449},
    ),
    "context59": DatasetInfo(
        "PASCAL Context, 59 classes, background ignored", "val", context.SOURCE,
        functools.partial(context.open_context, classes="context59"), {"train": 4998, "val": 5105},
    ),
    "context60": DatasetInfo(
        "PASCAL Context, 59 classes and background", "val", context.SOURCE,
        functools.partial(context.open_context, classes="context60"), {"train": 4998, "val": 5105},
    ),
    "cocostuff171": DatasetInfo(
        "COCO-Stuff 164k, 80 things and 91 stuff classes", "val2017", cocostuff.SOURCE,
        cocostuff.open_cocostuff, {"train2017": 118_287, "val2017": 5000},
    ),
    "cocoobject81": DatasetInfo(
        "COCO-Object, 80 things and background", "val2017", cocoobject.SOURCE,
        cocoobject.open_coco_object, {"train2017": 118_287, "val2017": 5000},
    ),
    lvis.NAME: DatasetInfo(
        "LVIS v1, 1203 things, unlabelled pixels ignored", "val", lvis.SOURCE,
        lvis.open_lvis, {"train": 100_170, "val": 19_809},
    ),
    "cityscapes19": DatasetInfo(
        "Cityscapes, 19 classes of street scenes", "val", cityscapes.SOURCE,
        cityscapes.open_cityscapes, {"train": 2975, "val": 500},
    ),
    "ade150": DatasetInfo(
        "ADE20K, the 150 classes of scene parsing", "validation", ade20k.SOURCE,
        ade20k.open_ade20k, {"training": 20_210, "validation": 2000},
    ),
    "pairs": DatasetInfo(
        "Your own: a folder of images and a folder of masks", "all", pairs.SOURCE, pairs.open_pairs, {}
    ),
    "coco-json": DatasetInfo(
        "Your own: images and a COCO instances file", "val2017", cocojson.SOURCE,
        cocojson.open_coco_root, {},
    ),
    "toyworld": DatasetInfo(
        "The toy world: drawn from a seed, no files", "seed-2", toy.SOURCE, toy.open_toyworld, {}
    ),
    "phrasecut": DatasetInfo(
        "PhraseCut: referring expressions, one mask per phrase", "test", phrasecut.SOURCE,
        phrasecut.open_phrasecut, {},
    ),
}  # fmt: skip


def open_dataset(
    name: str, *, root: str | None = None, split: str | None = None, **options: Any
) -> SegmentationDataset:
    """Open a benchmark: list its folders and check that it is complete, without reading masks or images.

    Args:
        name: a key of ``DATASETS``.
        root: its folder, a path or URI; None for datasets without files.
        split: the default is the split that papers report.
        **options: ``ontology``, ``images`` and ``masks`` for ``pairs``; ``ontology``, ``images`` and
            ``annotations`` for ``coco-json``; ``source`` for ``cocoobject81``; ``count`` and ``size`` for
            ``toyworld``. See the functions ``open_*``.

    Raises:
        MaskMillError: ``name_unknown``; ``wrong_use``; ``dataset_missing``, naming the download page
            or the missing files; ``dataset_invalid``.
    """
    if name not in DATASETS:
        raise WrongUse(
            "name_unknown",
            f"There is no dataset {name!r}.",
            f"{did_you_mean(name, DATASETS)}Known: {', '.join(DATASETS)}.",
        )
    info = DATASETS[name]
    unknown = [option for option in options if option not in info.options]
    if unknown:
        raise WrongUse(
            "wrong_use",
            f"{name} has no option {unknown[0]!r}.",
            f"Options: {', '.join(info.options)}." if info.options else "It has none besides root and split.",
        )
    if info.needs_ontology and "ontology" not in options:
        raise WrongUse(
            "wrong_use",
            f"{name} needs an ontology: it gives the ids of the masks their meaning.",
            "Name a built-in ontology or a YAML file.",
        )
    return info.opener(root, split=split or info.default_split, **options)
