"""Labelling photographs with a helper tower, through the command line and on Ray."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from models.helper import find_helper, load_helper
from pipeline.table.labels import iter_rows
from pipeline.table.record import read_table_record

ROOT = Path(__file__).resolve().parents[2]
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "voc2012_subset" / "JPEGImages"
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(
        not PHOTOGRAPHS.is_dir(), reason="the VOC subset is not on this machine (shared/data)"
    ),
]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("head", ["proxy", pytest.param("lposs", marks=pytest.mark.long)])
def test_photographs_are_labelled_with_a_helper_from_a_file(
    maskmill_joined: Run, tmp_path: Path, head: str
) -> None:
    """Random weights of the helper, in a file; that they are not learned shows in the labels only."""
    photographs = sorted(PHOTOGRAPHS.glob("*.jpg"))[:20]
    listing, weights, output = tmp_path / "list.txt", tmp_path / "helper.safetensors", tmp_path / "table"
    listing.write_text("".join(f"{path}\n" for path in photographs))
    helper = find_helper("test_vit", "random:0")
    save_file(load_helper(helper).tower.state_dict(), weights)
    command = [
        "label", "--images", listing, "--output", output, "--recipe", "toy", "--classes", "grass, sky, wood",
        "--set", f"head={head}", "--set", "helper=test_vit", "--set", f"helper_weights={weights}",
    ]  # fmt: skip
    done = maskmill_joined(*command)
    assert done.returncode == 0, done.stderr
    rows = list(iter_rows(output))
    assert sorted(row["uri"] for row in rows) == [str(path) for path in photographs]
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        mask = np.asarray(Image.open(io.BytesIO(row["mask"]["bytes"])))
        assert mask.shape == (row["height"], row["width"])
    recorded = read_table_record(str(output)).weights["helper"]
    assert recorded["model"] == "test_vit" and len(recorded["fingerprint"]) == 64

    before = {path: path.read_bytes() for path in output.rglob("*.parquet")}
    again = maskmill_joined(*command)
    assert again.returncode == 0 and "Nothing new" in again.stderr, again.stderr
    assert {path: path.read_bytes() for path in output.rglob("*.parquet")} == before
