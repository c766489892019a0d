"""Images that have changed under their names since they were labelled."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.corpus.corpus import ADDRESS, Corpus
from pipeline.corpus.manifest import stable_id
from pipeline.corpus.spill import Spill
from pipeline.files.fetch import digest, file_version
from pipeline.files.images import ImageError
from pipeline.files.storage import Storage
from pipeline.table.labels import LABEL_SCHEMA, iter_batches

State = Literal["same", "changed", "gone", "unreadable"]
COLUMNS = ("id", "uri", "sha256", "version")
_READERS = 16


def find_changed(
    storage: Storage, corpus: Corpus, *, progress: Callable[[int], None] = lambda _done: None
) -> tuple[npt.NDArray[np.int64], Counter[State]]:
    """Compare the images of a manifest with the rows of a table.

    Images whose size and time of change, or ETag, are those of the row have not changed. Others are read:
    they have changed if their SHA-256 has.

    Args:
        storage: the table.
        corpus: images to compare; rows of others are left out.
        progress: called with the number of rows compared.

    Returns:
        Ids of the changed images, int64 (n,), and how many images are in which state.
    """
    states: Counter[State] = Counter()
    changed: list[int] = []
    pairs: Iterator[tuple[pa.RecordBatch, pa.Table]]
    if len(corpus.partitions) == 1:
        pairs = ((batch, corpus.table()) for batch in iter_batches(storage, COLUMNS, batch_size=4096))
    else:
        pairs = _by_partition(storage, corpus)
    images, of = Images(None), None
    with ThreadPoolExecutor(_READERS) as pool:
        for batch, manifest in pairs:
            if manifest is not of:
                images, of = Images(manifest), manifest
            rows = [row for row in batch.to_pylist() if row["id"] in images]
            look = functools.partial(image_state, images=images)
            for row, state in zip(rows, pool.map(look, rows), strict=True):
                states[state] += 1
                if state == "changed":
                    changed.append(row["id"])
            progress(states.total())
    return np.array(changed, np.int64), states


def _by_partition(storage: Storage, corpus: Corpus) -> Iterator[tuple[pa.RecordBatch, pa.Table]]:
    """Yield the rows of a table, and the images of the partition that they are in."""
    spill = Spill(pa.schema([LABEL_SCHEMA.field(name) for name in COLUMNS]))
    for batch in iter_batches(storage, COLUMNS, batch_size=65_536):
        spill.add(pa.table(batch))
    for span in corpus.partitions:
        manifest = corpus.read(span)
        for batch in spill.read(span).to_batches(4096):
            yield batch, manifest


class Images:
    """Where the images of a manifest are, by id.

    Args:
        manifest: as ``pipeline.corpus.manifest.build_manifest`` returns it; None if it is not known.
    """

    def __init__(self, manifest: pa.Table | None) -> None:
        if manifest is None:
            manifest = pa.table({"id": pa.array([], pa.int64())})
        ids = manifest["id"].to_numpy()
        self._order = np.argsort(ids)
        self._ids = ids[self._order]
        self._ranges: Sequence[npt.NDArray[np.int64]] = ()
        self._addresses = manifest[ADDRESS] if ADDRESS in manifest.column_names else None
        if "offset" in manifest.column_names:
            self._ranges = [
                manifest[name].fill_null(-1).to_numpy()[self._order] for name in ("offset", "length")
            ]

    def __contains__(self, row_id: int) -> bool:
        at = int(np.searchsorted(self._ids, row_id))
        return at < len(self._ids) and int(self._ids[at]) == row_id

    def address(self, row: Mapping[str, Any]) -> str:
        """Where to read the image of a row: a signed address, or its URI."""
        uri: str = row["uri"]
        if self._addresses is None or row["id"] not in self:
            return uri
        return self._addresses[int(self._order[np.searchsorted(self._ids, row["id"])])].as_py() or uri

    def located(self, row: Mapping[str, Any]) -> bool:
        """Whether it is known where the image of a row is: a whole file, or a range that the manifest has.

        Args:
            row: with ``id`` and ``uri``.
        """
        return row["id"] in self or row["id"] == stable_id(str(row["uri"]))

    def byte_range(self, row_id: int) -> tuple[int, int | None]:
        """First byte and number of bytes of an image; (0, None) for all of its file."""
        if not self._ranges or row_id not in self:
            return 0, None
        start, length = (int(values[np.searchsorted(self._ids, row_id)]) for values in self._ranges)
        return (0, None) if start < 0 else (start, length)


def image_state(row: Mapping[str, Any], images: Images, *, trust_version: bool = True) -> State:
    """Whether the image of a row is still the one that was labelled.

    Args:
        row: with ``COLUMNS``.
        images: where its bytes are.
        trust_version: do not read an image whose version has not changed.
    """
    address = images.address(row)
    version = file_version(address)
    if trust_version and version is not None and version == row["version"]:
        return "same"
    if row["sha256"] is None:  # it could not be read then
        return "same" if version is None or version == row["version"] else "changed"
    start, length = images.byte_range(row["id"])
    try:
        found = digest(address, start=start, length=length, attempts=2)
    except ImageError as error:
        return "gone" if error.code == "not_found" else "unreadable"
    return "same" if found == row["sha256"] else "changed"
