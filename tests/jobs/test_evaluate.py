"""``maskmill evaluate`` from the command line: a recipe, a label table, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.metrics.confusion import confusion_matrix, mean_iou
from pipeline.retraining.measured import read_measured
from pipeline.table.labels import decode_mask, iter_rows
from pipeline.toyworld import scenes as toyworld

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 scenes with their truth, as images and masks."""
    root = tmp_path_factory.mktemp("scenes")
    made = toyworld.generate(21, 24, 96)
    for folder, arrays in (("images", made.images), ("truth", made.labels)):
        (root / folder).mkdir()
        for index, array in enumerate(arrays):
            Image.fromarray(array).save(root / folder / f"s{index:02d}.png")
    return root


@pytest.fixture(scope="module")
def table(scenes: Path, maskmill_joined, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "table"
    done = maskmill_joined(
        "label", "--images", scenes / "images", "--ontology", "toyworld", "--recipe", "toy",
        "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return output


def test_a_label_table_is_measured_against_masks_and_tracked(
    table: Path, scenes: Path, maskmill_joined, tmp_path: Path
) -> None:
    done = maskmill_joined(
        "evaluate", "--labels", table, "--images", scenes / "images", "--truth", scenes / "truth",
        "--output", tmp_path / "out", "--tracking", f"sqlite:///{tmp_path}/runs.db",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out/evaluation.json").read_text())
    total = np.zeros((14, 15), np.int64)
    for row in iter_rows(str(table)):
        truth = np.asarray(Image.open(scenes / "truth" / Path(row["uri"]).name))
        total += confusion_matrix(truth, decode_mask(row["mask"]["bytes"]), 14)
    assert record["confusion"] == total.tolist()
    assert record["metrics"]["miou"] == pytest.approx(mean_iou(total))
    assert record["images"]["evaluated"] == 24 and len(record["images"]["worst"]) == 6
    assert all((tmp_path / "out" / entry["picture"]).exists() for entry in record["images"]["best"])
    assert record["model"]["toy"] and record["protocol"] == "custom" and not record["published"]
    assert "Tracked: run" in done.stderr

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs.db")
    (run,) = client.search_runs([client.get_experiment_by_name("maskmill-evaluate").experiment_id])
    assert run.data.metrics["miou"] == pytest.approx(record["metrics"]["miou"])
    assert run.data.params["recipe.maskclip.head"] == "value"
    folder = f"{scenes.name}/images"
    assert run.info.run_name == f"evaluate {table.parent.name}/table, toy (toyclip) on {folder}"

    attached = {entry.path for entry in client.list_artifacts(run.info.run_id, "result")}
    assert {"result/evaluation.json", "result/report.html", "result/pictures"} <= attached

    page = (tmp_path / "out/report.html").read_text()
    assert (tmp_path / "out/report.html").as_uri() in done.stderr.replace("\n", "")
    report = maskmill_joined("report", tmp_path / "out")  # ours: may be written over
    assert report.returncode == 0, report.stderr
    assert "ladybug" in page and "toy" in page


def test_a_recipe_labels_a_benchmark_first_and_the_same_command_does_not_overwrite(
    maskmill_joined, tmp_path: Path
) -> None:
    command = ["evaluate", "--dataset", "toyworld", "--split", "seed-31", "--recipe", "toy", "--limit", "6"]
    done = maskmill_joined(*command, "--output", tmp_path / "out", "--no-boundary")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert record["dataset"]["split"] == "seed-31" and record["images"]["evaluated"] == 6
    assert record["metrics"]["miou"] > 0.3 and record["metrics"]["boundary_miou"] is None
    measured = read_measured(tmp_path / "out", "candidate")
    assert measured.truth.sum(0).tolist() == [sum(row) for row in record["confusion"]]
    assert measured.has_truth and (measured.seconds_per_image or 0) > 0
    again = maskmill_joined(*command, "--output", tmp_path / "out")
    assert again.returncode == 2 and "output_exists" in again.stderr


@pytest.mark.long  # a student labels and is evaluated with such names in its own test
def test_a_recipe_labels_images_of_odd_names(maskmill_joined, tmp_path: Path) -> None:
    made = toyworld.generate(22, 5, 64)
    names = ("new\nline", "#comment", " leading", "%41", "a,b")
    for folder, arrays in (("images", made.images), ("masks", made.labels)):
        (tmp_path / folder).mkdir()
        for name, array in zip(names, arrays, strict=True):
            Image.fromarray(array).save(tmp_path / folder / f"{name}.png")
    done = maskmill_joined(
        "evaluate", "--dataset", "pairs", "--root", tmp_path, "--ontology", "toyworld", "--recipe", "toy",
        "--output", tmp_path / "out", "--no-boundary",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["images"]["evaluated"] == len(names)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "toyworld"], "either --labels or --recipe"),
        (["--recipe", "toy"], "either --dataset or --images"),
        (["--recipe", "toy", "--images", "x"], "--images needs --truth"),
        (["--recipe", "toy", "--dataset", "voc02"], "Did you mean voc2"),
        (["--recipe", "toy", "--dataset", "voc20", "--root", "/nowhere"], "dataset_missing"),
        (["--labels", "/nowhere", "--dataset", "toyworld"], "input_missing"),
        (["--labels", "/nowhere", "--dataset", "toyworld", "--set", "head=plain"], "--set changes a recipe"),
        (["--recipe", "toy", "--dataset", "toyworld", "--limit", "-1"], "--limit -1"),
        (["--recipe", "toy", "--dataset", "toyworld", "--protocol", "seed"], "name_unknown"),
        (["--recipe", "toy", "--dataset", "phrasecut"], "clipseg-referring"),
        (["--recipe", "toy", "--dataset", "toyworld", "--tracking", "/a/folder"], "wrong_use"),
    ],
)
def test_wrong_use_is_told_before_work_starts(maskmill_here, tmp_path: Path, arguments, words: str) -> None:
    done = maskmill_here("evaluate", *arguments, "--output", tmp_path / "out")
    assert done.returncode == 2 and words in done.stderr
    assert not (tmp_path / "out").exists()


def test_labels_of_another_protocol_are_not_called_by_its_name(
    table: Path, maskmill_here, tmp_path: Path
) -> None:
    done = maskmill_here(
        "evaluate", "--labels", table, "--dataset", "toyworld", "--protocol", "seed",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 2 and ("name_unknown" in done.stderr or "image_invalid" in done.stderr)
