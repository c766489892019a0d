"""The export formats by name.

To add one, add a line to ``FORMATS``. Modules are imported when a format is asked for, so that the command
line stays quick.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from models.errors import WrongUse, did_you_mean
from pipeline.formats.base import Format, Imported


@dataclass(frozen=True)
class FormatInfo:
    """Where a format is.

    Attributes:
        title: what it is, in a few words.
        module: below ``pipeline.formats``; it holds the format and its reader.
        format: name of the class.
        reader: name of the function ``(place, *, images=None) -> Imported``, with the path or URI of the
            dataset, and of its images if they are elsewhere; "" if the format cannot be read.
        packages: modules that the format needs and MaskMill does not install by itself.
        next_step: what to do with an export in "{output}", in a line; "" if there is nothing to say.
    """

    title: str
    module: str
    format: str
    reader: str = ""
    packages: tuple[str, ...] = ()
    next_step: str = ""


FORMATS: Mapping[str, FormatInfo] = MappingProxyType(
    {
        "coco": FormatInfo(
            "COCO instances: connected components with holes, as RLE",
            "coco",
            "Coco",
            "read_coco",
            next_step="pycocotools.coco.COCO('{output}/annotations/instances_train.json')",
        ),
        "png": FormatInfo("a grey PNG of class ids for each image", "png", "Png", "read_png"),
        "coco-panoptic": FormatInfo(
            "COCO panoptic: instances of things, regions of stuff",
            "coco_panoptic",
            "CocoPanoptic",
            "read_coco_panoptic",
            next_step="panopticapi reads {output}/annotations/panoptic_train.json and the folder beside it",
        ),
        "coco-stuff": FormatInfo(
            "COCO-Stuff: pixel maps, and an RLE for each class",
            "coco_stuff",
            "CocoStuff",
            "read_coco_stuff",
            next_step='pycocotools.coco.COCO("{output}/annotations/stuff_train.json")',
        ),
        "webdataset": FormatInfo(
            "tar shards for the package webdataset",
            "webdataset",
            "WebDataset",
            "read_webdataset",
            next_step='webdataset.WebDataset(sorted(glob.glob("{output}/train-*.tar")), shardshuffle=100)',
        ),
        "hf": FormatInfo(
            "Parquet for Hugging Face's datasets",
            "hf",
            "HuggingFace",
            "read_hf",
            next_step='datasets.load_dataset("{output}")',
        ),
        "voc": FormatInfo(
            "PASCAL VOC: masks with a palette, JPEGs, lists by split",
            "voc",
            "Voc",
            "read_voc",
            next_step="readers of VOC 2012 take {output} for their VOCdevkit/VOC2012",
        ),
        "yolo": FormatInfo(
            "Ultralytics' YOLO segmentation: a polygon for each segment",
            "yolo",
            "Yolo",
            "read_yolo",
            next_step="yolo segment train data={output}/data.yaml",
        ),
        "cityscapes": FormatInfo(
            "the layout of Cityscapes, with its ids where the classes are its own",
            "cityscapes",
            "Cityscapes",
            "read_cityscapes",
            next_step='torchvision.datasets.Cityscapes("{output}", split="train", target_type="semantic")',
        ),
        "labelstudio": FormatInfo(
            "tasks for Label Studio: brush masks to correct",
            "labelstudio",
            "LabelStudio",
            "read_labelstudio",
            next_step="Label Studio: set up a project with label_config.xml of {output}, import tasks.json",
        ),
        "cvat": FormatInfo(
            "CVAT's segmentation masks 1.1: of classes, and of objects to correct",
            "cvat",
            "Cvat",
            "read_cvat",
            next_step="CVAT: zip the content of {output}, upload it as Segmentation mask 1.1",
        ),
    }
)


def find_format(name: str) -> FormatInfo:
    """The entry of a format.

    Raises:
        MaskMillError: ``wrong_use`` for an unknown name; ``package_missing``.
    """
    info = FORMATS.get(name)
    if info is None:
        raise WrongUse(
            "wrong_use",
            f"There is no format {name}.",
            f"{did_you_mean(name, [*FORMATS])}There are: {', '.join(FORMATS)}.",
        )
    absent = [package for package in info.packages if importlib.util.find_spec(package) is None]
    if absent:
        raise WrongUse(
            "package_missing",
            f"The format {name} needs {', '.join(absent)}, which MaskMill does not install by itself.",
            f"pip install {' '.join(absent)}",
        )
    return info


def make_format(name: str, options: Mapping[str, Any]) -> Format:
    """A format with its options, which may be text.

    Raises:
        MaskMillError: as ``find_format``; ``wrong_use`` for an option that it has not, or with a wrong value.
    """
    info = find_format(name)
    kind = cast(Any, getattr(importlib.import_module(f"pipeline.formats.{info.module}"), info.format))
    fields = [field.name for field in dataclasses.fields(kind)]
    unknown = [option for option in options if option not in fields]
    if unknown:
        raise WrongUse(
            "wrong_use",
            f"The format {name} has no option {unknown[0]}.",
            f"{did_you_mean(unknown[0], fields)}It has: {', '.join(fields) or 'none'}.",
        )
    try:
        made: Format = TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise WrongUse(
            "wrong_use",
            f"Option {'.'.join(map(str, first['loc']))} of the format {name}: {first['msg']}.",
            "Give another value.",
        ) from None
    return made


def readable() -> Sequence[str]:
    """Names of the formats that can be read."""
    return [name for name, info in FORMATS.items() if info.reader]


def find_reader(name: str) -> Callable[..., Imported]:
    """The function that reads a format; see ``FormatInfo.reader``.

    Raises:
        MaskMillError: as ``find_format``; ``wrong_use`` if it cannot be read.
    """
    info = find_format(name)
    if not info.reader:
        raise WrongUse(
            "wrong_use",
            f"The format {name} can be written, not read.",
            f"These can be read: {', '.join(readable())}.",
        )
    read: Callable[..., Imported] = getattr(
        importlib.import_module(f"pipeline.formats.{info.module}"), info.reader
    )
    return read
