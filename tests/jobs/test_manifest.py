from __future__ import annotations

import csv
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.manifest import read_manifest

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
def test_equal_images_get_equal_masks_from_every_source(
    maskmill_joined: Run, toy_images: Path, tmp_path: Path
) -> None:
    chosen = sorted(toy_images.iterdir())[:3]
    content = {path.name: path.read_bytes() for path in chosen}
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in chosen:
        shutil.copy(path, folder)
    with tarfile.open(tmp_path / "000.tar", "w") as shard:
        for path in chosen:
            shard.add(path, path.name)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": data, "path": name} for name, data in content.items()]
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "cells.parquet")
    coco = {"images": [{"id": n, "file_name": name} for n, name in enumerate(content)]}
    (folder / "coco.json").write_text(json.dumps(coco))
    (folder / "list.jsonl").write_text("\n".join(json.dumps({"file_name": name}) for name in content))
    seen = []
    for source in (
        folder,
        tmp_path / "000.tar",
        tmp_path / "cells.parquet",
        folder / "coco.json",
        folder / "list.jsonl",
    ):
        output = tmp_path / f"table-{len(seen)}"
        done = maskmill_joined(
            "label", "--images", str(source), "--ontology", "toyworld", "--recipe", "toy",
            "--output", str(output), "--tracking", "off",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows = pq.read_table(output / "labels").to_pylist()
        assert [row["status"] for row in rows] == ["ok"] * 3
        seen.append({row["sha256"]: (row["mask"]["bytes"], row["confidence"]["bytes"]) for row in rows})
    assert len(seen[0]) == 3 and all(masks == seen[0] for masks in seen)


@pytest.mark.slow
def test_a_try_is_part_of_the_whole(maskmill_joined: Run, toy_images: Path, tmp_path: Path) -> None:
    label = (
        "label", "--images", str(toy_images), "--ontology", "toyworld", "--recipe", "toy",
        "--tracking", "off", "--output", str(tmp_path / "table"),
    )  # fmt: skip
    for more, count in (
        (("--sample", "3"), 3),
        (("--sample", "3"), 3),
        (("--sample", "5"), 5),
        (("--limit", "0"), 5),
    ):
        done = maskmill_joined(*label, *more)
        assert done.returncode == (2 if "0" in more else 0), done.stderr
        assert pq.read_table(tmp_path / "table/labels").num_rows == count
