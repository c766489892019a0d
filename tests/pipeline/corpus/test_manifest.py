"""Manifests: what is found where, ids, duplicates, collisions, and errors."""

from __future__ import annotations

import os
import tempfile
import time
from hashlib import blake2b
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import MaskMillError
from pipeline.corpus import manifest
from pipeline.corpus.manifest import build_manifest, read_manifest, stable_id, write_manifest


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names(table: pa.Table, root: Path) -> list[str]:
    return [os.path.relpath(uri, root) for uri in table.column("uri").to_pylist()]


# --- ids ---


@pytest.mark.parametrize(
    ("uri", "offset", "length", "key"),
    [
        ("/a/b.jpg", None, None, b"/a/b.jpg"),
        ("s3://b/ü.jpg", None, None, "s3://b/ü.jpg".encode()),
        ("/a/b.tar", 512, 100, b"/a/b.tar\x00512:100"),
    ],
)
def test_id_is_the_first_eight_bytes_of_blake2b(uri, offset, length, key):
    expected = int.from_bytes(blake2b(key).digest()[:8], "big", signed=True)
    assert stable_id(uri, offset=offset, length=length) == expected
    assert -(2**63) <= expected < 2**63


def test_ids_never_change():
    # A table made today must be continued by any later version.
    assert stable_id("/data/cat.jpg") == 1076828381749135584


# --- folders ---


def test_folder(tmp_path):
    touch(tmp_path, "b.JPG", "a.png", "sub/c.jpeg", "sub/deep/d.WebP", "e.tiff", "f.bmp", "g.gif")
    touch(tmp_path, "notes.txt", ".hidden.jpg", ".git/x.jpg", "sub/.thumbs/y.png", "z.jpg.part", "jpg")
    table = build_manifest(tmp_path)
    assert names(table, tmp_path) == [
        "a.png", "b.JPG", "e.tiff", "f.bmp", "g.gif", "sub/c.jpeg", "sub/deep/d.WebP",
    ]  # fmt: skip
    assert table.schema.equals(pa.schema([("id", pa.int64()), ("uri", pa.string())]))
    assert table.column("id").to_pylist() == [stable_id(uri) for uri in table.column("uri").to_pylist()]


def test_one_spelling_for_one_place(tmp_path, monkeypatch):
    touch(tmp_path, "in/a b.jpg", "in/c.jpg")
    monkeypatch.chdir(tmp_path)
    expected = build_manifest(tmp_path / "in")
    for source in ("in", "./in/", "in/../in", f"file://{tmp_path}/in", "in/*.jpg", f"{tmp_path}/in/**"):
        assert build_manifest(source).equals(expected)


@pytest.mark.parametrize(
    "name",
    [
        "a b.jpg",
        "100%.jpg",
        "%41.jpg",
        "#1.jpg",
        "a?b.jpg",
        "[x].jpg",
        "\u00e9.jpg",
        "e\u0301.jpg",
        "猫.jpg",
        "new\nline.jpg",
    ],
)
def test_names_open_as_they_are(tmp_path, name):
    touch(tmp_path, name)
    (uri,) = build_manifest(tmp_path).column("uri").to_pylist()
    assert Path(uri).read_bytes() == b"x"
    assert os.path.basename(uri) == name


def test_symbolic_links(tmp_path):
    touch(tmp_path, "in/real/a.jpg", "outside/b.jpg", "outside/c.jpg")
    root = tmp_path / "in"
    (root / "aa_loop").symlink_to(root)
    (root / "again").symlink_to(root / "real")
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "real" / "up").symlink_to(tmp_path)
    (root / "one.jpg").symlink_to(tmp_path / "outside" / "b.jpg")
    (root / "broken.jpg").symlink_to(tmp_path / "nothing.jpg")
    assert names(build_manifest(root), root) == ["one.jpg", "out/b.jpg", "out/c.jpg", "real/a.jpg"]


