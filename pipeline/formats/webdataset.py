"""WebDataset: tar shards, each with the images of one part and split.

    SPLIT-PART.tar   KEY.jpg (with the image's suffix), KEY.mask.png and KEY.json for each image
    shards.json      by split, the shards with their numbers of images
    classes.json     the classes, with ids and colours, and the id of pixels that are ignored

Masks hold class ids in 8 bits, 16 above 254 classes. A key is the name of the image, in which the dots of its
last component are written as %2E: the format ends keys at the first dot. The JSON has the name itself.
"""

from __future__ import annotations

import functools
import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar, cast
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from models.errors import MaskMillError, WrongUse
from pipeline.corpus.sources.found import IMAGE_EXTENSIONS
from pipeline.files.documents import first_problem, parsed_json, read_document, refuse_no_file
from pipeline.files.fetch import max_bytes
from pipeline.files.images import MAX_PIXELS
from pipeline.files.storage import Storage, open_storage
from pipeline.formats.base import Entry, Imported, ReadSample, Sample, Written
from pipeline.formats.classes import read_classes, write_classes
from pipeline.formats.jsonfile import encode
from pipeline.formats.masks import decode_ids, identity_ids, relabel
from pipeline.formats.names import refuse_outside, suffix_of
from pipeline.ontology.ontology import MAX_CLASSES, Ontology
from pipeline.table.labels import encode_mask
from pipeline.table.statistics import Labels

SHARDS_FILE = "shards.json"
MASK = "mask.png"
INFO = "json"

_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_LARGEST_INFO = 1 << 20
_LARGEST = max_bytes(MAX_PIXELS)


@dataclass(frozen=True)
class WebDataset:
    """Tar shards, to be read from end to end."""

    name: ClassVar[str] = "webdataset"
    with_images: ClassVar[bool] = True
    with_confidence: ClassVar[bool] = False
    max_classes: ClassVar[int] = MAX_CLASSES

    def write_part(
        self, part: str, samples: Iterable[Sample], ontology: Ontology, output: Storage
    ) -> Iterator[Written]:
        """Write a shard for each split; see ``Format``."""
        shards: dict[str, tarfile.TarFile] = {}
        with ExitStack() as stack:
            for sample in samples:
                shard = f"{sample.split}-{part}.tar"
                if shard not in shards:
                    file = stack.enter_context(output.new_file(shard))
                    shards[shard] = stack.enter_context(tarfile.open(fileobj=file, mode="w"))
                _add(shards[shard], sample)
                yield Written({"split": sample.split, "shard": shard})

    def finish(self, entries: Iterable[Entry], ontology: Ontology, output: Storage) -> Sequence[str]:
        """Count the images of the shards; see ``Format``."""
        counts: dict[str, dict[str, int]] = {}
        for entry in entries:
            of_split = counts.setdefault(entry["split"], {})
            of_split[entry["shard"]] = of_split.get(entry["shard"], 0) + 1
        output.write_json(
            SHARDS_FILE,
            {
                split: [{"url": url, "nsamples": count} for url, count in sorted(shards.items())]
                for split, shards in sorted(counts.items())
            },
        )
        write_classes(output, ontology)
        return [SHARDS_FILE]


def key_of(name: str) -> str:
    """The key of an image: its name, in a spelling that the format does not cut.

    >>> key_of("a.b/cat.1")
    'a.b/cat%2E1'
    """
    folder, slash, file = name.replace("%", "%25").rpartition("/")
    key = f"{folder}{slash}{file.replace('.', '%2E')}"
    # The library takes folders like __name__ for its own.
    return f"%5F{key[1:]}" if key.startswith("__") else key


def _add(shard: tarfile.TarFile, sample: Sample) -> None:
    key = key_of(sample.name)
    height, width = sample.labels.shape
    info = {
        "name": sample.name,
        "id": sample.id,
        "uri": sample.uri,
        "split": sample.split,
        "height": height,
        "width": width,
    }
    members = [(MASK, encode_mask(sample.labels)), (INFO, encode(info))]
    if sample.image is not None:
        members.insert(0, (sample.suffix.removeprefix("."), sample.image))
    for field, data in members:
        # Its time and its owner are those of nobody, so that the same export has the same bytes.
        member = tarfile.TarInfo(f"{key}.{field}")
        member.size = len(data)
        shard.addfile(member, io.BytesIO(data))


# --- reading ---


