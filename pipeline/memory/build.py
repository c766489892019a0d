"""Build a memory of regions from a label table, in parts, on any number of workers; resumable, and it grows.

A part holds the regions of some files of the table. A run makes the parts of files that are in none, or that
have changed, and then ``finish`` writes the record that names all of them. Done again, all of this gives the
same bytes; a part is put in place whole, and its mark after it.

Shapes: R regions of an image, K key channels, D embedding channels.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from models.errors import WrongUse
from pipeline.files import corruptions, images
from pipeline.files.fetch import fetch, file_version, max_bytes
from pipeline.files.images import ImageError, ImageSettings
from pipeline.files.records import now
from pipeline.files.storage import Storage
from pipeline.memory.index import write_index
from pipeline.memory.parts import (
    Mark,
    Part,
    delete_other_parts,
    encoded,
    marked_parts,
    widths_of,
    write_part_file,
)
from pipeline.memory.record import INDEX_FILE, MemoryRecord, PartRecord, write_memory_record
from pipeline.table.changed import Images
from pipeline.table.labels import OK, decode_mask, iter_batches, read_ids, refuse_doubled, table_files

if TYPE_CHECKING:
    from torch import Tensor

    from models.maskclip import Described

FILES_A_PART = 8
"""Files of the table in a part: about 256 images, whose worker loads the model once."""
_COLUMNS = ("id", "uri", "sha256", "status", "mask")
_BATCH = 16


class Describer(Protocol):
    """What sees images: a ``pipeline.labelling.maskclip.MaskClipLabeller``."""

    def describe(self, image: np.ndarray) -> tuple[Described, Tensor]:
        """What a memory keeps of an image (Hn, Wn, 3), and the image itself uint8 (3, Hn, Wn) beside it."""
        ...


@dataclass(frozen=True)
class Plan:
    """What is to do.

    Attributes:
        table: the folder that has the files.
        finished: parts that stay.
        todo: files of the parts to make, with what tells them from later ones, by the parts' names.
        made_by: see ``Mark``.
    """

    table: Storage
    finished: tuple[PartRecord, ...]
    todo: dict[str, dict[str, str]]
    made_by: str


@dataclass(frozen=True)
class Source:
    """How the images of a table are read.

    Attributes:
        settings: for decoding and resizing, of the table's recipe.
        ignore_index: of its masks.
        images: where images are that are not whole files at their address.
    """

    settings: ImageSettings
    ignore_index: int
    images: Images = field(default_factory=lambda: Images(None))


def make_plan(output: Storage, record: MemoryRecord) -> Plan:
    """Compare the files of the table with the finished parts. Call only while holding the lease.

    Raises:
        MaskMillError: ``input_missing`` for a table without rows; ``table_damaged``.
    """
    folder, names = table_files(record.table)
    if not names:
        raise WrongUse(
            "input_missing", f"{record.table} has no rows.", "Give the --output of maskmill label."
        )
    refuse_doubled(read_ids(record.table), folder)
    files = {name: file_version(folder.uri_of(name)) or "" for name in names}
    made_by = _made_by(record)
    finished: list[PartRecord] = []
    covered: set[str] = set()
    for part in marked_parts(output, made_by):
        same = all(files.get(name) == version for name, version in part.files.items())
        if same and not covered & part.files.keys():
            finished.append(part)
            covered |= part.files.keys()
    new = [name for name in names if name not in covered]
    todo = {}
    for start in range(0, len(new), FILES_A_PART):
        chosen = {name: files[name] for name in new[start : start + FILES_A_PART]}
        todo[hashlib.sha256(json.dumps([made_by, chosen]).encode()).hexdigest()[:24]] = chosen
    return Plan(folder, tuple(finished), todo, made_by)


def write_part(
    name: str,
    *,
    output: Storage,
    record: MemoryRecord,
    plan: Plan,
    source: Source,
    load: Callable[[], Describer],
    fence: Callable[[], None] = lambda: None,
) -> PartRecord:
    """Make a part and put it in place.

    Args:
        name: of the part, one of ``plan.todo``.
        output: the memory.
        record: what it is.
        plan: what is to do.
        source: how images are read.
        load: loads what sees them.
        fence: called before the part is put in place; raises if the lease was lost.

    Raises:
        MaskMillError: ``table_damaged``; what the storage says.
    """
    import torch

    describer = load()
    keys: list[Tensor] = []
    values: list[Tensor] = []
    ids: list[int] = []
    left_out: Counter[str] = Counter()
    count = 0
    for row in _rows(plan.table, list(plan.todo[name])):
        seen = _image(row, source) if row["status"] == OK else row["status"]
        if isinstance(seen, str):
            left_out[seen] += 1
            continue
        of_keys, of_values = regions_of_image(
            describer, seen, decode_mask(row["mask"]["bytes"]), record, source.ignore_index
        )
        if not len(of_keys):
            left_out["no_region"] += 1
            continue
        keys.append(of_keys.half())
        values.append(of_values.half())
        ids += [row["id"]] * len(of_keys)
        count += 1
    empty = torch.zeros(0, 0, dtype=torch.float16)
    part = Part(
        torch.cat(keys) if keys else empty,
        torch.cat(values) if values else empty,
        torch.tensor(ids, dtype=torch.int64),
    )
    data, digest = encoded(part)
    made = PartRecord(
        name=name,
        sha256=digest,
        files=plan.todo[name],
        images=count,
        left_out=dict(sorted(left_out.items())),
        regions=len(ids),
    )
    fence()
    write_part_file(output, data, Mark(part=made, made_by=plan.made_by))
    return made


def regions_of_image(
    describer: Describer, image: np.ndarray, mask: np.ndarray, record: MemoryRecord, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Keys fp32 (R, K) and values fp32 (R, D) of length 1 of an image's regions.

    Args:
        describer: sees it.
        image: uint8 (Hn, Wn, 3), as the network sees it.
        mask: its labels (H, W).
        record: how it falls into regions.
        ignore_index: of the labels.
    """
    import torch.nn.functional as F

    from models.regions import cell_labels, means, regions_of

    described, pixels = describer.describe(image)
    features, keys = described.features[0].cpu(), described.keys[0].float().cpu()
    labels = cell_labels(mask, (features.shape[1], features.shape[2]), ignore_index)
    regions = regions_of(record.regions, labels=labels, features=features, image=pixels.cpu())
    return means(keys, regions), F.normalize(means(features.float(), regions), dim=1)