def test_links_that_lead_nowhere_and_what_else_is_not_taken(tmp_path):
    touch(tmp_path, "a.jpg", "b.heic", "c.HEIC", "notes.txt", ".hidden.png", "sub/d.webm")
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    (tmp_path / "sub" / "ping.jpg").symlink_to("pong.jpg")
    (tmp_path / "sub" / "pong.jpg").symlink_to("ping.jpg")
    (tmp_path / "gone.jpg").symlink_to("nothing.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    lines: list[str] = []
    assert names(build_manifest(tmp_path, notice=lines.append), tmp_path) == ["a.jpg"]
    assert lines == [
        f"{tmp_path}: 11 not taken: 3 × link to itself (itself.jpg, ping.jpg, pong.jpg); "
        "2 × .heic (b.heic, c.HEIC); 2 × neither file nor folder (pipe.jpg, zero.jpg); "
        "1 × .txt (notes.txt); 1 × .webm (d.webm); 1 × broken link (gone.jpg); 1 × hidden (.hidden.png)"
    ]
    lines.clear()
    assert build_manifest(f"{tmp_path}/*.jpg", notice=lines.append).num_rows == 1
    assert "link to itself (itself.jpg)" in lines[0] and "neither file nor folder (pipe.jpg" in lines[0]
    lines.clear()
    build_manifest(tmp_path / "a.jpg", notice=lines.append)
    assert lines == []


def test_every_ending_that_can_be_read_is_taken(tmp_path):
    endings = "avif jp2 j2k ppm pgm pbm pjp pjpeg jfif tif mpo"
    touch(tmp_path, *(f"x.{ending}" for ending in endings.split()), "x.heic")
    assert build_manifest(tmp_path).num_rows == len(endings.split())


def test_symbolic_link_as_source(tmp_path):
    touch(tmp_path, "in/a.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert names(build_manifest(tmp_path / "link"), tmp_path) == ["link/a.jpg"]


def test_pipes_are_not_images(tmp_path):
    touch(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "b.jpg")
    assert names(build_manifest(tmp_path), tmp_path) == ["a.jpg"]


def test_single_image(tmp_path):
    touch(tmp_path, "A.JPG")
    assert names(build_manifest(tmp_path / "A.JPG"), tmp_path) == ["A.JPG"]


def test_a_name_that_is_not_text(tmp_path):
    touch(tmp_path, "good.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"x")
    with pytest.raises(MaskMillError) as error:
        build_manifest(tmp_path)
    assert error.value.code == "dataset_invalid"
    assert r"caf\xe9.jpg" in error.value.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder(tmp_path):
    touch(tmp_path, "a.jpg", "closed/b.jpg")
    (tmp_path / "closed").chmod(0)
    with pytest.raises(MaskMillError, match="closed") as error:
        build_manifest(tmp_path)
    (tmp_path / "closed").chmod(0o700)
    assert error.value.code == "input_missing"


def test_many_files_quickly(tmp_path):
    # 20,000 to keep the test short; the time allowed is that of 100,000 in 3 s, doubled for a busy machine.
    for folder in range(20):
        (tmp_path / str(folder)).mkdir()
        for number in range(1000):
            os.close(os.open(tmp_path / str(folder) / f"{number}.jpg", os.O_CREAT | os.O_WRONLY))
    start = time.process_time()
    table = build_manifest(tmp_path)
    assert time.process_time() - start < 1.2
    assert table.num_rows == 20_000
    assert len(set(table.column("id").to_pylist())) == 20_000


# --- globs ---


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg"]),
        ("*", ["a.jpg", "s1/b.jpg", "s1/x/c.png", "s2/d.JPG"]),  # folders that match are searched
        ("s*", ["s1/b.jpg", "s1/x/c.png", "s2/d.JPG"]),
        ("**/*.jpg", ["a.jpg", "s1/b.jpg"]),
        ("**", ["a.jpg", "s1/b.jpg", "s1/x/c.png", "s2/d.JPG"]),
        ("s?/[bd].*", ["s1/b.jpg", "s2/d.JPG"]),
    ],
)
def test_glob(tmp_path, pattern, expected):
    touch(tmp_path, "a.jpg", "s1/b.jpg", "s1/x/c.png", "s2/d.JPG", "s2/readme.md", ".h/e.jpg")
    assert names(build_manifest(f"{tmp_path}/{pattern}"), tmp_path) == expected


# --- nothing found ---


@pytest.mark.parametrize(
    ("files", "source", "code", "words"),
    [
        ([], "", "input_missing", ["no files at all", ".jpg"]),
        (
            ["a.txt", "b.TXT", "c.raw", "noend"],
            "",
            "input_missing",
            ["2 × .txt", "1 × .raw", "1 × no ending"],
        ),
        (["a.txt"], "*", "input_missing", ["1 × .txt"]),
        (["a.txt"], "*.jpg", "input_missing", ["nothing matches"]),
        ([], "none", "input_missing", ["there is no", "none"]),
        (["a.docx"], "a.docx", "input_missing", ["neither an image", ".docx"]),
    ],
)
def test_nothing_found_says_what_was_looked_for(tmp_path, files, source, code, words):
    touch(tmp_path, *files)
    with pytest.raises(MaskMillError) as error:
        build_manifest(tmp_path / source if source else tmp_path)
    assert error.value.code == code
    for word in words:
        assert word in error.value.message
    assert error.value.remedy


# --- lists ---


def test_text_list(tmp_path):
    text = (
        "\ufeff# holiday\n\n  a.jpg \r\nsub/../sub/b.png\n/abs/c.jpg\nfile:///abs/d%20e.jpg\n"
        "s3a://bucket/f.jpg\n#.jpg\na#b.jpg"
    )
    (tmp_path / "list.txt").write_bytes(text.encode())
    table = build_manifest(tmp_path / "list.txt")
    assert table.column("uri").to_pylist() == [
        f"{tmp_path}/a.jpg",
        f"{tmp_path}/sub/b.png",
        "/abs/c.jpg",
        "/abs/d e.jpg",
        "s3://bucket/f.jpg",
        f"{tmp_path}/a#b.jpg",
    ]


def test_duplicates_are_merged(tmp_path):
    (tmp_path / "list.txt").write_text("b.jpg\na.jpg\n./b.jpg\nsub/../a.jpg\nb.jpg\n")
    assert names(build_manifest(tmp_path / "list.txt"), tmp_path) == ["b.jpg", "a.jpg"]


def test_a_column_of_what_was_merged_alone_is_left_out(tmp_path):
    (tmp_path / "l.csv").write_text("uri,width\na.jpg,\na.jpg,5\n")
    assert build_manifest(tmp_path / "l.csv").column_names == ["id", "uri"]


def test_a_list_that_is_signed_anew_names_the_same_images(tmp_path):
    def signed(secret: str) -> pa.Table:
        (tmp_path / "list.txt").write_text(
            f"https://h/a.jpg?X-Amz-Date={secret}&X-Amz-Signature={secret}\n"
            f"https://h/b.jpg?v=2&sig={secret}\n"
            "https://h/c.jpg\nd.jpg\n"
            f"https://h/a.jpg?X-Amz-Signature={secret}2\n"
        )
        return build_manifest(tmp_path / "list.txt", notice=lines.append)

    lines: list[str] = []
    one, other = signed("hunter21"), signed("hunter22")
    uris = ["https://h/a.jpg", "https://h/b.jpg?v=2", "https://h/c.jpg", f"{tmp_path}/d.jpg"]
    assert one["uri"].to_pylist() == other["uri"].to_pylist() == uris
    assert one["id"].equals(other["id"]) and one["id"].to_pylist() == [stable_id(uri) for uri in uris]
    assert other["address"].to_pylist()[1:3] == ["https://h/b.jpg?v=2&sig=hunter22", "https://h/c.jpg"]
    assert "1 listed more than once, and taken once" in lines[0]
    write_manifest(one, tmp_path / "m.parquet")
    assert b"hunter2" not in (tmp_path / "m.parquet").read_bytes() and "hunter2" not in str(lines)
    assert read_manifest(tmp_path / "m.parquet").column_names == ["id", "uri"]


@pytest.mark.parametrize("name", ["l.txt", "l.csv", "l.parquet"])
def test_a_password_in_a_list_is_refused_with_its_place(tmp_path, name):
    uris = ["a.jpg", "https://me:hunter2@h/b.jpg"]
    if name == "l.parquet":
        pq.write_table(pa.table({"uri": uris}), tmp_path / name)
    else:
        (tmp_path / name).write_text("\n".join(["uri"] * (name == "l.csv") + uris))
    with pytest.raises(MaskMillError) as error:
        build_manifest(tmp_path / name)
    assert error.value.code == "wrong_use" and "hunter2" not in str(error.value)
    place = {"l.txt": "l.txt:2: ", "l.csv": "l.csv:3: ", "l.parquet": "l.parquet: row 1: "}[name]
    assert place in error.value.message


def test_a_pipe_as_list_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "l.txt")
    with pytest.raises(MaskMillError, match="a pipe"):
        build_manifest(tmp_path / "l.txt")


