"""``dataset.json``: written and read by one model, in the form of every version, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.labelling.recipes import RECIPES, table_recipe
from pipeline.ontology.reading import parse_classes
from pipeline.table.record import TableRecord, find_table_record, read_table_record, write_table_record

PETS = parse_classes("cat, dog", name="pets")
WEIGHTS = {"model": "toyclip", "pretrained": "bundled", "fingerprint": "0123"}
# What the first version wrote.
OLDEST = {
    "schema_version": 1,
    "created": "2025-01-31T10:00:00Z",
    "ontology": PETS.to_dict() | {"hash": PETS.hash, "names": ["background", "cat", "dog"]},
    "recipe": {
        "name": "toy",
        "model": "toyclip",
        "pretrained": "bundled",
        "head": "value",
        "precision": "fp32",
    },
    "weights": WEIGHTS,
    "versions": {"torch": "2.9"},
    "counts": {},
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    assert find_table_record(storage) is None
    recipe = RECIPES["toy"].replace(precision="bf16")
    made = TableRecord(
        created="c", ontology=PETS, recipe=recipe.to_dict(), weights=WEIGHTS, precision="bf16",
        counts={"images": 3},
    )  # fmt: skip
    write_table_record(storage, made)
    assert read_table_record(str(tmp_path)) == made and table_recipe(made) == recipe
    written = json.loads((tmp_path / "dataset.json").read_text())
    assert written["ontology"]["hash"] == PETS.hash and written["ontology"]["names"] == list(PETS.names)
    assert written["schema_version"] == 1 and written["quality"] == "classes"


def test_the_oldest_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps(OLDEST))
    record = read_table_record(str(tmp_path))
    assert record.ontology == PETS and record.ontology.hash == PETS.hash and record.source == "pseudo"
    assert record.quality == "softmin"
    assert table_recipe(record).precision == "fp32" and table_recipe(record).maskclip.head == "value"


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (None, "input_missing", "no dataset.json"),
        ("[1]", "table_damaged", "holds a list"),
        ("{", "table_damaged", "dataset.json"),
        ({"schema_version": 99}, "newer_version", "newer MaskMill"),
        ({"citation": "…", "splits": {}}, "table_damaged", "ontology: Field required"),
        (OLDEST | {"weights": {"model": "toyclip"}}, "table_damaged", "no pretrained and no fingerprint"),
        (OLDEST | {"recipe": "toy"}, "table_damaged", "recipe: Input should be a valid dictionary"),
        (OLDEST | {"ontology": {"name": "x", "classes": []}}, "table_damaged", "at least one class"),
        (OLDEST | {"ontology": "pets"}, "table_damaged", "ontology: "),
    ],
)
def test_what_is_no_table_is_told(tmp_path: Path, content: Any, code: str, says: str) -> None:
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(MaskMillError) as caught:
        read_table_record(str(tmp_path))
    assert caught.value.code == code and says in caught.value.message
