"""Find the images of any source.

To add a kind of source, add a module with a function that returns an ``ImageList``, and call it from here.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator

from models.errors import WrongUse
from pipeline.corpus.sources.coco import read_coco
from pipeline.corpus.sources.folders import is_pattern, local_files, remote_files
from pipeline.corpus.sources.found import (
    IMAGE_EXTENSIONS,
    LIST_EXTENSIONS,
    ImageList,
    LeftOut,
    batches,
    on_the_web,
)
from pipeline.corpus.sources.lists import read_csv, read_json_lines, read_lines
from pipeline.corpus.sources.parquet import read_parquet, read_parquet_files
from pipeline.corpus.sources.tars import COMPRESSED, read_shards, refuse_compressed
from pipeline.files.containers import inside
from pipeline.files.redaction import without_signature
from pipeline.files.storage import is_remote

Reader = Callable[[str, LeftOut], Iterator[ImageList]]
FILES: dict[str, Reader] = {
    ".txt": lambda uri, _left_out: read_lines(uri),
    ".csv": lambda uri, _left_out: read_csv(uri),
    ".jsonl": lambda uri, _left_out: read_json_lines(uri),
    ".json": lambda uri, _left_out: read_coco(uri),
    ".parquet": lambda uri, _left_out: read_parquet(uri),
    ".tar": lambda uri, left_out: read_shards([uri], left_out),
}
"""Readers of files that name or hold images."""


def find_images(uri: str, left_out: LeftOut, *, in_order: bool = False) -> Iterator[ImageList]:
    """Yield the images at a canonical URI, which may be any source of ``build_manifest``, in batches.

    Args:
        uri: of the source.
        left_out: is told what was found and not taken.
        in_order: list object stores in the order of their keys, which takes longer.

    Raises:
        WrongUse: ``input_missing``, ``dataset_invalid``.
    """
    if not is_remote(uri):
        if os.path.exists(uri) and not os.path.isdir(uri):
            return _file(uri, left_out)
        if inside(uri) is not None:
            return iter([ImageList([uri])])
        return _among(local_files(uri, left_out), uri, left_out)
    # Web servers offer no listing, and "?" starts a query there.
    if on_the_web(uri) or (uri.lower().endswith(tuple(FILES)) and not is_pattern(uri)):
        return _file(uri, left_out)
    if inside(uri) is not None:
        return iter([ImageList([uri])])
    files = remote_files(uri, left_out, in_order=in_order)
    first = next(files, None)
    if first == uri:
        return _file(uri, left_out)
    return _among(files if first is None else itertools.chain([first], files), uri, left_out)


def _among(files: Iterable[str], source: str, left_out: LeftOut) -> Iterator[ImageList]:
    """The images among files; without any, those in tar archives, or in Parquet files, if these are there."""
    shards: set[str] = set()
    tables: set[str] = set()
    found, compressed = False, ""
    others = LeftOut()
    for batch in batches(files):
        images = {name for name in batch if name.lower().endswith(IMAGE_EXTENSIONS)}
        for name in set(batch) - images:
            lower = name.lower()
            if not found and not images and lower.endswith((".tar", ".parquet")):
                (shards if lower.endswith(".tar") else tables).add(name)
            else:
                compressed = compressed or (name if lower.endswith(COMPRESSED) else "")
                others.add(os.path.splitext(name)[1].lower() or "no ending", name)
        if images:
            found = True
            yield ImageList(sorted(images))
    for name in (shards | tables) if found else tables if shards else ():
        others.add(os.path.splitext(name)[1].lower(), name)
    left_out.update(others)
    if found:
        return
    if compressed:
        refuse_compressed(compressed)
    if shards:
        yield from read_shards(sorted(shards), left_out)
    elif tables:
        yield from read_parquet_files(sorted(tables))
    else:
        raise WrongUse(
            "input_missing",
            f"no images in {source}: looked for {' '.join(IMAGE_EXTENSIONS)}; found "
            f"{left_out.describe() or 'no files at all'}",
            "Give a folder, glob or list that holds images.",
        )


def _file(uri: str, left_out: LeftOut) -> Iterator[ImageList]:
    lower = (uri.partition("?")[0] if on_the_web(uri) else uri).lower()
    if inside(uri) is not None:
        return iter([ImageList([uri])])
    for ending, read in FILES.items():
        if lower.endswith(ending):
            return read(uri, left_out)
    refuse_compressed(lower)
    if lower.endswith(IMAGE_EXTENSIONS):
        return iter([ImageList([uri])])
    raise WrongUse(
        "input_missing",
        f"{without_signature(uri)} is neither an image ({' '.join(IMAGE_EXTENSIONS)}) nor a list "
        f"({' '.join(LIST_EXTENSIONS)}) nor a .tar",
        "Give a folder, a glob, a list file or a manifest.",
    )
