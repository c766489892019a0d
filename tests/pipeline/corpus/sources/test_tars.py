from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from models.errors import MaskMillError
from pipeline.corpus.manifest import build_manifest, read_manifest, write_manifest
from pipeline.files.fetch import fetch
from pipeline.files.storage import open_storage


def shard(path: Path, members: dict[str, bytes], *, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


MEMBERS = {
    "cats/1.jpg": b"one",
    "cats/1.json": b"{}",
    "cats/1.seg.png": b"mask",
    "dogs/2.PNG": b"twotwo",
    "dogs/3.png": b"",
    "./._4.jpg": b"fork",
    "a" * 150 + "/5.webp": b"five",  # longer than a plain header holds
}
IMAGES = {"cats/1.jpg": b"one", "dogs/2.PNG": b"twotwo", "a" * 150 + "/5.webp": b"five"}


def content(uri: str, offset: int, length: int) -> bytes:
    """Found by its range, and by its name alone."""
    by_name = fetch(uri)
    assert fetch(uri, start=offset, length=length) == by_name
    assert fetch(uri, start=1) == by_name[1:]
    return by_name


def test_members_are_byte_ranges(tmp_path: Path) -> None:
    path = shard(tmp_path / "000.tar", MEMBERS)
    notices: list[str] = []
    table = build_manifest(path, notice=notices.append)
    found = {row["uri"]: content(row["uri"], row["offset"], row["length"]) for row in table.to_pylist()}
    assert found == {f"{path}#{name}": data for name, data in IMAGES.items()}
    assert "1 × .seg.png (1.seg.png)" in notices[0] and "1 × empty (3.png)" in notices[0]
    write_manifest(table, tmp_path / "m.parquet")
    assert read_manifest(tmp_path / "m.parquet").equals(table)
    assert build_manifest(f"{path}#cats/1.jpg")["uri"].to_pylist() == [f"{path}#cats/1.jpg"]


def test_a_folder_of_shards(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"{number:03}.tar", {f"{number}.jpg": bytes([number])})
    (tmp_path / "sizes.json").write_text("{}")
    for source in (tmp_path, tmp_path / "*.tar"):
        uris = build_manifest(source)["uri"].to_pylist()
        assert uris == [f"{tmp_path}/{number:03}.tar#{number}.jpg" for number in range(3)]
    # Beside images, an archive is most likely one of them.
    (tmp_path / "a.jpg").touch()
    notices: list[str] = []
    assert build_manifest(tmp_path, notice=notices.append)["uri"].to_pylist() == [f"{tmp_path}/a.jpg"]
    assert "3 × .tar" in notices[0]


def test_of_members_with_one_name_the_last_counts(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", {"1.jpg": b"old"})
    shard(path, {"1.jpg": b"newer"}, mode="a")
    (row,) = build_manifest(path).to_pylist()
    assert content(row["uri"], row["offset"], row["length"]) == b"newer"


def test_links_and_folders_are_no_images(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", {"1.jpg": b"x"})
    with tarfile.open(path, "a") as archive:
        for name, kind in (
            ("2.jpg", tarfile.SYMTYPE),
            ("3.jpg", tarfile.DIRTYPE),
            ("4.jpg", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert build_manifest(path)["uri"].to_pylist() == [f"{path}#1.jpg"]


def test_of_a_shard_that_is_cut_off_the_rest_is_told(tmp_path: Path) -> None:
    whole = shard(tmp_path / "x.tar", {"1.jpg": b"x" * 2000, "2.jpg": b"y" * 2000}).read_bytes()
    for length, names in ((512 + 2048 + 512 + 100, ["1.jpg"]), (512 + 2048 + 100, ["1.jpg"])):
        (tmp_path / "x.tar").write_bytes(whole[:length])
        notices: list[str] = []
        table = build_manifest(tmp_path / "x.tar", notice=notices.append)
        assert [uri.partition("#")[2] for uri in table["uri"].to_pylist()] == names
        assert "damaged archive" in notices[0]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.tar", b"no archive" * 100, "no images in"),
        ("x.tar", b"", "no images in"),
        ("x.tar.gz", b"\x1f\x8b", "compressed archive"),
        ("x.tgz", b"\x1f\x8b", "compressed archive"),
    ],
)
def test_what_is_no_archive_of_images(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(MaskMillError, match=words):
            build_manifest(source)
    with pytest.raises(MaskMillError, match="there is no"):
        build_manifest(tmp_path / "none.tar")


def test_shards_in_an_object_store(bucket: str, tmp_path: Path) -> None:
    storage = open_storage(bucket)
    for number in range(2):
        data = shard(
            tmp_path / "x.tar", {f"{number}/{name}": data for name, data in MEMBERS.items()}
        ).read_bytes()
        storage.write_bytes(f"{number}.tar", data)
    for source in (bucket, f"{bucket}/*.tar"):
        rows = build_manifest(source).to_pylist()
        found = {row["uri"]: content(row["uri"], row["offset"], row["length"]) for row in rows}
        assert found == {
            f"{bucket}/{number}.tar#{number}/{name}": data
            for number in range(2)
            for name, data in IMAGES.items()
        }
