"""The notebook in ``examples/`` runs as it is, offline, and its committed outputs are those of a run."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from jobs.train import run

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def _pictures(notebook: nbformat.NotebookNode) -> int:
    return sum(
        any(kind.startswith("image/") for kind in output.get("data", {}))
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )


def _printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream"
    )


def _expect_good_labels(said: str) -> None:
    found = re.search(r"mIoU of the labels: (\d+\.\d) %", said)
    assert found and float(found[1]) > 45, said  # chance is below 5 %


@pytest.mark.slow
@pytest.mark.cluster
def test_the_cells_of_the_quickstart_run(
    shared_ray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, on a cluster that is there already; the training is short, and does not use it."""
    monkeypatch.setenv("RAY_ADDRESS", shared_ray)
    monkeypatch.setattr(run, "joins_cluster", lambda _address: False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert sum("iterations=60" in source for source in cells) == 1
    names: dict[str, Any] = {}
    for source in cells:
        exec(source.replace("iterations=60", "iterations=10"), names)
    assert names["status"] == 0
    _expect_good_labels(capsys.readouterr().out)


@pytest.mark.long
@pytest.mark.cluster
def test_the_quickstart_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "examples")}}
    ).execute()
    assert _pictures(notebook) == 4
    _expect_good_labels(_printed(notebook))


def test_the_committed_outputs_are_small_and_name_no_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    text = NOTEBOOK.read_text()
    assert len(text) < 200_000 and _pictures(notebook) == 4
    assert not re.search(r"/(home|root|Users)/|file:///|Traceback", text)
    assert all(cell.get("execution_count") for cell in notebook.cells if cell.cell_type == "code")
