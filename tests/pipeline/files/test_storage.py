"""Storage on a local folder, in memory, and on a real S3 server on the loopback."""

from __future__ import annotations

import os
import pickle
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import MaskMillError
from pipeline.corpus.manifest import build_manifest, read_manifest, write_manifest
from pipeline.files.faults import explain
from pipeline.files.storage import Storage, canonical_uri, is_remote, open_storage
from pipeline.table.labels import LABEL_SCHEMA, ok_row, read_ids, summarise


@pytest.fixture(scope="module")
def s3_server(s3_server: None) -> None:
    fsspec.filesystem("s3", use_listings_cache=False).mkdir("bucket")


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request, tmp_path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path / "out dir")
    name = request.node.name.replace("[", "-").replace("]", "")
    if request.param == "memory":
        return open_storage(f"memory://{name}/out")
    request.getfixturevalue("s3_server")
    return open_storage(f"s3://bucket/{name}/out")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/a/b", "/a/b"),
        ("/a//b/./c/../d/", "/a/b/d"),
        ("//a/b", "/a/b"),
        ("file:///a/b%20c", "/a/b c"),
        ("file:/a/b", "/a/b"),
        ("FILE://localhost/a", "/a"),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("S3A://bucket/a//B.JPG", "s3://bucket/a//B.JPG"),
        ("gcs://bucket/x", "gs://bucket/x"),
        ("HTTPS://Example.org/A%20b?q=1#f", "https://example.org/A%20b?q=1#f"),
        ("memory:///a/b", "memory://a/b"),
        ("/a/what?://b", "/a/what?:/b"),  # a path that only looks like a URI
        ("/a/caf\u00e9", "/a/caf\u00e9"),
        ("/a/cafe\u0301", "/a/cafe\u0301"),  # another file on most file systems
    ],
)
def test_canonical_uri(uri, expected):
    assert canonical_uri(uri) == expected
    assert canonical_uri(expected) == expected
    assert is_remote(expected) == ("://" in expected)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:hunter2@bucket/a",
        "s3://AKIA:hun/ter2@bucket/a",  # keys of AWS often have a slash
        "s3://AKIA:hunter2/a",
        "https://me:hunter2@host:9000/a.jpg",
        "https://hunter2@host/a.jpg",
        "sftp://me:hunter2@host/a",
        "HTTPS://me:hunter2@Host/a?sig=hunter2",
    ],
)
def test_passwords_in_addresses_are_refused_and_not_repeated(uri):
    for use in (canonical_uri, open_storage, build_manifest):
        with pytest.raises(MaskMillError) as error:
            use(uri)
        assert error.value.code == "wrong_use"
        assert "hun" not in str(error.value) and "ter2" not in str(error.value)


@pytest.mark.parametrize(
    "uri",
    [
        "abfss://Container@account.dfs.net/x",
        "sftp://Me@host/x",  # a name that is no secret keeps its case
        "https://[::1]:9000/a",
        "http://host:9000/a",
        "s3://arn:aws:s3:eu-west-1:1:accesspoint/x",
        "https://host/a@b:c",
        "https://host?x=a@b",
    ],
)
def test_what_is_no_password_is_taken(uri):
    assert canonical_uri(uri) == uri


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert canonical_uri("x/y") == str(tmp_path / "x" / "y")
    assert canonical_uri(Path("x")) == str(tmp_path / "x")


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert canonical_uri("~/x/../y") == str(tmp_path / "y")
    assert canonical_uri("s3://bucket/~/x") == "s3://bucket/~/x"
    monkeypatch.chdir(tmp_path)
    assert canonical_uri("~root/x") == str(tmp_path / "~root" / "x")
    assert canonical_uri("a/~/x") == str(tmp_path / "a" / "~" / "x")


