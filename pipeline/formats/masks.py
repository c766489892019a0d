"""Masks of datasets, read exactly: palette indices or grey values of PNGs, never colours."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from models.errors import MaskMillError, WrongUse
from pipeline.files.fetch import fetch
from pipeline.files.images import MAX_PIXELS, ImageError
from pipeline.files.recognition import FORMATS
from pipeline.ontology.ontology import Ontology

Labels = npt.NDArray[np.uint8 | np.uint16]

MAX_SHOWN = 5
"""Examples that a message names."""


def read_mask(uri: str) -> Labels:
    """Read the ids (H, W) of a mask: palette indices or grey values, never colours.

    Args:
        uri: path or URI of a PNG of 1 to 16 bits.

    Returns:
        uint8, or uint16 for 16-bit masks.

    Raises:
        MaskMillError: ``dataset_invalid``; ``mask_invalid`` for a colour image.
    """
    try:
        data = fetch(uri)
    except ImageError as error:
        raise unreadable(uri, str(error)) from error
    return decode_ids(data, uri)


def decode_ids(data: bytes, uri: str, *, size: tuple[int, int] | None = None) -> Labels:
    """The ids (H, W) of an encoded mask; see ``read_mask``.

    Args:
        data: the file.
        uri: its address, for errors.
        size: the (H, W) that it must have.

    Raises:
        MaskMillError: as ``read_mask``; ``mask_invalid`` for another size.
    """
    check_png_size(data, uri, size)
    if not data:
        raise unreadable(uri, "the file has 0 bytes")
    if not data.startswith(b"\x89PNG"):
        raise unreadable(uri, f"it is no PNG, but {_kind(data)}")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
            mode, array = opened.mode, np.asarray(opened)
    except UnidentifiedImageError as error:  # whose text is the address of a buffer
        raise unreadable(uri, "the PNG's header is cut off or damaged") from error
    except Exception as error:  # Pillow raises all sorts of exceptions on damaged files
        raise unreadable(uri, str(error) or type(error).__name__) from error
    if mode in ("P", "L", "1"):
        # Pillow scales 2-bit and 4-bit grey to 0..255. Byte 24 of a PNG is the bit depth.
        factor = {2: 85, 4: 17}.get(data[24], 1) if mode == "L" else 1
        return (array // factor).astype(np.uint8)
    if mode.startswith("I") and array.size and array.min() >= 0 and array.max() <= 65_535:
        return array.astype(np.uint16)
    raise WrongUse(
        "mask_invalid",
        f"{uri} is a picture of mode {mode}, not a map of class ids.",
        "Give masks as grey or palette PNGs whose values are ids; colours cannot be mapped back to ids.",
    )


def check_png_size(data: bytes, uri: str, size: tuple[int, int] | None) -> None:
    """Refuse a PNG of another size than (H, W), or of more pixels than images may have, undecoded.

    Raises:
        MaskMillError: ``mask_invalid``.
    """
    if len(data) < 24 or not data.startswith(b"\x89PNG"):
        return  # told when it is decoded
    width, height = struct.unpack(">II", data[16:24])
    if size is not None and (height, width) != size:
        raise WrongUse(
            "mask_invalid",
            f"{uri}: the mask has {height} x {width} pixels, the image {size[0]} x {size[1]}.",
            "Use the masks that belong to these images; neither may have been resized.",
        )
    if height * width > MAX_PIXELS:
        raise WrongUse(
            "mask_invalid",
            f"{uri} of {height} x {width} pixels exceeds the limit of {MAX_PIXELS:,} pixels.",
            "Leave the image out, or make it smaller.",
        )


def identity_ids(count: int, *, ignore: int = 255) -> dict[int, int]:
    """The identity mapping of ids 0 to ``count - 1`` and ``ignore``."""
    return {**{number: number for number in range(count)}, ignore: ignore}


def relabel(raw: Labels, ids: Mapping[int, int], *, classes: Ontology, where: str) -> Labels:
    """Map the ids in a file to those of an ontology.

    Args:
        raw: ids in the file, (H, W).
        ids: id in the ontology, or its ignore index, by id in the file.
        classes: the ontology.
        where: the file, for the error.

    Raises:
        MaskMillError: ``mask_invalid``, naming the file, if ``ids`` lacks one of its ids.
    """
    table = np.full(int(raw.max(initial=0)) + 1, -1, np.int32)
    for given, meant in ids.items():
        if given < len(table):
            table[given] = meant
    labels = table[raw]
    if labels.min(initial=0) < 0:
        unknown = np.unique(raw[labels < 0]).tolist()
        raise WrongUse(
            "mask_invalid",
            f"{where} holds ids that {classes.name} does not have: {shown(unknown)}.",
            f"Known ids: {_ranges(ids)}. Use the masks of this benchmark, or an ontology that fits them.",
        )
    return labels.astype(classes.mask_dtype)


def shown(names: Sequence[Any]) -> str:
    """The first few items of a list, for messages."""
    rest = len(names) - MAX_SHOWN
    return ", ".join(map(str, names[:MAX_SHOWN])) + (f", and {rest:,} more" if rest > 0 else "")


def _ranges(ids: Iterable[int]) -> str:
    """Format numbers as ranges, such as "0-20, 255"."""
    runs: list[list[int]] = []
    for number in sorted(ids):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _kind(data: bytes) -> str:
    """What a file is that should be a PNG."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            return f"{opened.format} (masks are PNGs: other formats may change the ids)"
    except Exception:  # a damaged or other file
        return f"{len(data):,} bytes that begin with {data[:8]!r}"


def unreadable(uri: str, why: str) -> MaskMillError:
    """``dataset_invalid`` for a file of a dataset."""
    return WrongUse(
        "dataset_invalid",
        f"{uri} cannot be read: {why}.",
        "Get this file again, or leave its image out.",
    )
