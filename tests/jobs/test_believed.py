"""A table of truth for some pixels over a table of labels, in export and evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.files.storage import open_storage
from pipeline.labelling.recipes import RECIPES
from pipeline.table.labels import decode_mask, iter_rows
from pipeline.table.record import read_table_record, write_table_record
from tests.pipeline.review.reviews import IGNORED, make_reviewed, truth_of


@pytest.fixture
def folder(tmp_path: Path, maskmill_here: Callable[..., Any]) -> Path:
    """Four images; of two of them, the right halves are known."""
    folder = make_reviewed(tmp_path, [0.5, 0.3, 0.6, 0.4])
    record = read_table_record(str(folder / "table"))
    record = record.model_copy(update={"recipe": RECIPES["toy"].to_dict()})
    write_table_record(open_storage(folder / "table"), record)
    (folder / "halves").mkdir()
    (folder / "some.txt").write_text("scene_000_0\nscene_002_0\n")
    for number in (0, 2):
        half = truth_of(folder, number).copy()
        half[:, :24] = IGNORED
        Image.fromarray(half).save(folder / "halves" / f"scene_{number:03d}_0.png")
    done = maskmill_here(
        "import", "--images", folder / "images", "--truth", folder / "halves", "--ontology", "toyworld",
        "--split", folder / "some.txt", "--output", folder / "known",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def masks_of(table: Path) -> dict[str, np.ndarray]:
    return {Path(row["uri"]).stem: decode_mask(row["mask"]["bytes"]) for row in iter_rows(str(table))}


@pytest.mark.slow
def test_what_is_known_is_exported_and_measured(folder: Path, maskmill_here: Callable[..., Any]) -> None:
    known = ("--known", folder / "known")
    export = ("export", folder / "table", "--format", "png", "--output", folder / "png")
    done = maskmill_here(*export, *known)
    assert done.returncode == 0 and "With 2 known label maps from" in done.stderr, done.stderr
    before = masks_of(folder / "table")
    for number in range(4):
        name = f"scene_{number:03d}_0"
        labels = np.asarray(Image.open(folder / "png" / "masks" / f"{name}.png"))
        np.testing.assert_array_equal(labels[:, :24], before[name][:, :24])
        right = truth_of(folder, number) if number in (0, 2) else before[name]
        np.testing.assert_array_equal(labels[:, 24:], right[:, 24:])
    again = maskmill_here(*export)
    assert again.returncode == 2 and "known labels" in again.stderr, again.stderr

    def measured(*options: object) -> dict[str, Any]:
        done = maskmill_here(
            "evaluate", "--images", folder / "images", "--truth", folder / "truth", "--overwrite",
            "--output", folder / "out", "--workers", 0, *options,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads((folder / "out/evaluation.json").read_text())

    found = measured("--labels", folder / "table", *known)
    assert ", 2 with known labels on" in found["title"]
    done = maskmill_here("import", "--format", "png", "--input", folder / "png", "--output", folder / "both")
    assert done.returncode == 0, done.stderr
    assert found["confusion"] == measured("--labels", folder / "both")["confusion"]
    assert found["metrics"]["miou"] > measured("--labels", folder / "table")["metrics"]["miou"]


def test_what_contradicts_itself_is_refused(folder: Path, maskmill_here: Callable[..., Any]) -> None:
    export = ("export", folder / "table", "--format", "png", "--output", folder / "png")
    for options, says in (
        (("--known-view", "sure"), "--known-view is for --known"),
        (("--known", folder / "known", "--corrections", folder / "known"), "both believed"),
        (("--known", folder / "nowhere"), "no dataset.json"),
    ):
        done = maskmill_here(*export, *options)
        assert done.returncode == 2 and says in done.stderr, done.stderr
    assert not (folder / "png").exists()
