"""A grey PNG of class ids for each image, under the image's own name.

classes.json      the classes, with ids and colours, and the id of pixels that are ignored
masks/NAME.png    8 bits, 16 above 254 classes
images/NAME.jpg   if images are copied
images.csv        mask, image, split and address of each image
train.txt …       names by split, a line each
"""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, BinaryIO, ClassVar, cast

from models.errors import WrongUse
from pipeline.files.storage import Storage, open_storage
from pipeline.formats.base import Entry, Imported, ReadSample, Sample, Written
from pipeline.formats.classes import CLASSES_FILE, read_classes, write_classes
from pipeline.formats.masks import identity_ids, read_mask, relabel
from pipeline.formats.names import refuse_outside, suffix_of
from pipeline.ontology.ontology import Ontology
from pipeline.table.labels import encode_mask
from pipeline.table.statistics import Labels

IMAGES_FILE = "images.csv"
COLUMNS = ("name", "mask", "image", "split", "uri")
_AGAIN = "Export the dataset again."


@dataclass(frozen=True)
class Png:
    """See the module."""

    name: ClassVar[str] = "png"
    with_images: ClassVar[bool] = False
    with_confidence: ClassVar[bool] = False
    max_classes: ClassVar[int] = 65_534

    def write_part(
        self, part: str, samples: Iterable[Sample], ontology: Ontology, output: Storage
    ) -> Iterator[Written]:
        """See ``Format``."""
        for sample in samples:
            mask = f"masks/{sample.name}.png"
            output.write_bytes(mask, encode_mask(sample.labels))
            image = ""
            if sample.image is not None:
                image = f"images/{sample.name}{sample.suffix}"
                output.write_bytes(image, sample.image)
            yield Written(
                {
                    "name": sample.name,
                    "mask": mask,
                    "image": image,
                    "split": sample.split,
                    "uri": sample.uri,
                }
            )

    def finish(self, entries: Iterable[Entry], ontology: Ontology, output: Storage) -> Sequence[str]:
        """See ``Format``."""
        write_classes(output, ontology)
        lists: dict[str, IO[bytes]] = {}
        with ExitStack() as stack:
            table = stack.enter_context(output.new_file(IMAGES_FILE))
            table.write(_line(COLUMNS))
            for entry in entries:
                table.write(_line([entry[column] for column in COLUMNS]))
                split = entry["split"]
                if split not in lists:
                    lists[split] = stack.enter_context(output.new_file(f"{split}.txt"))
                lists[split].write(f"{entry['name']}\n".encode())
        return [IMAGES_FILE, CLASSES_FILE]


def _line(values: Iterable[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()


def read_png(place: str, *, images: str | None = None) -> Imported:
    """Read what ``Png`` wrote.

    Args:
        place: path or URI of the export.
        images: folder of the images, NAME with any suffix, instead of their addresses; not needed if they
            were copied.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``, ``ontology_invalid``; ``mask_invalid`` while
            the samples are read.
    """
    storage = open_storage(place)
    ontology = read_classes(storage, "png")
    return Imported(ontology, _Samples(storage, ontology, images))


@dataclass(frozen=True)
class _Samples:
    """The samples of a PNG export; may be iterated again."""

    storage: Storage
    ontology: Ontology
    images: str | None

    def __iter__(self) -> Iterator[ReadSample]:
        ids = identity_ids(self.ontology.num_classes, ignore=self.ontology.ignore_index)
        where = self.storage.uri_of(IMAGES_FILE)
        for number, row in enumerate(_rows(self.storage)):
            mask = self.storage.uri_of(refuse_outside(row["mask"], where))
            image = row["image"]
            if self.images is not None:
                uri = open_storage(self.images).uri_of(
                    refuse_outside(f"{row['name']}{suffix_of(row['uri'])}", where)
                )
            else:
                uri = self.storage.uri_of(refuse_outside(image, where)) if image else row["uri"]
            yield ReadSample(
                number=number,
                id=number,
                name=row["name"],
                uri=uri,
                suffix=suffix_of(uri),
                split=row["split"],
                read=functools.partial(self._labels, mask, ids),
            )

    def _labels(self, mask: str, ids: Mapping[int, int]) -> Labels:
        return cast(Labels, relabel(read_mask(mask), ids, classes=self.ontology, where=mask))


def _rows(storage: Storage) -> Iterator[dict[str, str]]:
    where = storage.uri_of(IMAGES_FILE)
    try:
        with storage.open_file(IMAGES_FILE) as file:
            reader = csv.DictReader(io.TextIOWrapper(cast(BinaryIO, file), "utf-8", newline=""), restval="")
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise WrongUse(
                    "dataset_invalid", f"{where} has not the columns {', '.join(COLUMNS)}.", _AGAIN
                )
            for row in reader:
                yield {column: row[column] for column in COLUMNS}
    except FileNotFoundError:
        raise WrongUse("dataset_missing", f"There is no {where}.", _AGAIN) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise WrongUse("dataset_invalid", f"{where} is damaged: {error}.", _AGAIN) from None