def test_csv_list(tmp_path):
    text = 'note,uri,offset,length,width\n"x, y",a.tar,0,100,640\n,a.tar,512,7,\n,"b,c.jpg",,,\n'
    (tmp_path / "list.csv").write_text(text)
    table = build_manifest(tmp_path / "list.csv")
    assert table.schema.names == ["id", "uri", "offset", "length", "width"]
    assert table.schema.field("width").type == pa.int32()
    assert names(table, tmp_path) == ["a.tar", "a.tar", "b,c.jpg"]
    assert table.column("offset").to_pylist() == [0, 512, None]
    assert table.column("width").to_pylist() == [640, None, None]
    assert table.column("id").to_pylist() == [
        stable_id(f"{tmp_path}/a.tar", offset=0, length=100),
        stable_id(f"{tmp_path}/a.tar", offset=512, length=7),
        stable_id(f"{tmp_path}/b,c.jpg"),
    ]


def test_parquet_list(tmp_path):
    listed = pa.table(
        {"uri": pa.array(["x.jpg", "y.jpg"], pa.large_string()), "label": [1, 2], "height": [3, 4]}
    )
    pq.write_table(listed, tmp_path / "list.parquet")
    table = build_manifest(tmp_path / "list.parquet")
    assert table.schema.names == ["id", "uri", "height"]
    assert names(table, tmp_path) == ["x.jpg", "y.jpg"]


