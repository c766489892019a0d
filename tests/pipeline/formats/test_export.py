"""The engine of exports, with the format png, whose files are easy to compare."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from models.errors import MaskMillError
from pipeline.corpus.manifest import stable_id
from pipeline.files.images import decode
from pipeline.files.storage import Storage, open_storage
from pipeline.formats.export import delete_export, discard_leftovers, finish
from pipeline.formats.parts import write_part
from pipeline.formats.plan import make_plan
from pipeline.formats.png import Png, read_png
from pipeline.formats.record import Export, check_output, find_export, new_export, write_record
from pipeline.formats.samples import Source, split_of
from pipeline.table.changed import Images
from pipeline.table.committed import write_part as write_rows
from pipeline.table.labels import LABEL_SCHEMA, OK, decode_mask, iter_rows, ok_row
from pipeline.table.record import find_table_record
from pipeline.table.views import View
from tests.pipeline.formats.tables import TOYWORLD, add_rows, toy_table


def prepared(table: Storage, output: Storage, **options: Any) -> Export:
    record = find_table_record(table)
    assert record is not None
    return new_export(Source(table, **options), record, Png(), output)


def export(table: Storage, output: Storage, **options: Any) -> Any:
    """Export as the command does; returns the record and the names of the parts that were done."""
    work = prepared(table, output, **options)
    check_output(work, overwrite=False)
    plan = make_plan(work)
    write_record(output, work.record)
    for name in plan.todo:
        write_part(name, export=work, plan=plan)
    return finish(work, plan), plan.todo


def files_of(output: Storage) -> Mapping[str, bytes]:
    return {name: output.read_bytes(name) for name in output.list(recursive=True)}


def test_masks_come_back_and_failed_rows_are_listed(tmp_path: Path) -> None:
    table, output = toy_table(tmp_path / "table", 10), open_storage(tmp_path / "out")
    record, _ = export(table, output, val_share=0.3)
    assert record.complete and record.left_out == {"truncated": 1} and sum(record.images.values()) == 9
    rows = {row["uri"]: row for row in iter_rows(table) if row["status"] == OK}
    read = read_png(str(tmp_path / "out"))
    assert read.ontology == TOYWORLD
    assert {sample.uri for sample in read.samples} == rows.keys()
    for sample in read.samples:
        assert np.array_equal(sample.labels, decode_mask(rows[sample.uri]["mask"]["bytes"]))
        assert sample.split == split_of(rows[sample.uri]["id"], 0.3)
    lists = {split: (tmp_path / "out" / f"{split}.txt").read_text().split() for split in record.images}
    assert {split: len(names) for split, names in lists.items()} == record.images
    assert "the file ends too soon" in (tmp_path / "out/left_out.csv").read_text()


def test_an_export_goes_on_and_grows_and_is_the_same_as_one_in_one_go(tmp_path: Path) -> None:
    table, output = toy_table(tmp_path / "table", 16), open_storage(tmp_path / "out")
    work = prepared(table, output)
    plan = make_plan(work)
    write_record(output, work.record)
    write_part(plan.todo[2], export=work, plan=plan)
    output.write_bytes("masks/.scene_001.png.abc.tmp", b"half")
    discard_leftovers(output)
    record, done = export(table, output)
    assert len(done) == 3 and plan.todo[2] not in done
    export(table, open_storage(tmp_path / "at_once"))
    assert files_of(output) == files_of(open_storage(tmp_path / "at_once"))
    assert export(table, output)[1] == []

    before = files_of(output)
    add_rows(table, ["/toy/scene_000.jpg", "/toy/new.jpg", "/elsewhere/a.jpg", "/toy/bad.jpg"], seed=5)
    record, done = export(table, output)
    assert len(done) == 1 and record.images == {"train": 18} and record.left_out == {"truncated": 2}
    after = files_of(output)
    assert all(
        after[name] == before[name] for name in before if name.startswith(("masks/", ".maskmill/parts"))
    )
    added = sorted(name for name in after.keys() - before.keys() if name.startswith("masks"))
    assert [name.partition("-")[0] for name in added] == [
        "masks/elsewhere/a",
        "masks/new.png",
        "masks/scene_000",
    ]
    assert len(list(read_png(str(tmp_path / "out")).samples)) == 18


def test_small_files_that_a_machine_lost_are_written_again(tmp_path: Path) -> None:
    """They are not made sure of one by one; the whole export is, at its end."""
    table, output = toy_table(tmp_path / "table", 16), open_storage(tmp_path / "out")
    work = prepared(table, output)
    plan = make_plan(work)
    write_record(output, work.record)
    for name in plan.todo[:3]:
        write_part(name, export=work, plan=plan)
    output.write_bytes("masks/scene_001.png", b"")
    output.delete("masks/scene_009.png")
    assert make_plan(work).todo == [plan.todo[0], plan.todo[2], plan.todo[3]]
    assert export(table, output)[1] == [plan.todo[0], plan.todo[2], plan.todo[3]]
    assert len(list(read_png(str(tmp_path / "out")).samples)) == 15
    assert make_plan(work).todo == []


def test_files_of_large_tables_share_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.formats.plan.PARTS_AT_LEAST", 2)
    table, output = toy_table(tmp_path / "table", 20), open_storage(tmp_path / "out")
    work = prepared(table, output)
    plan = make_plan(work)
    assert {name: len(part.files) for name, part in plan.parts.items()} == {"00000": 3, "00003": 2}
    write_record(output, work.record)
    write_part("00003", export=work, plan=plan)
    add_rows(table, ["/toy/new.jpg", "/toy/bad.jpg"], seed=5)
    record, done = export(table, output)
    assert done == ["00000", "00005"] and record.images == {"train": 20}
    found = {sample.uri: sample for sample in read_png(str(tmp_path / "out")).samples}
    rows = {row["uri"]: row for row in iter_rows(table) if row["status"] == OK}
    assert found.keys() == rows.keys()
    for uri, row in rows.items():
        assert np.array_equal(found[uri].labels, decode_mask(row["mask"]["bytes"]))


def test_an_export_of_older_versions_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file was a part, and was made sure of."""
    table, output = toy_table(tmp_path / "table", 20), open_storage(tmp_path / "out")
    export(table, output)
    kept = output.read_json(".maskmill/plan.json")
    for entry in kept["parts"]:
        del entry["part"]
    output.write_json(".maskmill/plan.json", kept)
    for name in output.list(".maskmill/parts"):
        head, *lines = output.read_bytes(name).splitlines()
        older = {key: value for key, value in json.loads(head).items() if key != "sums"}
        output.write_bytes(name, b"\n".join([json.dumps(older).encode(), *lines, b""]))
    output.delete(".maskmill/parts/00001.jsonl")
    monkeypatch.setattr("pipeline.formats.plan.PARTS_AT_LEAST", 2)
    assert export(table, output)[1] == ["00001"]