class _Info(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str | None = None
    uri: str | None = None
    split: str | None = None
    height: int | None = None
    width: int | None = None


class _Shard(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    url: str
    nsamples: int = Field(ge=0)


_SHARDS: TypeAdapter[dict[str, list[_Shard]]] = TypeAdapter(dict[str, list[_Shard]])


def read_webdataset(place: str, *, images: str | None = None) -> Imported:
    """Read what ``WebDataset`` wrote; samples hold their images.

    Args:
        place: path or URI of the export.
        images: folder of the images, NAME with the suffix of the shard, instead of their addresses.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``, ``ontology_invalid``; also while samples are
            read: ``dataset_invalid``, ``mask_invalid``.
    """
    storage = open_storage(place)
    ontology = read_classes(storage, WebDataset.name)
    where = storage.uri_of(SHARDS_FILE)
    try:
        content = parsed_json(
            read_document(storage, SHARDS_FILE, code="dataset_invalid"), where, code="dataset_invalid"
        )
        shards = _SHARDS.validate_python(content)
    except FileNotFoundError:
        raise WrongUse(
            "dataset_missing", f"There is no {where}.", "Export the dataset again, or get it whole."
        ) from None
    except ValidationError as error:
        raise _invalid(where, first_problem(error)) from None
    for listed in shards.values():
        for shard in listed:
            refuse_outside(shard.url, where)
    count = sum(shard.nsamples for listed in shards.values() for shard in listed)
    return Imported(ontology, _Samples(storage, ontology, shards, images), count)


@dataclass(frozen=True)
class _Samples:
    """The samples of all shards; may be iterated again."""

    place: Storage
    ontology: Ontology
    shards: dict[str, list[_Shard]]
    images: str | None

    def __iter__(self) -> Iterator[ReadSample]:
        number = 0
        for split, shards in self.shards.items():
            for shard in shards:
                first = number
                for key, fields in _groups(self.place, shard.url):
                    yield self._sample(number, split, f"{self.place.uri_of(shard.url)}: {key}", key, fields)
                    number += 1
                if number - first != shard.nsamples:
                    # A damaged header ends the archive for tarfile.
                    raise _invalid(
                        self.place.uri_of(shard.url),
                        f"it holds {number - first:,} images, and {SHARDS_FILE} says {shard.nsamples:,}",
                    )

    def _sample(self, number: int, split: str, where: str, key: str, fields: dict[str, bytes]) -> ReadSample:
        if INFO not in fields:
            raise _invalid(where, f"there is no {INFO}")
        raw = parsed_json(fields[INFO], f"{where}.{INFO}", code="dataset_invalid")
        try:
            info = _Info.model_validate(raw)
        except ValidationError as error:
            raise _invalid(f"{where}.{INFO}", first_problem(error)) from None
        size = None if info.height is None or info.width is None else (info.height, info.width)
        other = next((field for field in fields if f".{field}" in IMAGE_EXTENSIONS), None)
        name = refuse_outside(info.name or unquote(key), where)
        suffix = suffix_of(info.uri or "") if other is None else f".{other}"
        if self.images is not None:
            uri = open_storage(self.images).uri_of(f"{name}{suffix}")
        else:
            uri = info.uri or f"{where}{suffix}"
        return ReadSample(
            number=number,
            id=number,
            name=name,
            uri=uri,
            suffix=suffix,
            split=info.split or split,
            read=functools.partial(self._labels, fields.get(MASK), where, size),
            image=None if other is None else fields[other],
        )

    def _labels(self, mask: bytes | None, where: str, size: tuple[int, int] | None) -> Labels:
        if mask is None:
            raise _invalid(where, f"there is no {MASK}")
        file = f"{where}.{MASK}"
        ids = identity_ids(self.ontology.num_classes, ignore=self.ontology.ignore_index)
        found = relabel(decode_ids(mask, file, size=size), ids, classes=self.ontology, where=file)
        return cast(Labels, found)


def _groups(place: Storage, name: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Keys of a shard with the content of their files, by what follows the key's dot."""
    where = place.uri_of(name)
    key, fields = "", dict[str, bytes]()
    refuse_no_file(place, name, code="dataset_invalid")
    try:
        # Only plain archives: a compressed one may hold more than any disk.
        with place.open_file(name) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                refuse_outside(member.name, where)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise _invalid(where, f"{member.name} is a link or a device, not a file")
                matched = _KEY.fullmatch(member.name)
                if matched is None:
                    raise _invalid(where, f"{member.name} has no key")
                found, field = matched[1], matched[2].lower()
                if found != key and fields:
                    yield key, fields
                    fields = {}
                key = found
                if field in fields:
                    raise _invalid(where, f"{member.name} is there twice")
                if member.size > (_LARGEST_INFO if field == INFO else _LARGEST):
                    raise _invalid(where, f"{member.name} has {member.size:,} bytes, which is too large")
                content = archive.extractfile(member)
                assert content is not None, "it is a file"
                fields[field] = content.read()
    except FileNotFoundError:
        raise WrongUse(
            "dataset_missing", f"There is no {where}.", "Export the dataset again, or get it whole."
        ) from None
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise _invalid(where, f"it is no whole tar archive ({error})") from error
    except OSError as error:  # a name that is too long, a disk that fails
        raise _invalid(where, f"it cannot be read ({error.strerror})") from error
    if fields:
        yield key, fields


def _invalid(where: str, why: str) -> MaskMillError:
    return WrongUse("dataset_invalid", f"{where}: {why}.", "Get the dataset again, or export it again.")