@pytest.mark.parametrize(
    ("name", "content", "place", "words"),
    [
        ("l.txt", b"# nothing\n\n", "l.txt: ", "no image"),
        ("l.txt", b"a.jpg\nb\xff.jpg\n", "l.txt:2: ", "UTF-8"),
        ("l.csv", b"path,x\na.jpg,1\n", "l.csv:1: ", "no column 'uri' (columns: path, x)"),
        ("l.csv", b"", "l.csv:1: ", "columns: none"),
        ("l.csv", b"uri\n", "l.csv: ", "no image"),
        ("l.csv", b"uri,width\na.jpg,10\nb.jpg,wide\n", "l.csv:3: ", "'wide'"),
        ("l.csv", b"uri,width\n ,10\n", "l.csv:2: ", "empty"),
        ("l.csv", b"uri,width\na.jpg\n", None, ""),  # a short row leaves the rest unknown
        ("l.csv", b"uri,width\na.jpg,0\n", "l.csv: ", "out of range"),
        ("l.csv", b"uri,offset,length\na.jpg,-1,5\n", "l.csv: ", "offset -1"),
        ("l.csv", b"uri,offset,length\na.jpg,3,\n", "l.csv: ", "together"),
        ("l.csv", b"uri,offset\na.jpg,3\n", "l.csv: ", "together"),
        ("l.csv", b"uri,width\na.jpg,99999999999\n", "l.csv: ", "out of range"),
    ],
)
def test_list_errors(tmp_path, name, content, place, words):
    (tmp_path / name).write_bytes(content)
    if place is None:
        assert build_manifest(tmp_path / name).num_rows == 1
        return
    with pytest.raises(MaskMillError) as error:
        build_manifest(tmp_path / name)
    assert error.value.code == "dataset_invalid"
    assert place in error.value.message
    assert words in error.value.message


# --- manifests ---


def test_manifest_round_trip_and_pass_through(tmp_path):
    touch(tmp_path, *(f"{i}.jpg" for i in range(5)))
    table = build_manifest(tmp_path)
    path = tmp_path / "new folder" / "m.parquet"
    write_manifest(table, path)
    assert read_manifest(path).equals(table)
    assert build_manifest(path).equals(table)
    assert os.listdir(path.parent) == ["m.parquet"]


