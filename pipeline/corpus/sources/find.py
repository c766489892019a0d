"""Find the images of any source.

To add a kind of source, add a module with a function that returns an ``ImageList``, and call it from here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from models.errors import WrongUse
from pipeline.corpus.sources.coco import read_coco
from pipeline.corpus.sources.folders import is_pattern, local_files, remote_files
from pipeline.corpus.sources.found import (
    IMAGE_EXTENSIONS,
    LIST_EXTENSIONS,
    ImageList,
    PathsByReason,
    describe_left_out,
    leave_out,
    on_the_web,
)
from pipeline.corpus.sources.lists import read_csv, read_json_lines, read_lines
from pipeline.corpus.sources.parquet import read_parquet, read_parquet_files
from pipeline.corpus.sources.tars import read_shards, refuse_compressed
from pipeline.files.containers import inside
from pipeline.files.redaction import without_signature
from pipeline.files.storage import is_remote

FILES: dict[str, Callable[[str], ImageList]] = {
    ".txt": read_lines,
    ".csv": read_csv,
    ".jsonl": read_json_lines,
    ".json": read_coco,
    ".parquet": read_parquet,
    ".tar": lambda uri: read_shards([uri]),
}
"""Readers of files that name or hold images."""


def find_images(uri: str) -> ImageList:
    """List the images at a canonical URI, which may be any source of ``build_manifest``.

    Raises:
        WrongUse: ``source_missing``, ``source_invalid``.
    """
    left_out: PathsByReason = {}
    if not is_remote(uri):
        if os.path.exists(uri) and not os.path.isdir(uri):
            return _file(uri)
        if inside(uri) is not None:
            return ImageList([uri])
        return _among(local_files(uri, left_out), uri, left_out)
    # Web servers offer no listing, and "?" starts a query there.
    if on_the_web(uri) or (uri.lower().endswith(tuple(FILES)) and not is_pattern(uri)):
        return _file(uri)
    if inside(uri) is not None:
        return ImageList([uri])
    files = remote_files(uri, left_out)
    return _file(uri) if files == [uri] else _among(files, uri, left_out)


def _among(files: Sequence[str], source: str, left_out: PathsByReason) -> ImageList:
    """The images among files; without any, those in tar archives, or in Parquet files, if these are there."""
    images = sorted({name for name in files if name.lower().endswith(IMAGE_EXTENSIONS)})
    shards = [] if images else sorted(name for name in files if name.lower().endswith(".tar"))
    tables = [] if images or shards else sorted(name for name in files if name.lower().endswith(".parquet"))
    for name in sorted(set(files).difference(images, shards, tables)):
        if not images:
            refuse_compressed(name)
        leave_out(left_out, os.path.splitext(name)[1].lower() or "no ending", name)
    if images:
        return ImageList(images, left_out=left_out)
    if shards or tables:
        found = read_shards(shards) if shards else read_parquet_files(tables)
        for reason, paths in left_out.items():
            found.left_out.setdefault(reason, []).extend(paths)
        return found
    raise WrongUse(
        "source_missing",
        f"no images in {source}: looked for {' '.join(IMAGE_EXTENSIONS)}; found "
        f"{describe_left_out(left_out) or 'no files at all'}",
        "Give a folder, glob or list that holds images.",
    )


def _file(uri: str) -> ImageList:
    lower = (uri.partition("?")[0] if on_the_web(uri) else uri).lower()
    if inside(uri) is not None:
        return ImageList([uri])
    for ending, read in FILES.items():
        if lower.endswith(ending):
            return read(uri)
    refuse_compressed(lower)
    if lower.endswith(IMAGE_EXTENSIONS):
        return ImageList([uri])
    raise WrongUse(
        "source_missing",
        f"{without_signature(uri)} is neither an image ({' '.join(IMAGE_EXTENSIONS)}) nor a list "
        f"({' '.join(LIST_EXTENSIONS)}) nor a .tar",
        "Give a folder, a glob, a list file or a manifest.",
    )
