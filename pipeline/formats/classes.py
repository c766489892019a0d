"""The classes of an export: in a file of their own, or made from what a format says of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from models.errors import WrongUse
from pipeline.files.documents import parsed_json, read_document
from pipeline.files.storage import Storage
from pipeline.ontology.ontology import BACKGROUND, Ontology

CLASSES_FILE = "classes.json"


def write_classes(output: Storage, ontology: Ontology) -> None:
    """Write ``CLASSES_FILE``: ids, names and colours for others, the whole ontology for ``read_classes``."""
    output.write_json(
        CLASSES_FILE,
        {
            "classes": [
                {"id": number, "name": name, "color": hex_color(color)}
                for number, (name, color) in enumerate(
                    zip(ontology.names, ontology.palette().tolist(), strict=True)
                )
            ],
            "ignore_index": ontology.ignore_index,
            "ontology": ontology.to_record(),
        },
    )


def read_classes(place: Storage, format_name: str) -> Ontology:
    """Read ``CLASSES_FILE``.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``, ``ontology_invalid``.
    """
    where = place.uri_of(CLASSES_FILE)
    try:
        data = read_document(place, CLASSES_FILE, code="dataset_invalid")
    except FileNotFoundError:
        raise WrongUse(
            "dataset_missing",
            f"There is no {CLASSES_FILE} in {place.uri}.",
            f"Give the --output of maskmill export --format {format_name}. A folder of your own masks is "
            "read with --images and --truth.",
        ) from None
    content = parsed_json(data, where, code="dataset_invalid")
    recorded = content.get("ontology") if isinstance(content, dict) else None
    if not isinstance(recorded, dict):
        raise WrongUse("dataset_invalid", f"{where} has no classes.", "Export the dataset again.")
    return Ontology.from_record(recorded, origin=where)


@dataclass(frozen=True)
class FoundClass:
    """A class as a format describes it.

    Attributes:
        name: as in the file.
        color: RGB, 0 to 255 each.
        kind: None if the format does not tell.
    """

    name: str
    color: Sequence[int] | None = None
    kind: Literal["thing", "stuff"] | None = None


def ontology_of(name: str, classes: Iterable[FoundClass], *, where: str) -> Ontology:
    """The ontology of classes in the order of their ids; a first class "background" is the background.

    Args:
        name: of the ontology.
        classes: what a file says.
        where: the file, for errors.

    Raises:
        MaskMillError: ``ontology_invalid`` for no class, and for names that are empty or there twice.
    """
    entries: list[dict[str, Any]] = [
        {"name": one.name, "color": None if one.color is None else hex_color(one.color), "kind": one.kind}
        for one in classes
    ]
    background = len(entries) > 1 and entries[0]["name"].casefold() == BACKGROUND
    fields = {
        "name": name,
        "classes": entries[1:] if background else entries,
        "background": [BACKGROUND] if background else None,
    }
    return Ontology.from_dict(fields, origin=where)


def hex_color(color: Sequence[int]) -> str:
    """RGB as ``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*color)
