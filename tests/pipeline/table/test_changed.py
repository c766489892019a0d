from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pytest

from pipeline.corpus.corpus import Corpus
from pipeline.corpus.manifest import build_manifest, stable_id
from pipeline.files.fetch import file_version
from pipeline.files.storage import Storage, open_storage
from pipeline.table.changed import Images, find_changed
from pipeline.table.committed import write_part
from pipeline.table.labels import LABEL_SCHEMA, failed_row


def _row(
    uri: str, data: bytes | None, *, version: str | None = "", row_id: int | None = None
) -> dict[str, Any]:
    """A row as labelling writes it; only what tells a change matters here."""
    return failed_row(
        id=stable_id(uri) if row_id is None else row_id, uri=uri, status="label_failed", error="",
        sha256=None if data is None else hashlib.sha256(data).digest(),
        version=file_version(uri) if version == "" else version,
    )  # fmt: skip


def _table(root: Path | str, rows: list[dict[str, Any]]) -> Storage:
    storage = open_storage(root)
    write_part(storage, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA))
    return storage


def _manifest(*uris: object) -> pa.Table:
    names = [str(uri) for uri in uris]
    return pa.table({"id": pa.array([stable_id(name) for name in names], pa.int64()), "uri": names})


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"first")
    os.utime(path, (1e9, 1e9))
    return path


def test_only_what_has_changed_is_found_and_the_rest_is_not_even_read(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [tmp_path / f"{name}.jpg" for name in ("edited", "touched", "gone", "same size", "elsewhere")]
    for path in others:
        path.write_bytes(path.name.encode())
    storage = _table(tmp_path / "table", [_row(str(path), path.read_bytes()) for path in [photo, *others]])
    edited, touched, gone, same_size, elsewhere = others
    edited.write_bytes(b"second")
    touched.touch()
    gone.unlink()
    same_size.write_bytes(b"another_x.jpg"[: len(same_size.name)])
    elsewhere.write_bytes(b"changed, but not in the manifest")
    read = []
    monkeypatch.setattr("builtins.open", lambda *a, _open=open, **k: read.append(str(a[0])) or _open(*a, **k))
    ids, states = find_changed(storage, Corpus.of(_manifest(photo, *others[:4])))
    monkeypatch.undo()
    assert sorted(ids.tolist()) == sorted(stable_id(str(path)) for path in (edited, same_size))
    assert states == {"same": 2, "changed": 2, "gone": 1}
    assert str(photo) not in read and str(touched) in read


def test_a_file_replaced_by_an_older_one_of_another_size_is_found(photo: Path, tmp_path: Path) -> None:
    """As rsync does, which keeps the time of the last change."""
    storage = _table(tmp_path / "table", [_row(str(photo), b"first")])
    older = tmp_path / "older"
    older.write_bytes(b"older, longer")
    os.utime(older, (9e8, 9e8))
    shutil.move(older, photo)
    assert find_changed(storage, Corpus.of(_manifest(photo)))[1] == {"changed": 1}


@pytest.mark.parametrize(("data", "state"), [(b"first", "same"), (b"other", "changed")])
def test_rows_of_older_versions_are_compared_by_their_hash(
    photo: Path, tmp_path: Path, data: bytes, state: str
) -> None:
    storage = _table(tmp_path / "table", [_row(str(photo), data, version=None)])
    assert find_changed(storage, Corpus.of(_manifest(photo)))[1] == {state: 1}


@pytest.mark.parametrize(
    ("version", "there", "state"), [(None, True, "changed"), ("", True, "same"), (None, False, "same")]
)
def test_an_image_that_could_not_be_read_is_new_when_its_file_is(
    photo: Path, tmp_path: Path, version: str | None, there: bool, state: str
) -> None:
    storage = _table(tmp_path / "table", [_row(str(photo), None, version=version)])
    if not there:
        photo.unlink()
    assert find_changed(storage, Corpus.of(_manifest(photo)))[1] == {state: 1}


def test_of_a_shard_only_the_image_s_bytes_count(photo: Path, tmp_path: Path) -> None:
    photo.write_bytes(b"AAAABBBB")
    listing = tmp_path / "list.csv"
    listing.write_text(f"uri,offset,length\n{photo},0,4\n{photo},4,4\n")
    manifest = build_manifest(listing)
    rows = [
        _row(str(photo), data, row_id=row_id)
        for data, row_id in zip((b"AAAA", b"BBBB"), manifest["id"].to_pylist(), strict=True)
    ]
    storage = _table(tmp_path / "table", rows)
    photo.write_bytes(b"AAAACCCC")
    ids, states = find_changed(storage, Corpus.of(manifest))
    assert ids.tolist() == [manifest["id"][1].as_py()] and states == {"same": 1, "changed": 1}


def test_objects_are_told_apart_by_their_etags(bucket: str) -> None:
    client = boto3.client("s3")
    name = bucket.split("/")[2]
    uris = [f"s3://{name}/{key}" for key in ("same.jpg", "edited.jpg", "gone.jpg")]
    for uri in uris:
        client.put_object(Bucket=name, Key=uri.rpartition("/")[2], Body=b"first")
    storage = _table(bucket, [_row(uri, b"first") for uri in uris])
    assert find_changed(storage, Corpus.of(_manifest(*uris)))[1] == {"same": 3}
    client.put_object(Bucket=name, Key="edited.jpg", Body=b"other")
    client.delete_object(Bucket=name, Key="gone.jpg")
    ids, states = find_changed(storage, Corpus.of(_manifest(*uris)))
    assert ids.tolist() == [stable_id(uris[1])]
    assert states == {"same": 1, "changed": 1, "gone": 1}


def test_where_an_image_is_follows_from_its_id_or_the_manifest() -> None:
    whole, part = {"id": stable_id("/a.png"), "uri": "/a.png"}, {"id": 5, "uri": "/shard.tar"}
    assert Images(None).located(whole) and not Images(None).located(part)
    manifest = pa.table({"id": pa.array([5], pa.int64())})
    assert Images(manifest).located(part) and Images(manifest).located(whole)