def test_images_that_have_changed_or_gone_are_left_out_until_they_are_back(tmp_path: Path) -> None:
    table = toy_table(tmp_path / "table", 8, images=tmp_path / "images")
    output = open_storage(tmp_path / "out")
    images = tmp_path / "images"
    kept = {name: (images / name).read_bytes() for name in ("scene_000.png", "scene_003.png")}
    (images / "scene_000.png").write_bytes(kept["scene_003.png"])
    (images / "scene_003.png").unlink()
    record, _ = export(table, output, with_images=True)
    assert record.left_out == {"image_changed": 1, "not_found": 1, "truncated": 1}
    assert record.images == {"train": 5}
    assert not output.exists("masks/scene_000.png") and not output.exists("images/scene_000.png")
    for name, data in kept.items():
        (images / name).write_bytes(data)
    record, done = export(table, output, with_images=True)
    assert len(done) == 1 and record.images == {"train": 7} and record.left_out == {"truncated": 1}
    assert output.read_bytes("images/scene_000.png") == kept["scene_000.png"]


def test_images_too_large_to_be_taken_whole_are_left_out_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, output = toy_table(tmp_path / "table", 6), open_storage(tmp_path / "out")
    add_rows(table, ["/toy/large.png", "/toy/bad.png"], size=60)
    monkeypatch.setattr("pipeline.table.labels.MOST_DECODED", 48 * 48)
    record, _ = export(table, output)
    assert record.left_out == {"map_too_large": 1, "truncated": 2} and record.images == {"train": 5}
    listed = (tmp_path / "out/left_out.csv").read_text()
    assert '/toy/large.png,map_too_large,"60 x 60 pixels' in listed


