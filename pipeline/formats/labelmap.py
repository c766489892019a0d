"""``labelmap.txt``: names and colours of classes, for masks of palette indices or of colours.

    # label:color_rgb:parts:actions
    background:56,56,60::
    cat:201,70,70::
    ignored:224,224,192::

The format of this file is that of CVAT and Datumaro. A line is a class, in the order of their ids. The last
one stands for pixels without a class; it is called "ignored", or "void" if there is a class of that name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse
from pipeline.files.documents import decoded, read_document
from pipeline.files.storage import Storage
from pipeline.formats.classes import FoundClass, ontology_of
from pipeline.formats.escapes import escape, unescape
from pipeline.formats.pictures import Colors
from pipeline.ontology.ontology import Ontology
from pipeline.table.statistics import Labels

LABELMAP_FILE = "labelmap.txt"
VOID = 255
"""Index of pixels without a class in 8-bit masks."""
VOID_COLOR = (224, 224, 192)
"""Their colour in PASCAL VOC."""

_IGNORED = re.compile(r"ignored|void|unlabell?ed|ignored \d+")


@dataclass(frozen=True)
class LabelMap:
    """Classes in the order of their ids, with a name for pixels that have none.

    Attributes:
        ontology: the classes.
        colors: uint8 (C + 1, 3), all different; the last one is that of pixels without a class, if there is
            such a line.
    """

    ontology: Ontology
    colors: Colors
    has_ignored: bool = True

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """(C + 1,): the label of each line."""
        count = self.ontology.num_classes
        return np.append(np.arange(count), [self.ontology.ignore_index] * self.has_ignored).astype(np.int64)


def ignored_name(names: Sequence[str]) -> str:
    """What pixels without a class are called, which is no class's name."""
    taken = {name.casefold() for name in names}
    candidates = ["ignored", "void", *(f"ignored {number}" for number in range(2, len(names) + 3))]
    return next(name for name in candidates if name not in taken)


def is_ignored(name: str) -> bool:
    """Whether the last of a dataset's names stands for pixels without a class."""
    return _IGNORED.fullmatch(name.casefold()) is not None


def distinct_colors(ontology: Ontology) -> Colors:
    """The colours of the classes and ``VOID_COLOR``, (C + 1, 3), all different and none of them black.

    A colour is the ontology's, unless an earlier class has it too. Black is what many programs take for
    nothing.
    """
    used = {(0, 0, 0), VOID_COLOR}
    chosen: list[tuple[int, int, int]] = []
    for red, green, blue in ontology.palette().tolist():
        color = (red, green, blue)
        while color in used:
            # The nearest in blue, which eyes notice least.
            value = (color[0] << 16 | color[1] << 8 | color[2]) + 1 & 0xFFFFFF
            color = (value >> 16, value >> 8 & 255, value & 255)
        used.add(color)
        chosen.append(color)
    return np.array([*chosen, VOID_COLOR], np.uint8)


def to_indices(labels: Labels, ontology: Ontology) -> npt.NDArray[np.uint8]:
    """Labels (H, W) with ``VOID`` for pixels without a class."""
    if ontology.ignore_index == VOID and labels.dtype == np.uint8:
        return labels.astype(np.uint8, copy=False)
    return np.where(labels == ontology.ignore_index, VOID, labels).astype(np.uint8)


def write_labelmap(ontology: Ontology, output: Storage) -> None:
    """Write ``labelmap.txt``."""
    names = [*ontology.names, ignored_name(ontology.names)]
    lines = ["# label:color_rgb:parts:actions"]
    for name, (red, green, blue) in zip(names, distinct_colors(ontology).tolist(), strict=True):
        lines.append(f"{escape(name, ':')}:{red},{green},{blue}::")
    output.write_bytes(LABELMAP_FILE, "".join(f"{line}\n" for line in lines).encode())


def read_labelmap(place: Storage, *, name: str) -> LabelMap:
    """Read ``labelmap.txt``.

    Args:
        place: its folder.
        name: of the ontology.

    Raises:
        FileNotFoundError: there is none.
        MaskMillError: ``dataset_invalid``, naming the line; ``ontology_invalid``.
    """
    where = place.uri_of(LABELMAP_FILE)
    text = decoded(read_document(place, LABELMAP_FILE, code="dataset_invalid"), where, code="dataset_invalid")
    names: list[str] = []
    colors: list[tuple[int, ...]] = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        label, *rest = line.split(":")
        color = re.fullmatch(r"\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*", rest[0] if rest else "")
        values = tuple(map(int, color.groups())) if color else ()
        if len(rest) != 3 or not values or max(values) > 255:
            raise WrongUse(
                "dataset_invalid",
                f"{where}:{number}: not a label with a colour: {line[:80]!r}.",
                "A line is name:red,green,blue:: with colours from 0 to 255.",
            )
        if values in colors:
            raise WrongUse(
                "dataset_invalid",
                f"{where}:{number}: {label} has the colour of another label.",
                "Give each label a colour of its own.",
            )
        names.append(unescape(label))
        colors.append(values)
    ignored = len(names) > 1 and is_ignored(names[-1])
    classes = len(names) - ignored
    found = map(FoundClass, names[:classes], colors[:classes])
    ontology = ontology_of(name, found, where=where)
    return LabelMap(ontology, np.array(colors, np.uint8).reshape(-1, 3), ignored)
