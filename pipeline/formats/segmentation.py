"""Segmentations of COCO JSON: checked first, then encoded by pycocotools.

pycocotools trusts what it is given. A short RLE makes it read memory that nobody wrote, NaN and corners far
outside the image end the process. So nothing reaches it unchecked.

A checked segmentation is a list of parts, as plain JSON values. A part is a polygon, x and y of its corners
in turn, or an RLE with ``size`` and ``counts``. H W pixels of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Parts = list[Any]
_L = TypeVar("_L", bound=npt.NDArray[Any])

FAR = 10
"""Corners may lie outside the image by this multiple of its longer side."""
LONGEST_OUTLINE = 4_000_000
"""Pixels. pycocotools walks along an outline in steps of a fifth of a pixel and remembers each."""

# Five times this is a C int.
_FARTHEST = 100_000_000
# A count that fits an image of MAX_PIXELS has at most six characters; more would overflow in pycocotools.
_MOST_CHARACTERS = 6


def checked(segmentation: Any, height: int, width: int) -> Parts:
    """The parts of a segmentation, in the form that COCO documents.

    Spellings of other tools are accepted where they can mean one thing only: a single polygon without the
    outer list, corners as [x, y] or as {"x": x, "y": y}, numbers as text, and lists of polygons and RLEs.
    Polygons of one or two corners have no area and are dropped.

    Args:
        segmentation: as in the file, not empty.
        height: H.
        width: W.

    Returns:
        The parts; empty if none has an area.

    Raises:
        ValueError: with the reason in words.
    """
    if isinstance(segmentation, Mapping):
        return [_checked_rle(segmentation, height, width)]
    if not isinstance(segmentation, list):
        raise ValueError(f"it is {_shown(segmentation)}, neither polygons nor RLE")
    single = all(_is_number(part) for part in segmentation) or (
        len(segmentation) >= 3 and all(_is_corner(part) for part in segmentation)
    )
    parts: Parts = []
    boxes = 0
    for part in [segmentation] if single else segmentation:
        if isinstance(part, Mapping) and not _is_corner(part):
            parts.append(_checked_rle(part, height, width))
            continue
        polygon = _checked_polygon(part, height, width)
        if len(polygon) >= 6:
            parts.append(polygon)
        boxes += len(polygon) == 4
    if boxes and not parts:
        raise ValueError("four numbers can be a box or two points; a polygon has at least three corners")
    return parts


def encoded(parts: Parts, height: int, width: int) -> dict[str, Any]:
    """The union of the parts as pycocotools' compressed RLE.

    Args:
        parts: from ``checked`` for the same size; at least one.
        height: H.
        width: W.
    """
    from pycocotools import mask as coco

    polygons = [part for part in parts if not isinstance(part, Mapping)]
    rles: list[Any] = coco.frPyObjects(polygons, height, width) if polygons else []
    for part in parts:
        if isinstance(part, Mapping):
            plain = isinstance(part["counts"], list)
            rles.append(coco.frPyObjects(part, height, width) if plain else part)
    union: dict[str, Any] = coco.merge(rles)
    return union


def draw_instances(labels: _L, instances: Sequence[Any]) -> _L:
    """Draw instances into a map: crowd regions first, then from large to small, each over the earlier ones.

    Args:
        labels: (H, W), modified in place.
        instances: [class id, is crowd, order, parts of ``checked``] each.
    """
    from pycocotools import mask as coco

    height, width = labels.shape
    regions = []
    for class_id, crowd, order, parts in instances:
        rle = encoded(parts, height, width)
        regions.append((not crowd, -int(coco.area(rle)), order, class_id, rle))
    for *_, class_id, rle in sorted(regions, key=lambda region: region[:3]):
        labels[coco.decode(rle).astype(bool)] = class_id
    return labels


def _checked_polygon(part: Any, height: int, width: int) -> list[float]:
    """The corners' x and y in turn."""
    if not isinstance(part, list):
        raise ValueError(f"it holds {_shown(part)} where a polygon should be")
    if part and all(_is_corner(corner) for corner in part):
        pairs = [(c["x"], c["y"]) if isinstance(c, Mapping) else c for c in part]
        part = [number for pair in pairs for number in pair]
    values = _numbers(part, "a polygon")
    if len(values) % 2:
        raise ValueError(f"a polygon has {len(values)} numbers; x and y come in pairs")
    x, y = values[0::2], values[1::2]
    reach = min(FAR * max(height, width), _FARTHEST)
    far = (x < -reach) | (x > width + reach) | (y < -reach) | (y > height + reach)
    if far.any():
        first = int(np.argmax(far))
        raise ValueError(
            f"the corner ({x[first]:g}, {y[first]:g}) lies far outside the image of {height} x {width} pixels"
        )
    outline = np.maximum(np.abs(np.diff(x, append=x[:1])), np.abs(np.diff(y, append=y[:1]))).sum()
    if outline > LONGEST_OUTLINE:
        raise ValueError(f"the outline of {len(x):,} corners is {outline:,.0f} pixels long")
    numbers: list[float] = values.tolist()
    return numbers


def _checked_rle(part: Mapping[Any, Any], height: int, width: int) -> dict[str, Any]:
    lacking = [key for key in ("size", "counts") if key not in part]
    if lacking:
        raise ValueError(f"the RLE has no {lacking[0]}")
    size = _numbers(part["size"], "size").tolist()
    if size != [height, width]:
        raise ValueError(f"the RLE's size is {part['size']}, the image's {[height, width]}")
    counts = part["counts"]
    runs = _runs(counts) if isinstance(counts, str) else _numbers(counts, "counts")
    if (runs < 0).any() or (runs != np.floor(runs)).any():
        raise ValueError("counts of the RLE are no numbers of pixels")
    described, there = runs.sum(), height * width
    if described != there:
        raise ValueError(
            f"the RLE describes {described:,.0f} pixels, the image has {height} x {width} = {there:,}"
        )
    plain = counts if isinstance(counts, str) else runs.astype(np.int64).tolist()
    return {"size": [height, width], "counts": plain}


def _runs(text: str) -> npt.NDArray[np.int64]:
    """The run lengths in a compressed string (K characters).

    A number is written in groups of 5 bits from the lowest, one character each, plus 32 where another
    follows; the highest bit of the last group is the sign. From the fourth on, a number is the difference
    to the last but one before it.
    """
    groups = np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int64) - 48  # (K,)
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        raise ValueError(f"counts {_shown(text)} is not a compressed RLE")
    ends = np.flatnonzero(groups & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MOST_CHARACTERS:
        raise ValueError(f"counts {_shown(text)} is not a compressed RLE")
    shifts = 5 * (np.arange(len(groups)) - np.repeat(starts, lengths))
    values: npt.NDArray[np.int64] = np.add.reduceat((groups & 31) << shifts, starts)
    values -= ((groups[ends] & 16) >> 4) << (5 * lengths)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _numbers(values: Any, what: str) -> npt.NDArray[np.float64]:
    """A flat list of finite numbers, as float64."""
    try:
        array = np.asarray(values if isinstance(values, list) else None, np.float64)
    except (TypeError, ValueError, OverflowError):
        array = np.empty((0, 0))
    if array.ndim != 1:
        raise ValueError(f"{what} is {_shown(values)}, not a list of numbers")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} holds {values[int(np.argmin(np.isfinite(array)))]}")
    return array


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | str)


def _is_corner(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "x" in value and "y" in value
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
