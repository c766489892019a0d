"""What ``maskmill retrain`` decides before a tick begins, and how it stops; no model runs here."""

from __future__ import annotations

import io
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from jobs.retrain.command import Retrain, retrain
from jobs.retrain.work import step_names
from models.errors import FailedWork, MaskMillError
from pipeline.files.storage import open_storage
from pipeline.retraining.config import example, read_config
from pipeline.retraining.intake import EXCLUDED_FILE, NEW_FILE, ids_of, read_images, write_images
from pipeline.retraining.state import StepState, Tick, read_tick, write_tick


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photographs, one of them a copy of the image with truth."""
    for place in ("photos", "test/images", "test/masks"):
        (tmp_path / place).mkdir(parents=True)
    for index, name in enumerate(("photos/a.png", "photos/b.png", "test/images/t.png")):
        Image.fromarray(np.full((6, 6, 3), 40 * index, np.uint8)).save(tmp_path / name)
    shutil.copy(tmp_path / "test/images/t.png", tmp_path / "photos/copy.png")
    Image.fromarray(np.zeros((6, 6), np.uint8)).save(tmp_path / "test/masks/t.png")
    return tmp_path


def run(folder: Path, *, abandon: bool = False, step: str | None = None, **changes: Any) -> tuple[int, str]:
    written = {
        "name": "pets",
        "output": "out",
        "images": "photos",
        "classes": "cat",
        "tracking": "sqlite:///runs.db",
        "label": {"recipe": "toy"},
        "models": [{"kind": "maskclip-plus", "recipe": "toy"}],
        "evaluation": {"images": "test/images", "truth": "test/masks"},
    }
    (folder / "retrain.yaml").write_text(yaml.safe_dump(written | changes))
    said = io.StringIO()
    console = Console(file=said, width=200)
    config = read_config(folder / "retrain.yaml")
    return retrain(config, console, abandon=abandon, step=step), said.getvalue()


def test_too_few_new_images_leave_nothing(folder: Path) -> None:
    status, said = run(folder, when={"min_new": 4})
    assert status == 0 and "3 new images, and a tick waits for 4" in said
    assert not (folder / "out").exists()


def test_copies_of_evaluation_images_do_not_count(folder: Path) -> None:
    status, said = run(folder, when={"min_new": 3})
    assert status == 0 and "2 new images, and a tick waits for 3" in said and "copy.png" in said
    found = read_images(open_storage(folder / "out"), EXCLUDED_FILE)
    assert [Path(uri).name for uri in found["uri"].to_pylist()] == ["copy.png"]
    # It is not read again.
    (folder / "photos/copy.png").chmod(0)
    _, said = run(folder, when={"min_new": 3})
    assert "2 new images, and a tick waits for 3" in said and "copy.png" not in said


def tick(folder: Path, **changes: Any) -> Tick:
    """An output with a tick that took one of the photographs in."""
    storage = open_storage(folder / "out")
    (folder / "out").mkdir(exist_ok=True)
    made = Tick(run="0001", created="2026-01-01T00:00:00Z").model_copy(update=changes)
    write_tick(storage, made)
    from pipeline.corpus.manifest import build_manifest

    write_images(storage, f"runs/0001/{NEW_FILE}", build_manifest(str(folder / "photos/a.png")))
    record = {
        "id": "0123456789abcdef",
        "name": "pets",
        "created": "2026-01-01T00:00:00Z",
        "models": [{"name": "pets", "kind": "maskclip-plus"}],
        "tracking": "sqlite:///runs.db",
    }
    fixed = {
        "name": "pets",
        "label.by": "teacher",
        "models.student.kind": "maskclip-plus",
        "models.student.registered": "pets",
    }
    storage.write_json("retraining.json", record | {"fixed": fixed})
    return made


def test_images_of_a_tick_with_an_outcome_are_not_new_even_if_it_was_refused(folder: Path) -> None:
    tick(folder, outcome="refused", finished="2026-01-02T00:00:00Z")
    shutil.rmtree(folder / "photos")
    (folder / "photos").mkdir()
    Image.fromarray(np.zeros((6, 6, 3), np.uint8)).save(folder / "photos/a.png")
    status, said = run(folder, when={"max_age": 0.001})
    assert status == 0 and "Nothing to do for pets: no new images." in said


def test_a_tick_can_be_given_up_and_its_images_are_new_again(folder: Path) -> None:
    tick(folder, steps=(StepState(name="train student", state="failed"),))
    status, said = run(folder, abandon=True)
    assert status == 0 and "Tick 0001 is given up" in said
    found = read_tick(open_storage(folder / "out"), "0001")
    assert found.outcome == "abandoned" and found.finished
    assert "There is no unfinished tick." in run(folder, abandon=True)[1]
    _, said = run(folder, when={"min_new": 4})
    assert "3 new images" in said
    assert len(ids_of(read_images(open_storage(folder / "out"), f"runs/0001/{NEW_FILE}"))) == 1


def test_a_verdict_cannot_be_given_up(folder: Path) -> None:
    tick(folder, steps=(StepState(name="promote student", state="done", outputs={"kind": "promoted"}),))
    with pytest.raises(MaskMillError, match="has its verdict already") as caught:
        run(folder, abandon=True)
    assert "maskmill rollback" in caught.value.remedy


def test_the_intake_alone_begins_a_tick_and_no_other_step_does(folder: Path, registry_database: str) -> None:
    shutil.copy(registry_database.removeprefix("sqlite:///"), folder / "runs.db")
    with pytest.raises(MaskMillError, match="no unfinished tick whose step verify"):
        run(folder, step="verify")
    with pytest.raises(MaskMillError, match=r"There is no step lable. Did you mean label\?") as caught:
        run(folder, step="lable")
    assert "train student, evaluate student" in caught.value.remedy and not (folder / "out").exists()
    for _ in range(2):  # nothing is done twice
        status, said = run(folder, step="intake")
        assert status == 0 and "Step intake is done. Next: --step label" in said
    found = read_tick(open_storage(folder / "out"), "0001")
    assert [step.name for step in found.steps] == step_names(read_config(folder / "retrain.yaml"))
    assert (found.step("intake").attempts, found.step("label").attempts, found.images) == (1, 0, 2)
    with pytest.raises(MaskMillError, match="Step label of tick 0001 comes before step gate student"):
        run(folder, step="gate student")


def test_with_a_share_held_out_copies_of_its_images_are_not_trained_on(folder: Path) -> None:
    """Whatever is held out: one of the three contents, which here has a copy too."""
    for name in ("a", "b"):
        shutil.copy(folder / f"photos/{name}.png", folder / f"photos/{name}-again.png")
    shutil.copy(folder / "photos/copy.png", folder / "photos/copy-again.png")
    status, said = run(folder, evaluation={"hold_out": 0.01}, when={"min_new": 6})
    assert status == 0 and "4 new images, and a tick waits for 6" in said
    assert "1 left out as copies of evaluation images" in said and "1 held out to measure on" in said


@pytest.mark.parametrize("entry", ["table/labels/part-1.parquet", "ledger/000001.json", "corpus.parquet"])
def test_files_of_others_are_left_alone(folder: Path, entry: str) -> None:
    place = folder / "out" / entry
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    with pytest.raises(MaskMillError) as caught:
        run(folder)
    assert caught.value.code == "output_not_ours" and place.read_text() == "mine"
    assert {path for path in (folder / "out").rglob("*") if path.is_file()} == {place}


def test_another_retraining_cannot_have_the_output(folder: Path) -> None:
    tick(folder, outcome="promoted", finished="2026-01-02T00:00:00Z")
    with pytest.raises(MaskMillError, match="name: pets there, dogs here") as caught:
        run(folder, name="dogs")
    assert caught.value.code == "output_differs"


def test_init_writes_the_example(tmp_path: Path) -> None:
    said = io.StringIO()
    file = tmp_path / "mine.yaml"
    assert Retrain(config=str(file), init=True).run(Console(file=said, width=200)) == 0
    assert file.read_text() == example() and f"maskmill retrain {file}" in said.getvalue()


def test_a_run_that_is_out_of_time_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jobs.retrain.steps

    monkeypatch.setattr(jobs.retrain.steps, "open_run", lambda _work: time.sleep(120))
    began = time.monotonic()
    with pytest.raises(FailedWork) as caught:
        run(folder, when={"budget": {"hours": 1 / 3600}})
    assert caught.value.code == "budget_spent" and time.monotonic() - began < 100
    assert read_tick(open_storage(folder / "out"), "0001").outcome is None
