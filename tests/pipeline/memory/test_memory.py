"""A memory built from a table of the toy world, in this process: what is in it, resuming, growing, damage."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from jobs.memory import BuildMemory, ShowMemory
from models.errors import MaskMillError
from models.memory import centred, exact_search
from models.regions import cell_labels, components, means
from pipeline.files.records import now
from pipeline.files.storage import Storage, open_storage
from pipeline.labelling.maskclip import MaskClipLabeller
from pipeline.labelling.prepare import prepare_labeller
from pipeline.labelling.recipes import RECIPES, LabelRecipe, change_recipe
from pipeline.memory import build as building
from pipeline.memory.index import import_faiss, load_memory
from pipeline.memory.parts import part_file, read_part
from pipeline.memory.record import MemoryRecord, read_memory_record
from pipeline.ontology.reading import load_ontology
from pipeline.table.committed import write_part
from pipeline.table.labels import LABEL_SCHEMA, failed_row, ok_row
from pipeline.table.record import TableRecord, write_table_record
from pipeline.toyworld.scenes import generate

TOYWORLD = load_ontology("toyworld")
RECIPE: LabelRecipe = change_recipe(RECIPES["toy"], {"precision": "fp32"})


@pytest.fixture(scope="module")
def labeller() -> MaskClipLabeller:
    made = prepare_labeller(RECIPE, TOYWORLD).make.keywords  # type: ignore[attr-defined]
    prepared = prepare_labeller(RECIPE, TOYWORLD)
    return MaskClipLabeller(prepared.settings, **{**made, "key_block": 0})


def add_rows(table: Storage, folder: Path, labeller: MaskClipLabeller, numbers: range) -> None:
    """A file of the table; one row of it failed."""
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = [failed_row(id=1000 + numbers[0], uri="gone", status="not_found", error="x")]
    for number, scene in zip(numbers, generate(9, len(numbers), 128, start=numbers[0]).images, strict=True):
        path = folder / f"{number}.png"
        Image.fromarray(scene).save(path)
        found = labeller.label([scene], [(128, 128)])[0]
        digest = hashlib.sha256(path.read_bytes()).digest()
        rows.append(
            ok_row(
                id=number,
                uri=str(path),
                sha256=digest,
                height=128,
                width=128,
                labels=found.labels,
                confidence=found.confidence,
                ignore_index=255,
            )
        )
    write_part(table, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA))


@pytest.fixture
def table(tmp_path: Path, labeller: MaskClipLabeller, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(building, "FILES_A_PART", 1)
    made = open_storage(str(tmp_path / "table"))
    weights = prepare_labeller(RECIPE, TOYWORLD).weights
    record = TableRecord(
        created=now(), ontology=TOYWORLD, recipe=RECIPE.to_dict(), weights=weights, precision="fp32"
    )
    write_table_record(made, record)
    for numbers in (range(3), range(3, 5)):
        add_rows(made, tmp_path / "images", labeller, numbers)
    return made


def build(table: Storage, **options: Any) -> MemoryRecord:
    output = str(Path(table.path()).parent / "memory")
    options = {"regions": "labels", "workers": 0, **options}
    assert BuildMemory(table=table.path(), output=output, **options).run() == 0
    return read_memory_record(open_storage(output))


def memory_of(table: Storage) -> Storage:
    return open_storage(str(Path(table.path()).parent / "memory"))


def contents(storage: Storage) -> dict[str, bytes]:
    root = Path(storage.path())
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ("parts" in path.parts or path.name == "memory.json")
    }


def test_it_holds_the_regions_of_every_image_once(table: Storage, labeller: MaskClipLabeller) -> None:
    record = build(table)
    assert record.images == 5 and record.key_block == 0 and len(record.parts) == 2
    assert [part.left_out for part in record.parts] == [{"not_found": 1}] * 2
    parts = [read_part(memory_of(table), part, record) for part in record.parts]
    ids = torch.cat([part.images for part in parts])
    assert sorted(set(ids.tolist())) == list(range(5))
    scene = generate(9, 5, 128).images[4]
    seen, _ = labeller.describe(scene)
    mask = labeller.label([scene], [(128, 128)])[0].labels
    regions = components(cell_labels(mask, (16, 16), 255))
    keys = torch.cat([part.keys for part in parts])[ids == 4]
    values = torch.cat([part.values for part in parts])[ids == 4]
    assert torch.equal(keys, means(seen.keys[0].float(), regions).half())
    assert torch.equal(values, F.normalize(means(seen.features[0].float(), regions), dim=1).half())


def test_a_run_goes_on_where_it_stopped_and_grows(
    table: Storage, labeller: MaskClipLabeller, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(table)
    before = contents(memory_of(table))
    # Killed before the second part had its mark, and before the record was written.
    storage, second = memory_of(table), whole.parts[1].name
    storage.delete("memory.json")
    storage.delete(f"parts/{second}.json")
    made: list[str] = []
    real = building.write_part_file

    def noted(place: Storage, data: bytes, mark: Any) -> None:
        made.append(mark.part.name)
        real(place, data, mark)

    monkeypatch.setattr(building, "write_part_file", noted)
    with pytest.raises(MaskMillError, match=r"not finished|no memory"):
        load_memory(storage.path(), torch.device("cpu"))
    build(table)
    after = contents(storage)
    del before["memory.json"], after["memory.json"]  # they say when
    assert after == before and made == [second]
    fingerprint = read_memory_record(storage).fingerprint
    assert fingerprint == whole.fingerprint
    build(table)
    assert made == [second], "nothing is new"
    add_rows(table, Path(table.path()).parent / "images", labeller, range(5, 7))
    grown = build(table)
    assert len(made) == 2 and grown.images == 7 and grown.fingerprint != fingerprint
    # What is no longer in the table goes.
    files = sorted(Path(table.path()).glob("labels/*.parquet"))
    files[0].unlink()
    assert build(table).images < 7 and len(made) == 2


def test_images_that_changed_are_left_out(table: Storage) -> None:
    image = Path(table.path()).parent / "images" / "0.png"
    Image.fromarray(np.zeros((128, 128, 3), np.uint8)).save(image)
    (image.parent / "1.png").unlink()
    record = build(table)
    left_out = [part.left_out for part in record.parts]
    assert {"not_found": 2, "image_changed": 1} in left_out and record.images == 3


def test_damage_and_other_memories_are_told(table: Storage) -> None:
    record = build(table)
    storage = memory_of(table)
    with pytest.raises(MaskMillError) as caught:
        build(table, regions="clusters")
    assert caught.value.code == "output_differs"
    assert build(table, regions="clusters", overwrite=True).fingerprint != record.fingerprint
    assert ShowMemory(memory=storage.path()).run() == 0
    name = read_memory_record(storage).parts[0].name
    data = bytearray(storage.read_bytes(part_file(name)))
    data[-1] ^= 1
    storage.write_bytes(part_file(name), bytes(data))
    with pytest.raises(MaskMillError) as caught:
        ShowMemory(memory=storage.path()).run()
    assert caught.value.code == "file_damaged"
    storage.write_bytes("memory.json", b'{"regions": "squares"}')
    with pytest.raises(MaskMillError) as caught:
        read_memory_record(storage)
    assert caught.value.code == "file_damaged"


def test_labelling_with_it(table: Storage, labeller: MaskClipLabeller) -> None:
    record = build(table)
    uri = memory_of(table).path()
    recipe = change_recipe(RECIPE, {"memory": uri, "memory_neighbours": 3})
    prepared = prepare_labeller(recipe, TOYWORLD)
    assert prepared.weights["memory"] == {"uri": memory_of(table).uri, "fingerprint": record.fingerprint}
    scene = generate(10, 1, 128).images[0]
    supported = prepared.build(threads=1).label([scene], [(128, 128)])[0]
    assert not np.array_equal(supported.confidence, labeller.label([scene], [(128, 128)])[0].confidence), (
        "the memory takes part"
    )
    other = change_recipe(RECIPE, {"memory": uri, "head": "maskclip"})
    with pytest.raises(MaskMillError) as caught:
        prepare_labeller(other, TOYWORLD)
    assert caught.value.code == "weights_do_not_fit"
    with pytest.raises(MaskMillError) as caught:
        prepare_labeller(change_recipe(RECIPE, {"memory": f"{uri}-not"}), TOYWORLD)
    assert caught.value.code == "input_missing"


def test_faiss_finds_what_exact_search_finds(table: Storage) -> None:
    pytest.importorskip("faiss")
    exact = build(table)
    keys = torch.cat([read_part(memory_of(table), part, exact).keys for part in exact.parts]).float()
    record = build(table, index="faiss")
    memory, _ = load_memory(memory_of(table).path(), torch.device("cpu"))
    assert record.index_sha256 and record.fingerprint != exact.fingerprint
    queries = centred(keys, memory.mean)
    wanted = exact_search(queries)(queries, 5)
    found = memory.search(queries, 5)
    recall = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(wanted.tolist(), found.tolist(), strict=True)])
    assert recall > 0.95
    memory_of(table).write_bytes("index.faiss", b"broken")
    with pytest.raises(MaskMillError) as caught:
        load_memory(memory_of(table).path(), torch.device("cpu"))
    assert caught.value.code == "file_damaged"


def test_without_faiss_it_is_told(table: Storage) -> None:
    try:
        import_faiss()
    except MaskMillError as error:
        assert error.code == "package_missing"
        with pytest.raises(MaskMillError):
            build(table, index="faiss")
