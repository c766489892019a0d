"""The images of a table are compared with those of a corpus, partition by partition."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from jobs.verify import check_table
from pipeline.corpus.manifest import build_corpus
from pipeline.files.storage import open_storage
from pipeline.ontology.reading import parse_classes
from pipeline.table import hashes
from pipeline.table.committed import part_files, write_part
from pipeline.table.labels import LABEL_SCHEMA, failed_row
from pipeline.table.record import TableRecord

COUNT = 40


def _archive(path: Path, contents: list[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, content in enumerate(contents):
            entry = tarfile.TarInfo(f"{number:02d}.jpg")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_members_of_archives_in_several_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "PIECE", 4)
    contents = [bytes([number]) * 20 for number in range(COUNT)]
    (tmp_path / "shards").mkdir()
    _archive(tmp_path / "shards/0.tar", contents)
    corpus = build_corpus(tmp_path / "shards", most=8)
    assert len(corpus.partitions) > 4
    # Rows that failed after they were read are compared as well, and need no maps.
    rows = [
        failed_row(
            id=row["id"], uri=row["uri"], status="label_failed", error="cut",
            sha256=hashlib.sha256(contents[int(row["uri"][-6:-4])]).digest(),
        )
        for row in sorted(corpus.table().to_pylist(), key=lambda row: str(row["uri"]))
    ]  # fmt: skip
    table = open_storage(tmp_path / "table")
    for start in range(0, COUNT, 7):
        write_part(table, pa.Table.from_pylist(rows[start : start + 7], schema=LABEL_SCHEMA))
    found = list(hashes.pieces(table, part_files(table), corpus))
    assert sum(piece.rows.num_rows for piece in found) == COUNT
    assert max(len(pickle.dumps(piece)) for piece in found) < 10_000
    assert all(piece.manifest["id"].to_pylist() == piece.rows["id"].to_pylist() for piece in found)

    weights = {"model": "m", "pretrained": "p", "fingerprint": "f"}
    record = TableRecord(ontology=parse_classes("cat"), recipe={}, weights=weights)

    def problems() -> dict[str, int]:
        return check_table(table, record, corpus, Console(quiet=True), hashes=True, workers=0).counts

    assert problems() == {}
    _archive(tmp_path / "shards/0.tar", [*contents[:5], *(bytes(20) for _ in range(3)), *contents[8:]])
    assert problems() == {"image_changed": 3}
