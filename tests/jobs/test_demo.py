from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from jobs import demo
from jobs.train import run
from models.errors import MaskMillError


@pytest.mark.cluster
@pytest.mark.slow
def test_demo_labels_trains_evaluates_and_shows(
    maskmill_joined: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "demo"
    small = ("--images", 16, "--test", 8, "--steps", 40)
    # Its steps join a cluster that is there already, instead of starting five. Trainings run in this process,
    # as they do without a cluster.
    monkeypatch.setattr(run, "joins_cluster", lambda _address: False)
    done = maskmill_joined("demo", "--output", output, *small)
    assert done.returncode == 0, done.stderr
    found = re.search(r"mIoU\W+(\d+\.\d)\W+(\d+\.\d)", done.stdout)
    # The teacher, which is not trained here; on six other sets of eight scenes 57 to 78. Chance is 7 %.
    assert found and float(found[1]) > 35, done.stdout
    page = output / "student" / "report.html"
    assert page.as_uri() in done.stdout and (output / "gallery.html").as_uri() in done.stdout
    text = page.read_text()
    # Image, truth, teacher and student of every scene with truth; and what each class gained.
    assert text.count("<figcaption>truth</figcaption>") == text.count("<figcaption>student</figcaption>") == 8
    assert "IoU of every class" in text
    with Image.open(output / "student" / "preview.png") as sheet:
        assert sheet.width > 1000
    # The first student was there before, and the second one was judged beside it.
    assert "toyworld version 1 is champion." in done.stdout
    verdict = (output / "retraining" / "runs" / "0002" / "report.html").read_text()
    assert "against champion version 1" in verdict
    assert f"maskmill rollback {output / 'retraining'}" in done.stdout


def test_the_demo_replaces_its_own_folder_only(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    demo.empty_folder(output)
    (output / "old.txt").write_text("from before")
    demo.empty_folder(output)
    assert [path.name for path in output.iterdir()] == [demo.MARKER]

    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(MaskMillError, match="was not made by the demo") as caught:
        demo.Demo(output=tmp_path).run()
    assert caught.value.code == "output_not_ours"
    assert (tmp_path / "thesis.txt").read_text() == "mine"
