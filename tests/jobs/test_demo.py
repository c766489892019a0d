from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_demo_labels_measures_and_shows(
    maskmill: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    output = tmp_path / "demo"
    done = maskmill("demo", "--output", output, "--images", 16)
    assert done.returncode == 0, done.stderr
    found = re.search(r"mIoU\W+(0\.\d+)", done.stdout)
    assert found and float(found[1]) > 0.45, done.stdout  # chance is below 0.05
    assert (output / "gallery.html").as_uri() in done.stdout
    assert len(list((output / "table" / "labels").glob("*.parquet"))) > 0
    with Image.open(output / "overview.png") as sheet:
        assert sheet.width > 1000
    # It makes its own folder anew, and no other one.
    assert maskmill("demo", "--output", output, "--images", 4).returncode == 0
    assert len(list((output / "images").iterdir())) == 4


def test_demo_leaves_other_folders_alone(
    maskmill: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    done = maskmill("demo", "--output", tmp_path)
    assert done.returncode == 2 and "was not made by the demo" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
