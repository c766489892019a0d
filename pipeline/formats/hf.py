"""Hugging Face: Parquet with ``Image`` columns, which ``datasets.load_dataset(FOLDER)`` opens.

    README.md                   the dataset card: splits for ``load_dataset``, and the classes
    data/SPLIT-PART.parquet     image, mask, classes, name, uri and id of each image
    id2label.json               names by id, as training scripts for segmentation read them
    classes.json                the classes, with ids and colours, and the id of pixels that are ignored

Masks are PNGs of class ids, 8 bits or 16 above 254 classes. Without copies, the column ``image`` has
addresses, which ``datasets`` opens when it decodes. ``classes`` lists those in the mask; its feature has the
names of all.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import IO, Any, ClassVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import MaskMillError, WrongUse
from pipeline.files.documents import parsed_json, parsed_yaml, read_document, refuse_no_file
from pipeline.files.faults import says_damage
from pipeline.files.storage import Storage, is_remote, open_storage
from pipeline.formats.base import Entry, Imported, ReadSample, Sample, Written
from pipeline.formats.classes import (
    CLASSES_FILE,
    FoundClass,
    ontology_of,
    read_classes,
    write_classes,
)
from pipeline.formats.masks import decode_ids, identity_ids, relabel
from pipeline.formats.names import refuse_outside, suffix_of
from pipeline.ontology.ontology import MAX_CLASSES, Ontology
from pipeline.table.card import CARD_FILE, class_table, escaped, front_matter
from pipeline.table.labels import IMAGE_TYPE, encode_mask
from pipeline.table.statistics import Labels

NAMES_FILE = "id2label.json"
MASK_COLUMNS = ("mask", "label", "annotation", "labels", "segmentation_mask")
IMAGE_COLUMNS = ("image", "pixel_values")

_SCHEMA = pa.schema(
    [
        ("image", IMAGE_TYPE),
        ("mask", IMAGE_TYPE),
        ("classes", pa.list_(pa.int64())),
        ("name", pa.string()),
        ("uri", pa.string()),
        ("id", pa.int64()),
    ]
)
# A viewer decodes a whole group of rows to show one of them.
_GROUP_ROWS = 100
_GROUP_BYTES = 32 << 20
_BATCH = 16


@dataclass(frozen=True)
class HuggingFace:
    """Parquet and a dataset card."""

    name: ClassVar[str] = "hf"
    with_images: ClassVar[bool] = False
    with_confidence: ClassVar[bool] = False
    max_classes: ClassVar[int] = MAX_CLASSES

    def write_part(
        self, part: str, samples: Iterable[Sample], ontology: Ontology, output: Storage
    ) -> Iterator[Written]:
        """Write a file for each split; see ``Format``."""
        schema = _SCHEMA.with_metadata({"huggingface": json.dumps(_features(ontology), ensure_ascii=False)})
        files: dict[str, _Rows] = {}
        with ExitStack() as stack:
            for sample in samples:
                split = split_name(sample.split)
                if split not in files:
                    file = stack.enter_context(output.new_file(f"data/{split}-{part}.parquet"))
                    files[split] = stack.enter_context(_Rows(file, schema))
                files[split].add(_row(sample, ontology))
                yield Written({"split": split})

    def finish(self, entries: Iterable[Entry], ontology: Ontology, output: Storage) -> Sequence[str]:
        """Write the card and the names; see ``Format``."""
        counts: dict[str, int] = {}
        for entry in entries:
            counts[entry["split"]] = counts.get(entry["split"], 0) + 1
        output.write_json(NAMES_FILE, {str(number): name for number, name in enumerate(ontology.names)})
        write_classes(output, ontology)
        output.write_bytes(CARD_FILE, card(ontology, counts).encode())
        return [CARD_FILE]


def split_name(split: str) -> str:
    """A split as ``datasets`` allows it: letters, digits and underscores.

    >>> split_name("val 2017")
    'val_2017'
    """
    return re.sub(r"\W+", "_", split)


def card(ontology: Ontology, counts: dict[str, int]) -> str:
    """The dataset card.

    Args:
        ontology: the classes.
        counts: images by split.
    """
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in sorted(counts)]
    head = {
        "pretty_name": ontology.name,
        "task_categories": ["image-segmentation"],
        "tags": ["semantic-segmentation"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    lines = [
        *front_matter(head),
        "",
        f"# {escaped(ontology.name)}",
        "",
        "Images with a label map each. `mask` holds class ids, "
        f"{ontology.ignore_index} where nothing is labelled.",
        "",
        *(f"- {split}: {count:,} images" for split, count in sorted(counts.items())),
        "",
        *class_table(ontology),
    ]
    return "\n".join(lines) + "\n"


def _features(ontology: Ontology) -> dict[str, Any]:
    """What ``datasets`` reads from the schema of a file."""
    names = {"_type": "ClassLabel", "names": list(ontology.names)}
    text = {"_type": "Value", "dtype": "string"}
    return {
        "info": {
            "features": {
                "image": {"_type": "Image"},
                "mask": {"_type": "Image"},
                # Versions before 4 know no "List", and later ones read both.
                "classes": {"_type": "Sequence", "feature": names},
                "name": text,
                "uri": text,
                "id": {"_type": "Value", "dtype": "int64"},
            }
        }
    }


def _row(sample: Sample, ontology: Ontology) -> dict[str, Any]:
    present = np.flatnonzero(np.bincount(sample.labels.ravel())).tolist()
    file = f"{sample.name}{sample.suffix}"
    return {
        "image": {"bytes": sample.image, "path": sample.uri if sample.image is None else file},
        "mask": {"bytes": encode_mask(sample.labels), "path": f"{sample.name}.png"},
        "classes": [number for number in present if number != ontology.ignore_index],
        "name": sample.name,
        "uri": sample.uri,
        "id": sample.id,
    }


class _Rows:
    """Gathers rows into groups of bounded size, and writes them to a file."""

    def __init__(self, file: IO[bytes], schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(file, schema)
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *reason: Any) -> None:
        self._flush()
        self._writer.close()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self._rows.append(row)
        self._bytes += len(row["image"]["bytes"] or b"") + len(row["mask"]["bytes"])
        if len(self._rows) >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows, self._bytes = [], 0


# --- reading ---


def read_hf(place: str, *, images: str | None = None) -> Imported:
    """Read a folder of Parquet files with masks; samples hold their images if the files do.

    Files of others are read if their masks are in one of ``MASK_COLUMNS``, as PNGs, and ``id2label.json``
    names the classes.

    Args:
        place: path or URI of the dataset.
        images: folder of the images, NAME with its suffix, instead of their addresses.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``, ``ontology_invalid``; also while samples are
            read: ``dataset_invalid``, ``mask_invalid``.
    """
    storage = open_storage(place)
    names = storage.list("", recursive=True)
    files = [name for name in names if name.endswith(".parquet") and "/." not in f"/{name}"]
    if not files:
        raise WrongUse(
            "dataset_missing",
            f"There are no Parquet files in {storage.uri}.",
            "Give a folder that maskmill export --format hf wrote, or a data set as it was downloaded.",
        )
    ours = CLASSES_FILE in names
    ontology = read_classes(storage, HuggingFace.name) if ours else _named_classes(storage)
    return Imported(ontology, _Samples(storage, ontology, _splits(storage, files), images))


def _named_classes(place: Storage) -> Ontology:
    where = place.uri_of(NAMES_FILE)
    try:
        data = read_document(place, NAMES_FILE, code="dataset_invalid")
    except FileNotFoundError:
        raise WrongUse(
            "dataset_missing",
            f"There is no {NAMES_FILE} in {place.uri}, so what the ids in its masks mean is unknown.",
            f'Write one: {{"0": "cat", "1": "dog", …}}, or {CLASSES_FILE} as maskmill export does.',
        ) from None
    content = parsed_json(data, where, code="dataset_invalid")
    wanted = [str(number) for number in range(len(content))] if isinstance(content, dict) else []
    if not wanted or sorted(content) != sorted(wanted):
        raise _invalid(where, 'it is not of the form {"0": "cat", "1": "dog", …}, with all ids from 0')
    if not all(isinstance(name, str) for name in content.values()):
        raise _invalid(where, "a name is not a text")
    return ontology_of(HuggingFace.name, [FoundClass(content[number]) for number in wanted], where=where)


def _splits(place: Storage, files: Sequence[str]) -> list[tuple[str, str]]:
    """Split and name of each file: as the card says, else by the file's name."""
    by_card = {
        file: split
        for split, pattern in _patterns(place)
        for file in files
        if fnmatchcase(file, pattern.removeprefix("./"))
    }
    if by_card:
        return [(by_card[file], file) for file in files if file in by_card]
    return [(_split_of(file), file) for file in files]


