"""Thresholds and classes after labelling, in each command that reads a table: nothing is labelled again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.corpus.manifest import stable_id
from pipeline.files.storage import canonical_uri
from pipeline.labelling.recipes import RECIPES
from pipeline.ontology.ontology import Ontology
from pipeline.table.labels import LABEL_SCHEMA, ok_row

CLASSES = Ontology.from_dict({"name": "three", "classes": ["sky", "grass", "cat", "dog"]})
H, W = 24, 32


class Made:
    """A table of four images whose labels are the truth; the right half of each is labelled with doubt."""

    def __init__(self, root: Path) -> None:
        self.root, self.table = root, root / "table"
        for folder in ("images", "masks", "table/labels"):
            (root / folder).mkdir(parents=True)
        rng = np.random.default_rng(0)
        rows = []
        self.labels: dict[str, np.ndarray] = {}
        self.confidence = np.where(np.arange(W) < W // 2, 230, 60).astype(np.uint8)[None].repeat(H, 0)
        for name in "abcd":
            labels = np.repeat(np.repeat(rng.integers(0, 4, (H // 4, W // 4)), 4, 0), 4, 1).astype(np.uint8)
            labels[0, 0] = (labels[0, 1] + 1) % 4  # a piece of one pixel
            path = root / "images" / f"{name}.png"
            Image.fromarray(rng.integers(0, 255, (H, W, 3)).astype(np.uint8)).save(path)
            Image.fromarray(labels).save(root / "masks" / f"{name}.png")
            uri = canonical_uri(path)
            rows.append(
                ok_row(
                    id=stable_id(uri), uri=uri, sha256=None, height=H, width=W, labels=labels,
                    confidence=self.confidence, ignore_index=255,
                )
            )  # fmt: skip
            self.labels[name] = labels
        pq.write_table(pa.Table.from_pylist(rows, schema=LABEL_SCHEMA), self.table / "labels/part-0.parquet")
        record = {
            "ontology": CLASSES.to_record(),
            "recipe": RECIPES["toy"].to_dict(),
            "weights": {"model": "toyclip", "pretrained": "bundled", "fingerprint": "0" * 64},
        }
        (self.table / "dataset.json").write_text(json.dumps(record))

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.table.rglob("*") if path.is_file()}


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_the_gallery_shows_a_view_and_keeps_it(made: Made, maskmill_here: Callable[..., Any]) -> None:
    before = made.files()
    page = made.root / "page.html"
    show = ("show", made.table, "--output", page)
    done = maskmill_here(*show, "--threshold", "0.5", "--merge", "cat,dog=pet", "--save-view", "sure")
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "confidence from 0.5; cat and dog are pet" in text
    assert ">pet<" in text and ">dog<" not in text
    # Half of the table, and half of each of its four images.
    assert re.findall(r'">unsure.*?class="num">([^<]*)<', text) == ["50 %"] * 5
    kept = made.table / "views" / "sure.json"
    assert json.loads(kept.read_text()) == {
        "schema_version": 1, "threshold": 0.5, "merge": {"pet": ["cat", "dog"]},
    }  # fmt: skip
    again = maskmill_here(*show, "--view", "sure")
    assert again.returncode == 0 and page.read_text() == text
    other = maskmill_here(*show, "--view", "sure", "--drop", "sky", "--save-view", "sure")
    assert other.returncode == 2 and "is another view" in other.stderr and page.read_text() == text
    assert {name: data for name, data in made.files().items() if "/views/" not in name} == before
