from __future__ import annotations

import csv
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.manifest import build_manifest, read_manifest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, data in {"a": b"x", "b": b"y", "c": b"x"}.items():
        (folder / f"{name}.jpg").write_bytes(data)
    return folder


def names(manifest: Path) -> list[str]:
    return [uri.rpartition("/")[2] for uri in read_manifest(manifest)["uri"].to_pylist()]


def test_a_manifest_grows_and_keeps_what_it_has(maskmill_here: Run, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "m.parquet"
    done = maskmill_here("manifest", str(photos), "--output", str(output), "--limit", "2")
    assert done.returncode == 0 and "2 images in" in done.stderr
    before = read_manifest(output)
    (photos / "a.jpg").unlink()
    done = maskmill_here("manifest", str(photos), "--output", str(output))
    assert done.returncode == 0 and "3 images in" in done.stderr and "1 more than before" in done.stderr
    assert names(output) == ["a.jpg", "b.jpg", "c.jpg"] and read_manifest(output).slice(0, 2).equals(before)


def test_equal_images_are_listed_once(maskmill_here: Run, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.parquet"
    done = maskmill_here("manifest", str(photos), "--output", str(output), "--dedupe")
    assert done.returncode == 0 and "1 equal to others" in done.stderr and names(output) == ["a.jpg", "b.jpg"]
    with Path(f"{output}.duplicates.csv").open(newline="") as file:
        assert [*csv.reader(file)] == [["uri", "equal_to"], [f"{photos}/c.jpg", f"{photos}/a.jpg"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("photos", "--output", "m.csv"), "no Parquet file"),
        (("photos", "--output", "m.parquet", "--limit", "0"), "--limit 0 is less than 1"),
        (("nowhere", "--output", "m.parquet"), "there is no"),
        (("photos", "--output", "old.parquet"), "no column 'id'"),
    ],
)
def test_wrong_uses_write_nothing(
    maskmill_here: Run, photos: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(photos.parent)
    pq.write_table(pa.table({"uri": ["a.jpg"]}), "old.parquet")
    old = Path("old.parquet").read_bytes()
    done = maskmill_here("manifest", *arguments)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["old.parquet", "photos"]
    assert Path("old.parquet").read_bytes() == old


@pytest.mark.slow
def test_equal_images_get_equal_masks_from_every_source_and_a_try_is_part_of_the_whole(
    maskmill_joined: Run, toy_images: Path, tmp_path: Path
) -> None:
    chosen = sorted(toy_images.iterdir())[:3]
    with tarfile.open(tmp_path / "000.tar", "w") as shard:
        for path in chosen:
            shard.add(path, path.name)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in chosen]
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "cells.parquet")
    images = [{"id": number, "file_name": str(path)} for number, path in enumerate(chosen)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images}))
    everything = [
        uri
        for source in ("000.tar", "cells.parquet", "coco.json")
        for uri in build_manifest(tmp_path / source)["uri"].to_pylist()
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"uri": uri}) for uri in everything))
    label = ("--ontology", "toyworld", "--recipe", "toy", "--tracking", "off")
    masks: dict[bytes, list[tuple[bytes, bytes]]] = {}

    def labelled(source: str, *more: str) -> list[dict[str, Any]]:
        output = tmp_path / f"table-{source}"
        done = maskmill_joined(
            "label", "--images", str(tmp_path / source), "--output", str(output), *label, *more
        )
        assert done.returncode == 0, done.stderr
        rows = pq.read_table(output / "labels").to_pylist()
        assert {row["status"] for row in rows} == {"ok"}
        return rows

    source = ("label", "--images", str(tmp_path / "list.jsonl"), "--output", str(tmp_path / "table"), *label)
    assert maskmill_joined(*source, "--limit", "0").returncode == 2
    assert len(labelled("list.jsonl", "--sample", "5")) == 5
    # As byte ranges, and by name or as files.
    for source, count in (("000.tar", 3), ("list.jsonl", 9)):
        rows = labelled(source)
        assert len(rows) == count
        for row in rows:
            masks.setdefault(row["sha256"], []).append((row["mask"]["bytes"], row["confidence"]["bytes"]))
    assert len(masks) == 3 and all(len(found) == 4 and len(set(found)) == 1 for found in masks.values())
