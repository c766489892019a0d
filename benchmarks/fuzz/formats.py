"""Exports in every format that can be read, with one of their files mutated, read back."""

from __future__ import annotations

import io
import json
import random
import tarfile
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.fuzz.kind import Fault, Kind
from benchmarks.fuzz.mutations import mutate_bytes, mutate_tree
from pipeline.files.storage import open_storage
from pipeline.formats.base import Sample
from pipeline.formats.registry import find_reader, make_format, readable
from pipeline.ontology.ontology import Ontology

CLASSES = Ontology.from_dict(
    {"name": "fuzz", "background": ["wall"], "classes": [{"name": "cat", "kind": "thing"}, "grass", "猫 2"]}
)
HEIGHT, WIDTH = 9, 12


class Formats(Kind):
    """See the package."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name in readable():
            for file, data in exported(name).items():
                path = folder / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        self._files = self._listed()

    @classmethod
    def make(cls, rng: random.Random) -> bytes:
        """The format and the name of a file in a line of JSON, then the mutated file."""
        name = rng.choice(sorted(readable()))
        files = exported(name)
        file = rng.choice(sorted(files))
        suffix = PurePosixPath(file).suffix
        data = files[file]
        if suffix == ".json" and rng.random() < 0.8:
            data = json.dumps(mutate_tree(rng, json.loads(data), most=2)).encode()
        elif suffix == ".tar" and rng.random() < 0.8:
            data = _other_tar(rng, data)
        elif suffix == ".parquet" and rng.random() < 0.8:
            data = _other_parquet(rng, data)
        else:
            data = mutate_bytes(rng, data)
        return json.dumps([name, file]).encode() + b"\n" + data

    def check(self, data: bytes, rng: random.Random) -> str:
        """Read the export with the mutated file in its place."""
        head, _, content = data.partition(b"\n")
        name, file = json.loads(head)
        path = self.folder / name / file
        path.write_bytes(content)
        try:
            imported = find_reader(name)(str(self.folder / name))
            known = {*range(imported.ontology.num_classes), imported.ontology.ignore_index}
            for sample in imported.samples:
                labels = sample.labels
                if labels.ndim != 2 or labels.dtype != imported.ontology.mask_dtype:
                    raise Fault(f"{name}: {sample.name} is {labels.dtype} of {labels.shape}")
                unknown = set(np.unique(labels).tolist()) - known
                if unknown:
                    raise Fault(f"{name}: {sample.name} has the labels {sorted(unknown)[:5]}")
                if ".." in PurePosixPath(sample.name).parts or sample.name.startswith("/"):
                    raise Fault(f"{name}: a sample is called {sample.name!r}")
            if self._listed() != self._files:
                raise Fault(f"{name}: reading made a file")
        finally:
            path.write_bytes(exported(name)[file])
        return f"read {name}"

    def _listed(self) -> set[Path]:
        return {path for name in readable() for path in (self.folder / name).rglob("*")}


@cache
def exported(name: str) -> dict[str, bytes]:
    """The files of a small export."""
    picture = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(picture, "PNG")
    random_ids = np.random.default_rng(3)
    samples = [
        Sample(
            number=number,
            id=number,
            name=image,
            uri=f"/photos/{image}.png",
            suffix=".png",
            split="val" if number else "train",
            labels=random_ids.choice(np.array([0, 1, 2, 3, 255], np.uint8), (HEIGHT, WIDTH)),
            image=picture.getvalue(),
        )
        for number, image in enumerate(("a.b", "sub/c d"))
    ]
    form, output = make_format(name, {}), open_storage(f"memory://fuzz/{name}")
    entries = [one.entry for one in form.write_part("00000", samples, CLASSES, output)]
    form.finish(entries, CLASSES, output)
    return {file: output.read_bytes(file) for file in output.list(recursive=True)}


def _other_tar(rng: random.Random, data: bytes) -> bytes:
    """A tar whose members were renamed, changed, doubled or dropped, or became something else."""
    made = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=made, mode="w") as new:
        for member in old:
            file = old.extractfile(member)
            assert file is not None
            content = file.read()
            match rng.randrange(8):
                case 0:
                    member.name = rng.choice(("../x.json", "/x.json", "x", ".", "é.png", member.name * 9))
                case 1:
                    member.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, b"?", b"S"))
                    member.linkname = rng.choice(("/etc/passwd", member.name, ""))
                case 2:
                    content = mutate_bytes(rng, content)
                case 3 if member.name.endswith(".json"):
                    content = json.dumps(mutate_tree(rng, json.loads(content))).encode()
                case 4:
                    continue
                case 5:
                    member.pax_headers = {"size": rng.choice(("-1", "99999999999", "x")), "path": "../y.png"}
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return made.getvalue()


def _other_parquet(rng: random.Random, data: bytes) -> bytes:
    """A file whose cells were changed, or whose columns have other types."""
    table = pq.read_table(io.BytesIO(data))
    rows = table.to_pylist()
    for row in rows:
        if rng.random() < 0.7:
            row["mask"]["bytes"] = mutate_bytes(rng, row["mask"]["bytes"])
        if rng.random() < 0.3:
            row[rng.choice(sorted(row))] = None
    made = pa.Table.from_pylist(rows, table.schema)
    if rng.random() < 0.3:
        column = rng.randrange(made.num_columns)
        junk = rng.choice(([7] * len(rows), ["../x"] * len(rows), [[1]] * len(rows), [None] * len(rows)))
        made = made.set_column(column, made.column_names[column], pa.array(junk))
    sink = io.BytesIO()
    pq.write_table(made, sink)
    return sink.getvalue()


KIND = Formats