def test_a_view_changes_labels_and_classes(tmp_path: Path) -> None:
    table, output = toy_table(tmp_path / "table", 4), open_storage(tmp_path / "out")
    view = View(threshold=0.5, drop=("sky",), rename={"grass": "lawn"}).of(TOYWORLD)
    export(table, output, view=view)
    read = read_png(str(tmp_path / "out"))
    assert "lawn" in read.ontology.names and "sky" not in read.ontology.names
    assert any((sample.labels == 255).mean() > 0.4 for sample in read.samples)
    with pytest.raises(MaskMillError, match="view") as caught:
        export(table, output)
    assert caught.value.code == "output_differs"


def test_only_the_export_itself_is_deleted(tmp_path: Path) -> None:
    table, output = toy_table(tmp_path / "table", 6), open_storage(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(MaskMillError) as caught:
        export(table, output)
    assert caught.value.code == "output_not_ours"
    (tmp_path / "out" / "mine.txt").unlink()
    export(table, output)
    (tmp_path / "out" / "masks" / "mine.txt").write_text("mine")
    delete_export(output)
    assert output.list(recursive=True) == ["masks/mine.txt"] and find_export(output) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_and_mask_lie_alike_whatever_the_orientation(tmp_path: Path, orientation: int) -> None:
    """The exported image, read without heeding EXIF, is the one that was labelled."""
    table = toy_table(tmp_path / "table", 4)
    y, x = np.mgrid[:40, :60]
    picture = np.stack([4 * x, 6 * y, x + y], -1).astype(np.uint8)
    for kind in ("JPEG", "PNG", "TIFF"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        Image.fromarray(picture).save(file, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
        path = tmp_path / f"{kind}.{kind.lower().replace('jpeg', 'jpg')}"
        path.write_bytes(file.getvalue())
        upright = decode(file.getvalue())
        labels = (upright[..., 1] // 128).astype(np.uint8)
        row = ok_row(
            id=stable_id(str(path)), uri=str(path), sha256=hashlib.sha256(file.getvalue()).digest(),
            height=labels.shape[0], width=labels.shape[1], labels=labels, confidence=labels,
            ignore_index=255,
        )  # fmt: skip
        write_rows(table, pa.Table.from_pylist([row], schema=LABEL_SCHEMA))
    export(table, open_storage(tmp_path / "out"), with_images=True)
    found = [sample for sample in read_png(str(tmp_path / "out")).samples]
    assert len(found) == 3
    for sample in found:
        with Image.open(sample.uri) as image:
            assert image.getexif().get(0x0112, 1) == 1
            pixels = np.asarray(image.convert("RGB")).astype(int)
        assert pixels.shape[:2] == sample.labels.shape
        assert ((pixels[..., 1] >= 128) == sample.labels).mean() > 0.97


@pytest.mark.slow
def test_an_export_on_s3_is_the_same(tmp_path: Path, bucket: str) -> None:
    remote = toy_table(f"{bucket}/table", 4, images=f"{bucket}/images")
    output = open_storage(f"{bucket}/out")
    record, _ = export(remote, output, with_images=True)
    assert record.images == {"train": 3}
    local = toy_table(tmp_path / "table", 4, images=tmp_path / "images")
    export(local, open_storage(tmp_path / "out"), with_images=True)
    here, there = files_of(open_storage(tmp_path / "out")), files_of(output)
    pictures = [name for name in here if name.endswith(".png")]
    assert len(pictures) == 6 and {name: here[name] for name in pictures} == {
        name: there[name] for name in pictures
    }
    assert len(list(read_png(f"{bucket}/out").samples)) == 3
    assert export(remote, output, with_images=True)[1] == []
    delete_export(output)
    assert output.list(recursive=True) == []


def test_a_damaged_mask_and_a_damaged_mark_are_told(tmp_path: Path) -> None:
    table, output = toy_table(tmp_path / "table", 4), open_storage(tmp_path / "out")
    export(table, output)
    output.write_bytes(".maskmill/parts/00000.jsonl", b"{")
    with pytest.raises(MaskMillError) as caught:
        export(table, output)
    assert caught.value.code == "file_damaged"
    output.delete(".maskmill/parts/00000.jsonl")
    assert export(table, output)[0].images == {"train": 3}
    assert json.loads(output.read_bytes("export.json"))["complete"]


def test_images_within_a_larger_file_need_the_manifest(tmp_path: Path) -> None:
    whole = tmp_path / "shard.tar"
    toy = toy_table(tmp_path / "toy", 3, images=tmp_path / "images")
    rows, ranges = [], []
    for row in [row for row in iter_rows(toy) if row["status"] == OK]:
        data = Path(row["uri"]).read_bytes()
        start = whole.stat().st_size if whole.exists() else 0
        with whole.open("ab") as file:
            file.write(data)
        row |= {"uri": str(whole), "id": stable_id(str(whole), offset=start, length=len(data))}
        rows.append(row)
        ranges.append({"id": row["id"], "uri": str(whole), "offset": start, "length": len(data)})
    table = open_storage(tmp_path / "table")
    write_rows(table, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA))
    table.write_bytes("dataset.json", toy.read_bytes("dataset.json"))

    record, _ = export(table, open_storage(tmp_path / "without"), with_images=True)
    assert record.left_out == {"not_a_file": 2}
    manifest = Images(pa.Table.from_pylist(ranges))
    record, _ = export(table, open_storage(tmp_path / "with"), with_images=True, images=manifest)
    assert record.images == {"train": 2}
    for sample in read_png(str(tmp_path / "with")).samples:
        assert sample.name.startswith("shard.tar-") and sample.uri.endswith(".png")
        assert decode(Path(sample.uri).read_bytes()).shape[:2] == (48, 48)


@pytest.mark.parametrize("name", ["../theirs", "/theirs", "", "."])
@pytest.mark.parametrize("place", ["mark", "finished"])
def test_what_an_export_deletes_is_inside_it(tmp_path: Path, place: str, name: str) -> None:
    table, output = toy_table(tmp_path / "table", 3), open_storage(tmp_path / "out")
    (tmp_path / "theirs").write_text("theirs")
    export(table, output)
    if place == "mark":
        path = next((tmp_path / "out/.maskmill/parts").iterdir())
        head, *lines = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps(json.loads(head) | {"files": [name]}), *lines, ""]))
    else:
        (tmp_path / "out/.maskmill/finished.json").write_text(json.dumps([name]))
    before = files_of(output)
    for act in (lambda: export(table, output), lambda: delete_export(output)):
        with pytest.raises(MaskMillError) as caught:
            act()
        assert caught.value.code == "file_damaged"
        assert files_of(output).keys() == before.keys() and (tmp_path / "theirs").exists()
    with pytest.raises(ValueError, match="not a name inside"):
        output.delete("../theirs")
