"""Shards, opened with the package ``webdataset``, and archives that somebody made to do harm."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from PIL import Image

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.formats.base import Sample
from pipeline.formats.webdataset import WebDataset, key_of, read_webdataset
from pipeline.ontology.ontology import Ontology
from pipeline.table.labels import encode_mask
from tests.pipeline.formats.drawn import check_same, contents, datasets, export, picture

ONTOLOGY = Ontology.from_dict({"name": "x", "classes": ["a", "b"]})


def sample(number: int, name: str, split: str = "train") -> Sample:
    labels = np.array([[0, 1, 255], [number % 2, 0, 1]], np.uint8)
    return Sample(
        number=number,
        id=-number,
        name=name,
        uri=f"s3://b/{name}.png",
        suffix=".png",
        split=split,
        labels=labels,
        image=picture(2, 3),
    )


@given(datasets(images=True))
@settings(max_examples=10)
def test_labels_come_back(tmp_path_factory, drawn):
    ontology, samples = drawn
    output = open_storage(tmp_path_factory.mktemp("out"))
    export(WebDataset(), ontology, samples, output)
    before = contents(output)
    export(WebDataset(), ontology, samples, output)
    assert contents(output) == before
    imported = read_webdataset(output.uri)
    check_same(imported, ontology, samples)
    by_name = {one.name: one for one in samples}
    assert imported.ontology == ontology
    assert all(one.image == by_name[one.name].image for one in imported.samples)
    assert all(one.uri == by_name[one.name].uri for one in imported.samples)
    shutil.rmtree(output.root)


def test_the_library_reads_every_image_with_its_mask(tmp_path):
    names = [
        "my.photo.v2",
        "a.b/c",
        "猫 犬/ä",
        "__all__/x",
        "__y__",
        "50%",
        "a%2Eb",
        "a.b",
        "n" * 120,
        "d/" * 99 + "e",
    ]
    assert len(set(map(key_of, names))) == len(names)
    samples = [sample(number, name, ["train", "val"][number % 2]) for number, name in enumerate(names)]
    export(WebDataset(), ONTOLOGY, samples, open_storage(tmp_path))
    shards = open_storage(tmp_path).read_json("shards.json")
    assert [one["url"] for one in shards["val"]][:2] == ["val-00000.tar", "val-00002.tar"]
    for split in ("train", "val"):
        urls = [str(tmp_path / one["url"]) for one in shards[split]]
        read = list(
            webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "mask.png", "json")
        )
        wanted = [one for one in samples if one.split == split]
        assert [info["name"] for _, _, info in read] == [one.name for one in wanted]
        for (image, mask, info), one in zip(read, wanted, strict=True):
            assert image.size == (3, 2) == (info["width"], info["height"]) and info["id"] == one.id
            # The library decodes every PNG to RGB; raw bytes are the mask itself.
            assert mask.mode == "RGB"
        raw = list(webdataset.WebDataset(urls, shardshuffle=False).to_tuple("mask.png"))
        for (data,), one in zip(raw, wanted, strict=True):
            assert (np.asarray(Image.open(io.BytesIO(data))) == one.labels).all()


def test_headers_tell_neither_time_nor_owner(tmp_path):
    export(WebDataset(), ONTOLOGY, [sample(0, "x")], open_storage(tmp_path))
    with tarfile.open(tmp_path / "train-00000.tar") as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o644 and member.isreg()


def _archive(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for member, data in members:
            member.size = member.size or len(data)
            archive.addfile(member, io.BytesIO(data))


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


MASK = encode_mask(np.array([[0, 1, 255], [0, 0, 1]], np.uint8))
OTHER = encode_mask(np.full((1, 1), 7, np.uint8))
HUGE = MASK[:16] + (60_000).to_bytes(4, "big") * 2 + MASK[24:]
HOSTILE = {
    "parent": ([(_member("../x.json"), b"{}")], "not in the dataset"),
    "absolute": ([(_member("/etc/x.json"), b"{}")], "not in the dataset"),
    "name": (
        [(_member("x.mask.png"), MASK), (_member("x.json"), b'{"name": "../../x"}')],
        "not in the dataset",
    ),
    "link": ([(_member("x.mask.png", tarfile.SYMTYPE, "/etc/passwd"), b"")], "a link or a device"),
    "hard link": ([(_member("x.mask.png", tarfile.LNKTYPE, "y"), b"")], "a link or a device"),
    "pipe": ([(_member("x.mask.png", tarfile.FIFOTYPE), b"")], "a link or a device"),
    "no mask": ([(_member("x.json"), b"{}")], r"no mask\.png"),
    "no key": ([(_member(".hidden"), b"{}")], "has no key"),
    "twice": ([(_member("x.json"), b"{}"), (_member("x.json"), b"{}")], "there twice"),
    "text": ([(_member("x.mask.png"), MASK), (_member("x.json"), b'{"name": 1}')], "name"),
    "list": ([(_member("x.mask.png"), MASK), (_member("x.json"), b"[]")], r"x\.json"),
    "deep": ([(_member("x.mask.png"), MASK), (_member("x.json"), b"[" * 100_000)], "nested too deeply"),
    "size": ([(_member("x.mask.png"), MASK), (_member("x.json"), b'{"height": 9, "width": 3}')], "9 x 3"),
    "huge": ([(_member("x.mask.png"), HUGE), (_member("x.json"), b"{}")], "exceeds the limit"),
    "half": ([(_member("x.mask.png"), MASK[:40]), (_member("x.json"), b"{}")], "cannot be read"),
    "ids": (
        [(_member("x.mask.png"), OTHER), (_member("x.json"), b"{}")],
        "7",
    ),
    "large json": ([(_member("x.json"), b" " * (2 << 20))], "too large"),
    "fewer": ([], "holds 0 images"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_are_refused(tmp_path, case):
    export(WebDataset(), ONTOLOGY, [sample(0, "x")], open_storage(tmp_path))
    members, why = HOSTILE[case]
    _archive(tmp_path / "train-00000.tar", members)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MaskMillError, match=why) as error:
        [one.labels for one in read_webdataset(str(tmp_path)).samples]
    assert error.value.code in ("dataset_invalid", "mask_invalid")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("keep", [100, 512, 700, 2000])
def test_a_shard_that_is_cut_off_is_refused(tmp_path, keep):
    export(WebDataset(), ONTOLOGY, [sample(0, "x")], open_storage(tmp_path))
    shard = tmp_path / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(MaskMillError, match=r"train-00000\.tar"):
        [one.labels for one in read_webdataset(str(tmp_path)).samples]


@pytest.mark.parametrize("name", ["train-00000.tar", "a" * 5000])
def test_a_shard_that_is_no_file_is_refused_at_once(tmp_path, name):
    export(WebDataset(), ONTOLOGY, [sample(0, "x")], open_storage(tmp_path))
    (tmp_path / "train-00000.tar").unlink()
    os.mkfifo(tmp_path / "train-00000.tar")
    (tmp_path / "shards.json").write_text(json.dumps({"train": [{"url": name, "nsamples": 1}]}))
    with pytest.raises(MaskMillError, match=r"not a file|cannot be read") as error:
        [one.labels for one in read_webdataset(str(tmp_path)).samples]
    assert error.value.code == "dataset_invalid"


@pytest.mark.parametrize(
    "text", ["[]", '{"train": 3}', '{"train": [{"url": "../x.tar", "nsamples": 1}]}', "{"]
)
def test_a_wrong_list_of_shards_is_refused(tmp_path, text):
    export(WebDataset(), ONTOLOGY, [sample(0, "x")], open_storage(tmp_path))
    (tmp_path / "shards.json").write_text(text)
    with pytest.raises(MaskMillError, match=r"shards\.json") as error:
        read_webdataset(str(tmp_path))
    assert error.value.code == "dataset_invalid"
