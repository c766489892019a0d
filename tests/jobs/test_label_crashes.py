"""Images that kill the process that decodes them become rows, by the whole command."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.faults.runs import HOOKS
from pipeline.files.storage import open_storage
from tests.pipeline.labelling.test_attempts import pictures, statuses

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_images_that_kill_the_decoder_become_rows(
    tmp_path: Path, maskmill: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    poisonous = (2, 11)
    pictures(tmp_path / "images", poisonous, 30)
    done = maskmill(
        "label", "--images", tmp_path / "images", "--ontology", "toyworld", "--recipe", "toy",
        "--output", tmp_path / "table", "--max-failure-rate", "0.5",
        PYTHONPATH=f"{HOOKS}{os.pathsep}{ROOT}", timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = list(statuses(open_storage(tmp_path / "table")).values())
    assert found.count("crashed_worker") == 2 and found.count("ok") == 28
    assert "2 crashed_worker" in done.stderr
    assert "infinite retries" not in done.stderr + done.stdout