def finish(
    output: Storage,
    record: MemoryRecord,
    parts: Sequence[PartRecord],
    *,
    fence: Callable[[], None] = lambda: None,
) -> MemoryRecord:
    """Build the index if one is asked for, and write the record. All parts must be there.

    Args:
        output: the memory.
        record: what it is.
        parts: all of them.
        fence: as in ``write_part``.
    """
    parts = tuple(sorted(parts, key=lambda part: part.name))
    filled = tuple(part for part in parts if part.regions)
    widths = widths_of(output, filled[0]) if filled else (0, 0)
    record = record.model_copy(
        update={
            "created": record.created or now(),
            "parts": parts,
            "key_width": widths[0],
            "value_width": widths[1],
            "index_sha256": "",
            "complete": True,
        }
    )
    if record.index == "faiss" and record.count:
        record = record.model_copy(update={"index_sha256": write_index(output, record)})
    fence()
    write_memory_record(output, record)
    delete_other_parts(output, {part.name for part in parts})
    if not record.index_sha256:
        output.delete(INDEX_FILE)
    return record


def _made_by(record: MemoryRecord) -> str:
    """What regions depend on, beside the files of the table."""
    kept = ("model", "pretrained", "images", "maskclip", "precision")
    recipe = {name: record.recipe.get(name) for name in kept}
    content = [recipe, record.weights["fingerprint"], record.regions, record.key_block]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _rows(folder: Storage, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for batch in iter_batches(folder, list(_COLUMNS), batch_size=_BATCH, names=list(names)):
        yield from batch.to_pylist()


def _image(row: dict[str, Any], source: Source) -> np.ndarray | str:
    """The image of a row as the network sees it, or why it is left out."""
    settings = source.settings
    start, length = source.images.byte_range(row["id"])
    try:
        data = fetch(
            source.images.address(row), start=start, length=length, max_bytes=max_bytes(settings.max_pixels)
        )
        if row["sha256"] is not None and hashlib.sha256(data).digest() != row["sha256"]:
            return "image_changed"
        image = images.decode(data, max_pixels=settings.max_pixels)
    except ImageError as error:
        return error.code
    if settings.corruption:
        kind, level = corruptions.parse(settings.corruption)
        image = corruptions.corrupt(image, kind, level, seed=row["id"] % 2**64)
    return images.fit(image, settings)
