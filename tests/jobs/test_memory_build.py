"""``maskmill memory build`` in an object store, killed in the middle."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch

from benchmarks.faults.object_store import FaultyStore
from benchmarks.faults.runs import Command
from pipeline.files.storage import open_storage
from pipeline.labelling.prepare import prepare_labeller
from pipeline.labelling.recipes import RECIPES
from pipeline.memory.parts import read_part
from pipeline.memory.record import read_memory_record
from pipeline.ontology.reading import load_ontology
from pipeline.table.record import read_table_record, write_table_record
from tests.pipeline.formats.tables import toy_table

BUILD = ("memory", "build", "s3://mill/table", "--regions", "labels", "--workers", "0", "--output")
IMAGES = 17


@pytest.mark.slow
def test_a_killed_build_in_an_object_store_goes_on(
    tmp_path: Path, maskmill_here, maskmill_environment: dict[str, str], faulty_s3: FaultyStore, s3
) -> None:
    """A real SIGKILL, between the second part and the mark that finishes it."""
    fsspec.filesystem("s3").mkdir("mill")
    table = toy_table("s3://mill/table", IMAGES + 1, images="s3://mill/images", rows_a_part=1)
    recipe = RECIPES["toy"]
    made_by = {
        "recipe": recipe.to_dict(),
        "weights": prepare_labeller(recipe, load_ontology("toyworld")).weights,
    }
    write_table_record(table, read_table_record(table.uri).model_copy(update=made_by))
    written: list[str] = []

    def note(method: str, path: str) -> None:
        if method == "PUT" and "/mill/memory/parts/" in path:
            written.append(path.partition("?")[0].rpartition("/")[2])

    def kill(method: str, path: str) -> tuple[int, str] | None:
        note(method, path)
        if sum(name.endswith(".json") for name in written) < 2:
            return None
        run.driver.kill()
        return 503, "SlowDown"

    faulty_s3.fault = kill
    run = Command([*BUILD, "s3://mill/memory"], maskmill_environment | s3, tmp_path / "log.txt")
    assert run.wait() == -9, run.said
    finished, torn = written[0].partition(".")[0], written[2].partition(".")[0]
    assert written == [f"{name}.{end}" for name in (finished, torn) for end in ("safetensors", "json")]
    written.clear()
    faulty_s3.fault = note
    for output in ("memory", "whole"):
        done = maskmill_here(*BUILD, f"s3://mill/{output}", **s3)
        assert done.returncode == 0, done.stderr
    assert written[0] == f"{torn}.safetensors" and len(written) == 4, "the first part stays"

    there, whole = (open_storage(f"s3://mill/{output}") for output in ("memory", "whole"))
    record = read_memory_record(there)
    assert record.parts == read_memory_record(whole).parts and len(record.parts) == 3
    assert {name: there.read_bytes(name) for name in there.list("parts")} == {
        name: whole.read_bytes(name) for name in whole.list("parts")
    }
    images = [read_part(there, part, record).images.unique() for part in record.parts]
    assert record.images == len(torch.cat(images)) == len(torch.cat(images).unique()) == IMAGES
