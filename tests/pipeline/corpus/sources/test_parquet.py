from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import MaskMillError
from pipeline.corpus.manifest import build_manifest
from pipeline.files import containers
from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError
from pipeline.files.storage import open_storage

IMAGES = [bytes([number]) * (number + 1) for number in range(7)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def structs(images: list[bytes | None]) -> pa.Table:
    rows = [None if data is None else {"bytes": data, "path": f"{n}.png"} for n, data in enumerate(images)]
    return pa.table({"image": pa.array(rows, STRUCT), "label": pa.array(range(len(rows)))})


def found_at(source: object) -> list[bytes]:
    return [fetch(uri) for uri in build_manifest(source)["uri"].to_pylist()]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["struct", "binary", "large binary"])
def test_images_in_a_table(kind: str, tmp_path: Path) -> None:
    table = structs(list(IMAGES))
    if kind != "struct":
        table = pa.table(
            {"jpg": pa.array(IMAGES, pa.binary() if kind == "binary" else pa.large_binary()), "other": IMAGES}
        )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=3)
    column = "image" if kind == "struct" else "jpg"
    uris = build_manifest(tmp_path / "x.parquet")["uri"].to_pylist()
    assert uris == [f"{tmp_path}/x.parquet#{column}={row}" for row in range(7)]
    assert found_at(tmp_path / "x.parquet") == IMAGES
    assert [fetch(uri, start=1, length=2) for uri in uris] == [data[1:3] for data in IMAGES]


def test_what_datasets_writes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from PIL import Image

    pictures = [Image.new("RGB", (8, 8), (40 * n, 0, 0)) for n in range(3)]
    made = datasets.Dataset.from_dict(
        {"image": pictures, "label": [0, 1, 2]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    made.to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    from pipeline.files.images import decode

    assert [decode(data)[0, 0, 0] for data in found_at(tmp_path)] == [0, 40, 80]


def test_paths_instead_of_bytes(tmp_path: Path) -> None:
    rows = [{"bytes": None, "path": f"images/{number}.jpg"} for number in range(2)]
    pq.write_table(pa.table({"image": pa.array(rows, STRUCT)}), tmp_path / "x.parquet")
    assert build_manifest(tmp_path / "x.parquet")["uri"].to_pylist() == [
        f"{tmp_path}/images/{number}.jpg" for number in range(2)
    ]


def test_a_cell_that_cannot_be_read_is_a_fault_of_its_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(structs([b"a", None, b"c"]), path)
    for place, code in (
        ("image=1", "empty"), ("image=3", "not_found"), ("picture=0", "not_found"), ("image", "not_found"),
        ("label=0", "not_an_image"),
    ):  # fmt: skip
        with pytest.raises(ImageError) as caught:
            fetch(f"{path}#{place}")
        assert caught.value.code == code, place
    monkeypatch.setattr(containers, "LARGEST_GROUP", 10)
    pq.write_table(structs([b"a" * 100] * 3), tmp_path / "large.parquet")
    with pytest.raises(ImageError, match="smaller row groups"):
        fetch(f"{tmp_path}/large.parquet#image=0")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImageError, match="damaged"):
        fetch(f"{tmp_path}/broken.parquet#image=0")
    with pytest.raises(ImageError, match="no such"):
        fetch(f"{tmp_path}/none.parquet#image=0")


def test_which_column_is_meant(tmp_path: Path) -> None:
    pq.write_table(pa.table({"before": IMAGES, "after": IMAGES}), tmp_path / "x.parquet")
    with pytest.raises(MaskMillError, match="several columns of bytes: before, after"):
        build_manifest(tmp_path / "x.parquet")


def test_text_that_is_none(tmp_path: Path) -> None:
    """Bytes of a path that are not UTF-8, which Parquet does not notice."""
    rows = [{"bytes": None, "path": "abcdefgh"}]
    pq.write_table(pa.table({"image": pa.array(rows, STRUCT)}), tmp_path / "x.parquet", compression="none")
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(data.replace(b"abcdefgh", b"abcd\xffefg"))
    with pytest.raises(MaskMillError, match="not UTF-8"):
        build_manifest(tmp_path / "x.parquet")


def test_a_name_with_a_hash_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "x.parquet#image=0").write_bytes(b"itself")
    assert fetch(f"{tmp_path}/x.parquet#image=0") == b"itself"


def test_in_an_object_store(bucket: str) -> None:
    storage = open_storage(bucket)
    sink = pa.BufferOutputStream()
    pq.write_table(structs(list(IMAGES)), sink, row_group_size=2)
    for name in ("a.parquet", "b.parquet"):
        storage.write_bytes(f"train/{name}", sink.getvalue().to_pybytes())
    assert found_at(f"{bucket}/train") == IMAGES * 2
