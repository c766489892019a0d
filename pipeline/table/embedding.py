"""CLIP embeddings of a few images of a table.

Shapes: N images, D channels, S side of CLIP's images.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.errors import MaskMillError
from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError, decode
from pipeline.table.changed import Images
from pipeline.table.record import TableRecord

if TYPE_CHECKING:
    from models.clip.weights import WeightSource

_BATCH = 32
_READERS = 8
BUNDLED = ("toyclip", "bundled")


def find_clip(record: TableRecord) -> tuple[WeightSource, str]:
    """The CLIP that labelled a table, or its student's; else the bundled one.

    Returns:
        The weights, and why they are the bundled ones although the table says others; else "".
    """
    from models.clip.weights import find_weights

    recorded = record.weights.get("text", record.weights)
    model, pretrained = str(recorded.get("model")), recorded.get("pretrained")
    if record.source != "pseudo" or model == "clipseg":
        return find_weights(*BUNDLED), "no CLIP has labelled this table"
    try:
        return find_weights(model, pretrained), ""
    except MaskMillError as error:
        return find_weights(*BUNDLED), error.message


def embed_images(
    source: WeightSource,
    rows: Sequence[dict[str, Any]],
    *,
    images: Images,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Embed the images of some rows.

    Args:
        source: the CLIP.
        rows: with ``id``, ``uri`` and ``sha256``.
        images: where images are that are not whole files at their address.
        progress: called with the number of images done and in total.

    Returns:
        Vectors of length 1, float32 (N, D); and which images were found as they were labelled, bool (N,).
        The vectors of others are 0.
    """
    import torch

    from models.clip.loading import load_source
    from models.device import best_device

    clip = load_source(source, device=best_device(), towers="visual")
    side = int(clip.source.config["vision_cfg"]["image_size"])
    vectors = np.zeros((len(rows), clip.embed_dim), np.float32)
    found = np.zeros(len(rows), np.bool_)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (clip.mean, clip.std))
    with ThreadPoolExecutor(_READERS) as pool, torch.inference_mode():
        done = 0
        for numbers in _chunks(range(len(rows)), _BATCH):
            small = list(pool.map(lambda number: _small(rows[number], images, side), numbers))
            good = [
                (number, image) for number, image in zip(numbers, small, strict=True) if image is not None
            ]
            done += len(numbers)
            progress(done, len(rows))
            if not good:
                continue
            batch = torch.from_numpy(np.stack([image for _, image in good])).permute(0, 3, 1, 2)
            pixels = ((batch.float() / 255 - mean) / std).to(clip.device, clip.dtype)
            embedded = torch.nn.functional.normalize(clip.encode_image(pixels).float(), dim=-1)
            places = [number for number, _ in good]
            vectors[places] = embedded.cpu().numpy()
            found[places] = True
    return vectors, found


def _chunks(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    source = iter(numbers)
    while chunk := list(itertools.islice(source, size)):
        yield chunk


def _small(row: dict[str, Any], images: Images, side: int) -> npt.NDArray[np.uint8] | None:
    """The image as (S, S, 3); None if it cannot be read, or is another than was labelled."""
    image = read_labelled(row, images)
    if isinstance(image, str):
        return None
    return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def read_labelled(row: dict[str, Any], images: Images) -> npt.NDArray[np.uint8] | str:
    """The image that was labelled, (H, W, 3); or why it cannot be had now.

    Args:
        row: with ``id``, ``uri`` and ``sha256``.
        images: where images are that are not whole files at their address.
    """
    start, length = images.byte_range(row["id"])
    try:
        data = fetch(images.address(row), start=start, length=length, attempts=2)
        if row["sha256"] is not None and hashlib.sha256(data).digest() != row["sha256"]:
            return "the file has changed since it was labelled"
        return decode(data)
    except ImageError as error:
        return error.message
