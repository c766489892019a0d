from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.corpus.manifest import stable_id
from pipeline.evaluation.truth import find_truth
from tests.pipeline.formats.tables import TOYWORLD, add_rows, toy_table


def test_a_name_that_several_images_have_finds_no_mask(tmp_path: Path) -> None:
    table = toy_table(tmp_path / "table", 3)
    uris = ["/may/one.png", "/june/one.png", "/may/two.png", "/july/one.png", "/may/failed.png"]
    add_rows(table, uris, seed=1)
    (tmp_path / "truth").mkdir()
    for name in ("one", "two", "failed", "scene_001"):
        Image.fromarray(np.zeros((48, 48), np.uint8)).save(tmp_path / "truth" / f"{name}.png")
    truth = find_truth(str(tmp_path / "truth"), table, TOYWORLD)
    wanted = {stable_id(uri) for uri in ("/may/two.png", "/toy/scene_001.png")}
    assert set(truth.ids.tolist()) == wanted
    assert truth.only(np.array([stable_id("/may/two.png"), 5])).ids.tolist() == [stable_id("/may/two.png")]