def _split_of(file: str) -> str:
    for part in reversed(PurePosixPath(file).parts):
        found = re.match(r"(train|val|validation|dev|test)(?![a-z])", part)
        if found:
            return found[1]
    return "train"


def _patterns(place: Storage) -> Iterator[tuple[str, str]]:
    """Splits and patterns of files of the card's first configuration."""
    where = place.uri_of(CARD_FILE)
    try:
        text = read_document(place, CARD_FILE, code="dataset_invalid")
    except FileNotFoundError:
        return
    found = re.match(rb"\s*---\r?\n(.*?)\r?\n---\s", text, re.DOTALL)
    head = parsed_yaml(found[1], where, code="dataset_invalid") if found else None
    configs = head.get("configs") if isinstance(head, dict) else None
    if not configs:
        return
    first = configs[0] if isinstance(configs, list) else None
    given = first.get("data_files") if isinstance(first, dict) else None
    for entry in given if isinstance(given, list) else [given]:
        split, paths = (
            (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        )
        for path in paths if isinstance(paths, list) else [paths]:
            if not isinstance(split, str) or not isinstance(path, str):
                raise _invalid(where, f"its data_files are {given!r}, not splits and paths")
            yield split, path


@dataclass(frozen=True)
class _Samples:
    """The samples of all files; may be iterated again."""

    place: Storage
    ontology: Ontology
    files: list[tuple[str, str]]
    images: str | None
    _ids: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        ids = identity_ids(self.ontology.num_classes, ignore=self.ontology.ignore_index)
        object.__setattr__(self, "_ids", ids)

    def __iter__(self) -> Iterator[ReadSample]:
        number = 0
        for split, file in self.files:
            for row, values in enumerate(_rows(self.place, file)):
                yield self._sample(number, split, f"{self.place.uri_of(file)}: row {row}", values)
                number += 1

    def _sample(self, number: int, split: str, where: str, row: dict[str, Any]) -> ReadSample:
        image = row["image"] if isinstance(row["image"], dict) else {}
        path = str(image.get("path") or "")
        uri = row["uri"] or (path if is_remote(path) or path.startswith("/") else "")
        suffix = suffix_of(uri or path)
        name = row["name"] or f"{split}/{number:08d}"
        refuse_outside(name, where)
        if self.images is not None:
            uri = open_storage(self.images).uri_of(f"{name}{suffix}")
        return ReadSample(
            number=number,
            id=number,
            name=name,
            uri=uri or f"{where}{suffix}",
            suffix=suffix,
            split=split,
            read=functools.partial(self._labels, row["mask"], where),
            image=image.get("bytes"),
        )

    def _labels(self, cell: Any, where: str) -> Labels:
        mask = cell.get("bytes") if isinstance(cell, dict) else None
        if not isinstance(mask, bytes):
            raise _invalid(where, "it has no mask")
        return cast(Labels, relabel(decode_ids(mask, where), self._ids, classes=self.ontology, where=where))


def _rows(place: Storage, name: str) -> Iterator[dict[str, Any]]:
    """Rows with ``image``, ``mask``, ``name`` and ``uri``; those that are missing are None."""
    where = place.uri_of(name)
    refuse_no_file(place, name, code="dataset_invalid")
    try:
        with (
            place.arrow_filesystem().open_input_file(place.path(name)) as source,
            pq.ParquetFile(source) as file,
        ):
            columns = file.schema_arrow.names
            mask = next((column for column in MASK_COLUMNS if column in columns), None)
            image = next((column for column in IMAGE_COLUMNS if column in columns), None)
            if mask is None:
                raise _invalid(where, f"it has no column {' or '.join(MASK_COLUMNS)}")
            for column in ("name", "uri"):
                if column in columns and file.schema_arrow.field(column).type != pa.string():
                    raise _invalid(where, f"its column {column} is no text")
            wanted = {"mask": mask, "image": image, "name": "name", "uri": "uri"}
            present = {key: column for key, column in wanted.items() if column in columns}
            for batch in file.iter_batches(_BATCH, columns=[*present.values()], use_threads=False):
                for row in batch.to_pylist():
                    yield {key: row[present[key]] if key in present else None for key in wanted}
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last for names and texts
        if not isinstance(error, UnicodeDecodeError) and not says_damage(error):
            raise
        raise _invalid(where, f"it is no readable Parquet file ({' '.join(str(error).split())})") from error


def _invalid(where: str, why: str) -> MaskMillError:
    return WrongUse("dataset_invalid", f"{where}: {why}.", "Get the dataset again, or export it again.")