def test_many_small_files(storage):
    storage.write_bytes("b.bin", b"old")
    storage.write_unsynced([("b.bin", b"new"), ("masks/a.png", b""), ("masks/deep/c d.png", b"3")])
    found = {name: storage.read_bytes(name) for name in storage.list(recursive=True)}
    assert found == {"b.bin": b"new", "masks/a.png": b"", "masks/deep/c d.png": b"3"}
    if storage.is_local:  # nothing half-written
        assert len([path for path in Path(storage.path()).rglob("*") if path.is_file()]) == 3
    for outside in ("../x", "/x", "a/../../x", "."):
        with pytest.raises(ValueError, match="not a name inside"):
            storage.write_unsynced([(outside, b"")])
    assert storage.path("a//b/./c") == storage.path("a/b/c")


def test_files(storage):
    assert not storage.exists()
    assert storage.list() == storage.list("none", recursive=True) == []
    storage.write_bytes("b.bin", b"\x00\xff")
    storage.write_bytes("labels/p 1.parquet", b"1")
    storage.write_bytes("labels/deep/p2.parquet", b"2")
    storage.write_bytes("b.bin", b"new")
    assert storage.exists() and storage.exists("labels") and storage.exists("b.bin")
    assert not storage.exists("c.bin")
    assert storage.read_bytes("b.bin") == b"new"
    assert storage.list() == ["b.bin"]
    assert storage.list("labels") == ["labels/p 1.parquet"]
    assert storage.list(recursive=True) == ["b.bin", "labels/deep/p2.parquet", "labels/p 1.parquet"]
    assert storage.glob("labels/*.parquet") == ["labels/p 1.parquet"]
    assert set(storage.glob("**/p*")) == {"labels/deep/p2.parquet", "labels/p 1.parquet"}
    labels = storage.child("labels")
    assert labels.list(recursive=True) == ["deep/p2.parquet", "p 1.parquet"]
    assert labels.uri == storage.uri_of("labels")
    storage.delete("b.bin")
    storage.delete("b.bin")
    storage.delete("labels/deep")
    assert storage.list(recursive=True) == ["labels/p 1.parquet"]
    storage.delete()
    assert storage.list(recursive=True) == []


def test_json(storage):
    value = {"z": [1, 2.5, None, True], "a": {"ü": "猫"}}
    assert storage.read_json("x/d.json", default=None) is None
    with pytest.raises(FileNotFoundError):
        storage.read_json("x/d.json")
    storage.write_json("x/d.json", value)
    assert storage.read_json("x/d.json") == value
    assert list(storage.read_json("x/d.json")) == ["z", "a"]
    assert "猫".encode() in storage.read_bytes("x/d.json")
    storage.write_bytes("x/bad.json", b'{"a": ')
    with pytest.raises(MaskMillError, match=r"bad\.json is not valid JSON") as error:
        storage.read_json("x/bad.json")
    assert error.value.code == "document_invalid"
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json("x/nan.json", float("nan"))


def test_create_succeeds_once(storage):
    assert storage.create_bytes("lease", b"first")
    assert not storage.create_bytes("lease", b"second")
    assert storage.read_bytes("lease") == b"first"
    storage.delete("lease")
    assert storage.create_bytes("lease", b"third")


def test_create_race_has_one_winner(tmp_path):
    storage = open_storage(tmp_path)
    start = threading.Barrier(8)

    def attempt(number: int) -> bool:
        start.wait()
        return storage.create_bytes("lease", bytes([number]))

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(8)))
    assert sum(won) == 1
    assert storage.read_bytes("lease") == bytes([won.index(True)])
    assert os.listdir(tmp_path) == ["lease"]


