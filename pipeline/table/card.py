"""``README.md`` beside a label table: the dataset card by which ``datasets.load_dataset(TABLE)`` opens it.

Without a card, ``datasets`` takes every Parquet file in the folder, such as a manifest or what was set aside,
and masks are bytes. A card that somebody else wrote or changed is left alone: ours ends with a digest of what
stands above it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import yaml

from pipeline.files.storage import Storage
from pipeline.ontology.ontology import Ontology
from pipeline.table.labels import IMAGE_TYPE, LABEL_SCHEMA

CARD_FILE = "README.md"

# What datasets calls types that Arrow calls otherwise.
_DTYPES = {"float": "float32", "double": "float64"}
_SIGNED = re.compile(rb"(.*)<!-- maskmill ([0-9a-f]{64}) -->\n", re.DOTALL)


def write_card(table: Storage, ontology: Ontology) -> None:
    """Write the card of a label table, unless there is one that is not ours."""
    names = {str(number): name for number, name in enumerate(ontology.names)}
    features = [{"name": field.name, **_feature(field.type)} for field in LABEL_SCHEMA]
    for feature in features:
        if feature["name"] == "segments":
            feature["list"][0] = {"name": "class_id", "dtype": {"class_label": {"names": names}}}
    head = {
        "pretty_name": ontology.name,
        "task_categories": ["image-segmentation"],
        "configs": [{"config_name": "default", "data_files": "labels/*.parquet"}],
        "dataset_info": {"features": features},
    }
    lines = [
        *front_matter(head),
        "",
        f"# {escaped(ontology.name)}",
        "",
        "A label table of MaskMill: a row an image, also for those that failed (`status` is not `ok`). "
        f"`mask` holds class ids, {ontology.ignore_index} where nothing is labelled; `confidence` is 255 "
        "times the probability of the class. `uri` is the address of the image. How it was made: "
        "`dataset.json`.",
        "",
        *class_table(ontology),
        "",
    ]
    text = "\n".join(lines).encode() + b"\n"
    card = text + b"<!-- maskmill %s -->\n" % hashlib.sha256(text).hexdigest().encode()
    try:
        there = table.read_bytes(CARD_FILE)
    except FileNotFoundError:
        table.create_bytes(CARD_FILE, card)
        return
    if there != card and _is_ours(there):
        table.write_bytes(CARD_FILE, card)


def _is_ours(card: bytes) -> bool:
    signed = _SIGNED.fullmatch(card)
    return signed is not None and hashlib.sha256(signed[1]).hexdigest().encode() == signed[2]


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """A column as ``dataset_info`` describes it."""
    if kind == IMAGE_TYPE:
        return {"dtype": "image"}
    if pa.types.is_fixed_size_list(kind):
        return {"list": _feature(kind.value_type)["dtype"], "length": kind.list_size}
    if pa.types.is_list(kind) and not pa.types.is_struct(kind.value_type):
        return {"list": _feature(kind.value_type)["dtype"]}
    if pa.types.is_list(kind):
        return {"list": [{"name": field.name, **_feature(field.type)} for field in kind.value_type]}
    return {"dtype": _DTYPES.get(str(kind), str(kind))}


def front_matter(head: Mapping[str, Any]) -> list[str]:
    """The YAML in front of a card, as lines."""
    return ["---", yaml.safe_dump(dict(head), allow_unicode=True, sort_keys=False).rstrip(), "---"]


def class_table(ontology: Ontology) -> list[str]:
    """A table of the classes in Markdown, as lines."""
    rows = enumerate(zip(ontology.names, ontology.palette().tolist(), strict=True))
    return [
        "| id | class | colour |",
        "|---|---|---|",
        *(f"| {number} | {escaped(name)} | `#{bytes(color).hex()}` |" for number, (name, color) in rows),
    ]


def escaped(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([|\\`*_<>\[\]])", r"\\\1", text)
