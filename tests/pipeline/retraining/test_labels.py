from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.ontology.ontology import Ontology
from pipeline.retraining.labels import (
    LABELS_FILE,
    LabelSummary,
    read_labels,
    summarise_labels,
    write_labels,
)
from pipeline.table.drift import compare_labels
from pipeline.table.labels import LABEL_SCHEMA, failed_row, ok_row
from pipeline.table.record import TableRecord, write_table_record

NAMES = ("sky", "grass", "cat")
WEIGHTS = {"model": "toyclip", "pretrained": "toy", "fingerprint": "f"}


def maps(count: int = 9) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.choice([0, 1, 2, 255], (5, 6), p=[0.5, 0.3, 0.1, 0.1]).astype(np.uint8) for _ in range(count)]


def table(
    root: Path,
    labels: list[np.ndarray],
    *,
    parts: int = 3,
    names: tuple[str, ...] = NAMES,
    backwards: bool = False,
    failed: int = 1,
) -> str:
    """A label table; images are known by their place in the list."""
    sure = np.full((5, 6), 200, np.uint8)
    rows = [
        ok_row(
            id=hash((str(root), at)) % 2**60, uri=f"{root}/{at}.png", sha256=bytes([at]) * 32, height=5,
            width=6, labels=one, confidence=sure, ignore_index=255,
        )
        for at, one in enumerate(labels)
    ]  # fmt: skip
    rows += [failed_row(id=at, uri=f"{root}/x{at}", status="not_found", error="x") for at in range(failed)]
    rows = rows[::-1] if backwards else rows
    (root / "labels").mkdir(parents=True)
    for part in range(parts):
        pq.write_table(
            pa.Table.from_pylist(rows[part::parts], schema=LABEL_SCHEMA), root / f"labels/{part}.parquet"
        )
    ontology = Ontology.from_dict({"name": "three", "classes": list(names)})
    write_table_record(open_storage(root), TableRecord(ontology=ontology, recipe={}, weights=WEIGHTS))
    return str(root)


def test_a_summary_counts_what_is_in_the_table(tmp_path: Path) -> None:
    labels = maps()
    found = summarise_labels(table(tmp_path / "a", labels, failed=3))
    pixels = np.stack(labels)
    assert found.classes == NAMES
    assert found.class_pixels == tuple(int((pixels == at).sum()) for at in range(3))
    assert found.class_images == tuple(int((pixels == at).any((1, 2)).sum()) for at in range(3))
    assert found.pixels == pixels.size and found.images == 12 and found.labelled == 9
    assert found.failed_share == 0.25 and found.status == {"ok": 9, "not_found": 3}
    assert found.ignored_share == pytest.approx((pixels == 255).mean())
    assert found.shares["grass"] == pytest.approx((pixels == 1).sum() / (pixels != 255).sum())
    assert found.mean_quality == pytest.approx(200 / 255)


def test_the_digest_is_that_of_the_labels(tmp_path: Path) -> None:
    labels = maps()
    known = summarise_labels(table(tmp_path / "a", labels)).digest
    same = table(tmp_path / "b", labels, parts=2, backwards=True, failed=5)
    assert summarise_labels(same).digest == known
    changed = [one.copy() for one in labels]
    changed[4][0, 0] = (changed[4][0, 0] + 1) % 3
    swapped = [labels[1], labels[0], *labels[2:]]
    others = [
        table(tmp_path / "c", changed),
        table(tmp_path / "d", swapped),
        table(tmp_path / "e", labels[:-1]),
        table(tmp_path / "f", labels, names=("sky", "cat", "grass")),
    ]
    digests = {known, *(summarise_labels(other).digest for other in others)}
    assert len(digests) == 1 + len(others)


def test_a_summary_comes_back_from_its_file_and_is_checked(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    assert read_labels(storage) is None
    summary = summarise_labels(table(tmp_path / "a", maps()))
    write_labels(storage, summary)
    assert read_labels(storage) == summary
    record = summary.model_dump(mode="json")
    for wrong in ({"digest": "x"}, {"class_pixels": [1]}, {"images": 3}, {"class_pixels": [10**9, 0, 0]}):
        storage.write_json(LABELS_FILE, record | wrong)
        with pytest.raises(MaskMillError) as caught:
            read_labels(storage)
        assert caught.value.code == "file_damaged"


def test_what_has_drifted_is_said(tmp_path: Path) -> None:
    labels = maps()
    before = summarise_labels(table(tmp_path / "a", labels))
    assert compare_labels(before, before).divergence == 0 and compare_labels(before, before).moved == ()
    after = summarise_labels(table(tmp_path / "b", [np.full_like(one, 2) for one in labels], failed=9))
    drift = compare_labels(before, after)
    assert drift.divergence is not None and drift.divergence > 0.3
    assert drift.moved[0][0] == "cat" and drift.moved[0][2] == 1.0
    assert drift.failed == pytest.approx((0.1, 0.5))
    assert any("cat from" in line for line in drift.sentences())
    older = before.model_copy(update={"score": "softmin"})
    assert compare_labels(older, after).quality == (None, None), "two scores are not compared"
    assert not any("quality" in line for line in compare_labels(older, after).sentences())
    empty = summarise_labels(table(tmp_path / "c", []))
    assert isinstance(empty, LabelSummary) and empty.mean_quality is None and empty.shares == {}
    assert compare_labels(before, empty).divergence is None and compare_labels(before, empty).moved == ()