def test_readers_never_see_half_a_file(tmp_path):
    storage = open_storage(tmp_path)
    contents = [bytes([i]) * 1_000_000 for i in range(2)]
    storage.write_bytes("f", contents[0])
    done = threading.Event()

    def write() -> None:
        for i in range(40):
            storage.write_bytes("f", contents[i % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set() or not reads:
        assert storage.read_bytes("f") in contents
        reads += 1
    writer.join()
    assert os.listdir(tmp_path) == ["f"]


def test_swapping_compares_first(storage):
    assert not storage.swap_bytes("a", b"", b"1") and not storage.exists("a")
    storage.write_bytes("a", b"1")
    assert storage.swap_bytes("a", b"1", b"2")
    assert not storage.swap_bytes("a", b"1", b"3")
    assert not storage.swap_bytes("a", b"1", None)
    assert storage.read_bytes("a") == b"2"
    assert storage.swap_bytes("a", b"2", None)
    assert storage.list() == []


@pytest.mark.parametrize("where", ["local", "s3"])
def test_of_many_that_swap_at_once_one_succeeds(where, tmp_path, request):
    if where == "s3":
        request.getfixturevalue("s3_server")
    root = tmp_path if where == "local" else f"s3://bucket/{tmp_path.name}"
    open_storage(root).write_bytes("a", b"old")
    barrier = threading.Barrier(8)

    def swap(number: int) -> bool:
        storage = open_storage(root)
        barrier.wait()
        return storage.swap_bytes("a", b"old", f"new {number}".encode())

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(swap, range(8)))
    assert sum(done) == 1
    assert open_storage(root).read_bytes("a") == f"new {done.index(True)}".encode()


def test_a_swap_on_s3_whose_answer_was_lost_has_succeeded(s3_server, monkeypatch):
    """The request is sent again, and fails, as the file is not the old one any more."""
    storage = open_storage("s3://bucket/lost-answer")
    storage.write_bytes("a", b"old")
    real = type(storage.fs).pipe_file

    def twice(self, *arguments, **settings):
        real(self, *arguments, **settings)
        return real(self, *arguments, **settings)

    monkeypatch.setattr(type(storage.fs), "pipe_file", twice)
    assert storage.swap_bytes("a", b"old", b"new")


def test_moving_replaces(storage):
    for name in ("a", "b"):
        storage.write_bytes(name, name.encode())
    storage.move("a", "b")
    storage.move("b", "deep/below/c")
    assert storage.list(recursive=True) == ["deep/below/c"] and storage.read_bytes("deep/below/c") == b"a"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_told_in_words(tmp_path, monkeypatch):
    def full(*_arguments):
        with open("/dev/full", "wb") as file:
            file.write(b"x" * 10_000)

    monkeypatch.setattr("pipeline.files.storage.write_file", full)
    with pytest.raises(OSError) as error:
        open_storage(tmp_path).write_bytes("part", b"")
    told = explain(error.value)
    assert told is not None and told.code == "disk_full" and told.exit_status == 1


def test_failed_local_write_leaves_nothing(tmp_path):
    storage = open_storage(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        storage.write_bytes("folder", b"x")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_written_piece_by_piece_is_put_in_place_whole(storage):
    storage.write_bytes("new/a", b"old")
    with storage.new_file("new/a") as file:
        file.write(b"one, ")
        assert storage.read_bytes("new/a") == b"old"
        file.write(b"two")
    assert storage.read_bytes("new/a") == b"one, two"
    # What the block raises is its own, and no fault of the storage.
    with pytest.raises(RuntimeError, match="no more"), storage.new_file("new/b") as file:
        file.write(b"half")
        raise RuntimeError("no more")
    assert storage.list(recursive=True) == ["new/a"]


def test_the_longest_names_that_a_disk_takes(tmp_path):
    name = "ä" * 125 + ".json"
    open_storage(tmp_path).write_bytes(name, b"x")
    assert os.listdir(tmp_path) == [name]


def test_local_files_have_ordinary_permissions(tmp_path):
    open_storage(tmp_path).write_bytes("ours", b"")
    (tmp_path / "plain").write_bytes(b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")]
    assert modes[0] == modes[1]


def test_the_mark_of_a_folder_is_no_file(storage):
    if not storage.uri.startswith("s3://"):
        pytest.skip("only object stores have such marks")
    storage.write_bytes("run/part", b"1")
    for mark in ("run/", "run/inner/"):
        storage.fs.pipe_file(f"{storage.root}/{mark}", b"")
    assert storage.list("run") == storage.list("run", recursive=True) == ["run/part"]


def test_listings_are_fresh(storage):
    other = open_storage(storage.uri)
    assert storage.list() == []
    other.write_bytes("new", b"1")
    assert storage.list() == ["new"]
    assert storage.exists("new")


def test_pickles(storage):
    storage.write_bytes("a", b"1")
    again = pickle.loads(pickle.dumps(storage))
    assert again == storage
    assert again.read_bytes("a") == b"1"


def test_arrow_reads_what_fsspec_wrote_and_back(storage):
    table = pa.table({"id": [1, 2]})
    storage.write_bytes("seed", b"x")
    pq.write_table(table, storage.path("t.parquet"), filesystem=storage.arrow_filesystem())
    assert storage.list() == ["seed", "t.parquet"]
    assert pq.read_table(storage.path("t.parquet"), filesystem=storage.arrow_filesystem()).equals(table)
    assert storage.read_bytes("t.parquet")[:4] == b"PAR1"


def test_unknown_scheme():
    with pytest.raises(MaskMillError) as error:
        open_storage("nowhere://x/y")
    assert error.value.code == "wrong_use"
    assert "nowhere://x/y" in error.value.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_denied_local(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(MaskMillError) as error:
        open_storage(tmp_path).write_bytes("x", b"")
    assert error.value.code == "storage_unreachable"


def test_missing_bucket(s3_server):
    nowhere = open_storage("s3://no-such-bucket/out")
    assert nowhere.list() == []
    with pytest.raises(MaskMillError, match="s3://no-such-bucket/out/x") as error:
        nowhere.write_bytes("x", b"1")
    assert error.value.code == "wrong_use"


def test_unreachable_server(s3_server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    try:
        with pytest.raises(MaskMillError) as error:
            open_storage("s3://bucket/out").read_bytes("x")
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
    assert error.value.code == "storage_unreachable"


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x"])
def test_names_stay_inside(tmp_path, name):
    with pytest.raises(ValueError):
        open_storage(tmp_path).path(name)


def test_manifest_and_label_table_on_s3(s3_server):
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    for name in ("in/a b.jpg", "in/sub/c.PNG", "in/x.md", "in/q#1.jpg", "in/.thumbs/t.jpg"):
        fs.pipe(f"bucket/photos/{name}", b"x")
    fs.pipe("bucket/photos/list.txt", b"in/a b.jpg\n./in/z.jpg\n")
    base = "s3://bucket/photos"
    whole = build_manifest(f"{base}/in")
    expected = [f"{base}/in/{name}" for name in ("a b.jpg", "q#1.jpg", "sub/c.PNG")]
    assert whole.column("uri").to_pylist() == expected
    assert [fs.cat(uri) for uri in expected] == [b"x"] * 3
    assert build_manifest(f"{base}/in/*.jpg").column("uri").to_pylist() == expected[:2]
    assert build_manifest(f"{base}/list.txt").column("uri").to_pylist() == [expected[0], f"{base}/in/z.jpg"]
    write_manifest(whole, f"{base}/m.parquet")
    assert read_manifest(f"{base}/m.parquet").equals(whole)
    for missing in (f"{base}/none", "s3://no-such-bucket/in", f"{base}/none.txt", f"{base}/none.parquet"):
        with pytest.raises(MaskMillError) as error:
            build_manifest(missing)
        assert error.value.code == "input_missing"

    out = open_storage("s3://bucket/out-table")
    labels = np.zeros((4, 5), np.uint8)
    row = ok_row(
        id=1, uri=expected[0], sha256=bytes(32), height=4, width=5,
        labels=labels, confidence=labels, ignore_index=255,
    )  # fmt: skip
    table = pa.Table.from_pylist([row], schema=LABEL_SCHEMA)
    pq.write_table(table, out.path("labels/a.parquet"), filesystem=out.arrow_filesystem())
    assert read_ids("s3://bucket/out-table").tolist() == [1]
    assert summarise(out)["class_pixels"] == {"0": 20}


def test_a_file_is_read_piece_by_piece(tmp_path: Path) -> None:
    for storage in (open_storage(tmp_path), open_storage(f"memory://{tmp_path.name}")):
        storage.write_bytes("a/file", b"one two")
        with storage.open_file("a/file") as file:
            assert [file.read(4), file.read()] == [b"one ", b"two"]
        with pytest.raises(FileNotFoundError), storage.open_file("a/other"):
            pass
