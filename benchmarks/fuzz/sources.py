"""Tar shards, Parquet files with images, COCO's JSON and JSON lines as sources of images."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.fuzz.kind import Fault, Kind
from benchmarks.fuzz.mutations import mutate_bytes, mutate_tree
from pipeline.corpus.manifest import build_manifest, read_manifest, write_manifest
from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError

MOST_FETCHED = 6
_MEMBERS = (
    "a.jpg",
    "cats/b.PNG",
    "c.seg.png",
    "d.json",
    "./e.webp",
    "../f.jpg",
    "/g.jpg",
    "h" * 120 + ".jpg",
    "i#1.jpg",
)
_TYPES = (tarfile.REGTYPE,) * 6 + (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class Sources(Kind):
    """See the package. The first line of an input is the ending of its file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        Image.new("RGB", (4, 4)).save(folder / "a.png")

    @classmethod
    def make(cls, rng: random.Random) -> bytes:
        """A file of one of the kinds."""
        ending = rng.choice(("tar", "parquet", "json", "jsonl"))
        makers = {"tar": _tar, "parquet": _parquet, "json": _coco, "jsonl": _lines}
        return f"{ending}\n".encode() + mutate_bytes(rng, makers[ending](rng), most=rng.choice((0, 1, 4)))

    def check(self, data: bytes, rng: random.Random) -> str:
        """List its images as a command does, and read some of them."""
        ending, _, content = data.partition(b"\n")
        path = self.folder / f"source.{ending.decode()}"
        path.write_bytes(content)
        table = build_manifest(path)
        if len(set(table["id"].to_pylist())) != table.num_rows:
            raise Fault("two rows have one id")
        write_manifest(table, self.folder / "m.parquet")
        if not read_manifest(self.folder / "m.parquet").equals(table):
            raise Fault("a manifest that is another one when it is read again")
        rows = table.to_pylist()
        for row in rng.sample(rows, min(MOST_FETCHED, len(rows))):
            self._read(row)
        return f"listed {ending.decode()}"

    def _read(self, row: dict[str, Any]) -> None:
        inside = row["uri"].startswith(f"{self.folder}/source.")
        if not inside and not row["uri"].startswith(f"{self.folder}/"):
            return  # anything on this machine or on the web
        try:
            data = fetch(row["uri"], start=row.get("offset") or 0, length=row.get("length"), attempts=1)
        except ImageError:
            return
        if row.get("length") is not None and inside and "#" in row["uri"] and len(data) != row["length"]:
            raise Fault(f"{len(data)} bytes of {row['length']}")


def _tar(rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    ) as archive:
        for name in rng.choices(_MEMBERS, k=rng.randint(0, 5)):
            member = tarfile.TarInfo(name)
            member.type = rng.choice(_TYPES)
            member.linkname = rng.choice(("", "a.jpg", "/etc/passwd"))
            content = rng.randbytes(rng.choice((0, 1, 511, 512, 3000)))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _parquet(rng: random.Random) -> bytes:
    images: list[bytes | None] = [
        rng.choice((None, rng.randbytes(rng.randint(0, 300)))) for _ in range(rng.randint(0, 9))
    ]
    paths = [rng.choice((None, "a.png", "nowhere.png", "")) for _ in images]
    cells = [{"bytes": data, "path": path} for data, path in zip(images, paths, strict=True)]
    columns: dict[str, Any] = rng.choice(
        (
            {"image": pa.array(cells, _STRUCT)},
            {"image": pa.array(images, pa.binary()), "other": pa.array(images, pa.large_binary())},
            {"picture": pa.array(cells, _STRUCT), "label": pa.array(range(len(images)))},
            {"one": pa.array(images, pa.binary()), "two": pa.array(images, pa.binary())},
            {"image": pa.array([str(n) for n, _ in enumerate(images)])},
        )
    )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, row_group_size=rng.choice((1, 3, 100)))
    return bytes(sink.getvalue().to_pybytes())


def _coco(rng: random.Random) -> bytes:
    document = {
        "info": {}, "annotations": [], "categories": [],
        "images": [
            {"id": 1, "file_name": "a.png", "width": 4, "height": 4},
            {"id": 2, "file_name": "missing.png", "coco_url": "http://[::1]/b.png"},
        ],
    }  # fmt: skip
    return json.dumps(mutate_tree(rng, document, most=rng.randint(0, 3))).encode("utf-8", "replace")


def _lines(rng: random.Random) -> bytes:
    rows = [
        {"file_name": "a.png"},
        {"uri": "s3://b/c.png", "width": 3},
        {"url": "http://h/x", "offset": 1, "length": 2},
    ]
    chosen = rng.choices(rows, k=rng.randint(0, 4))
    return "\n".join(json.dumps(mutate_tree(rng, row, most=rng.randint(0, 1))) for row in chosen).encode(
        "utf-8", "replace"
    )


KIND = Sources
