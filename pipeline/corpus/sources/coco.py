"""The images that a COCO annotation file names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePosixPath

from pydantic import BaseModel, TypeAdapter, ValidationError

from pipeline.corpus.sources.found import ImageList, bad_list, entry_uri
from pipeline.corpus.sources.lists import read_text
from pipeline.files.storage import open_storage


class _Image(BaseModel):
    file_name: str
    coco_url: str | None = None
    width: int | None = None
    height: int | None = None


class _Document(BaseModel):
    images: list[_Image]


_DOCUMENT = TypeAdapter(_Document)


def read_coco(uri: str) -> Iterator[ImageList]:
    """The images of a COCO JSON, from its folder or from where COCO and its followers keep them.

    Names are relative to the folder of the file, to that above it, to ``images`` in either, or to the folder
    that is called like the end of the file's name (``annotations/instances_val2017.json``: ``val2017``). If
    the first image is in none of them, all are taken from their ``coco_url``.

    Raises:
        WrongUse: ``input_missing``, ``dataset_invalid``.
    """
    try:
        images = _DOCUMENT.validate_python(json.loads(read_text(uri))).images
    except (ValueError, RecursionError) as error:
        reason = (
            "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
            if isinstance(error, ValidationError)
            else str(error)
        )
        raise bad_list(uri, f"not COCO's JSON: {reason}") from None
    if not images:
        raise bad_list(uri, "lists no image")
    folder = _folder(uri, images[0].file_name)
    if folder is None and any(image.coco_url is None for image in images):
        raise bad_list(uri, f"{images[0].file_name} is in none of {', '.join(_places(uri))}")
    entries = [
        image.coco_url or ""
        if folder is None
        else (image.file_name if _is_whole(image.file_name) else f"{folder}/{image.file_name}")
        for image in images
    ]
    uris = [entry_uri(uri, entry, f"{uri}: image {number}") for number, entry in enumerate(entries)]
    yield ImageList(uris, {name: [getattr(image, name) for image in images] for name in ("width", "height")})


def _places(uri: str) -> list[str]:
    """Where the images of an annotation file may be."""
    base, _, name = uri.rpartition("/")
    above = base.rpartition("/")[0]
    split = PurePosixPath(name).stem.rpartition("_")[2]
    return [base, f"{base}/images", above, f"{above}/images", f"{above}/{split}", f"{above}/images/{split}"]


def _folder(uri: str, first: str) -> str | None:
    """The place that has the first image; that of the file if its images have whole addresses."""
    places = _places(uri)
    if _is_whole(first) or ".." in PurePosixPath(first).parts:
        return places[0]
    return next((place for place in places if open_storage(place).exists(first)), None)


def _is_whole(name: str) -> bool:
    return "://" in name or name.startswith("/")