def good(count: int = 2) -> dict[str, list]:
    uris = [f"/d/{i}.jpg" for i in range(count)]
    return {"id": [stable_id(uri) for uri in uris], "uri": uris}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({**good(), "id": [1, 2]}, "is not the id of '/d/0.jpg'"),
        ({**good(), "id": ["a", "b"]}, "column 'id' is string"),
        ({**good(), "id": [None, good()["id"][1]]}, "1 empty"),
        ({**good(), "uri": ["/d/0.jpg", None]}, "1 empty"),
        ({k: v + v[:1] for k, v in good().items()}, "'/d/0.jpg' appears twice"),
        ({"id": [stable_id("d.jpg")], "uri": ["d.jpg"]}, "not canonical"),
        ({"id": [1]}, "no column 'uri' and none of images (columns: id)"),
        ({"id": pa.array([], pa.int64()), "uri": pa.array([], pa.string())}, "no rows"),
        ({**good(), "offset": ["x", "y"]}, "column 'offset' is string"),
    ],
)
def test_bad_manifests(tmp_path, columns, words):
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table(columns), path)
    for read in (read_manifest, build_manifest):
        with pytest.raises(MaskMillError) as error:
            read(path)
        assert error.value.code == "dataset_invalid"
        assert words in error.value.message
        assert str(path) in error.value.message


def test_not_parquet_missing_and_without_ids(tmp_path):
    (tmp_path / "m.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(MaskMillError, match="not a Parquet file"):
        read_manifest(tmp_path / "m.parquet")
    with pytest.raises(MaskMillError) as error:
        read_manifest(tmp_path / "none.parquet")
    assert error.value.code == "input_missing"
    pq.write_table(pa.table({"uri": ["a.jpg"]}), tmp_path / "m.parquet")
    with pytest.raises(MaskMillError, match="no column 'id'"):
        read_manifest(tmp_path / "m.parquet")


def test_collision_names_both(tmp_path, monkeypatch):
    # No two texts with equal 64-bit hashes are at hand, so the hash is narrowed.
    monkeypatch.setattr(manifest, "stable_id", lambda uri, **_: len(uri))
    (tmp_path / "list.txt").write_text("/a.jpg\n/bb.jpg\n/c.jpg\n")
    with pytest.raises(MaskMillError) as error:
        build_manifest(tmp_path / "list.txt")
    assert error.value.code == "dataset_invalid"
    assert "'/a.jpg'" in error.value.message and "'/c.jpg'" in error.value.message


paths = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=6).filter(
        lambda s: s not in (".", "..")
    ),
    min_size=1,
    max_size=3,
).map(lambda parts: "/" + "/".join(parts))


@given(st.lists(paths, min_size=1, max_size=20))
def test_rows_are_unique_in_first_order(uris):
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table({"uri": uris}), f"{folder}/list.parquet")
        table = build_manifest(f"{folder}/list.parquet")
    assert table.column("uri").to_pylist() == list(dict.fromkeys(uris))


# --- elsewhere ---


def test_remote_folder_glob_and_lists():
    fs = fsspec.filesystem("memory")
    for name in ("a.jpg", "sub/b.PNG", "sub/notes.md", ".hidden/c.jpg"):
        fs.pipe(f"/manifest-test/in/{name}", b"x")
    fs.pipe("/manifest-test/list.txt", b"in/a.jpg\n./in/z.jpg\nmemory://other/y.jpg\n")
    base = "memory://manifest-test"
    try:
        expected = [f"{base}/in/a.jpg", f"{base}/in/sub/b.PNG"]
        assert build_manifest(f"{base}/in").column("uri").to_pylist() == expected
        assert build_manifest(f"{base}/in/").column("uri").to_pylist() == expected
        assert build_manifest(f"{base}/in/**/*.PNG").column("uri").to_pylist() == expected[1:]
        assert build_manifest(f"{base}/in/a.jpg").column("uri").to_pylist() == expected[:1]
        table = build_manifest(f"{base}/list.txt")
        assert table.column("uri").to_pylist() == [
            f"{base}/in/a.jpg", f"{base}/in/z.jpg", "memory://other/y.jpg",
        ]  # fmt: skip
        write_manifest(table, f"{base}/m.parquet")
        assert read_manifest(f"{base}/m.parquet").equals(table)
        with pytest.raises(MaskMillError, match=r"1 × \.md"):
            build_manifest(f"{base}/in/sub/*.md")
        for missing in (f"{base}/none", f"{base}/none/*.jpg", f"{base}/none.txt", f"{base}/none.parquet"):
            with pytest.raises(MaskMillError) as error:
                build_manifest(missing)
            assert error.value.code == "input_missing"
    finally:
        fs.rm("/manifest-test", recursive=True)
