"""What must stay light to import. The direction of imports is checked by import-linter: see ``make lint``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        pytest.param(
            "jobs.cli, jobs.label, jobs.show, pipeline.labelling.recipes, pipeline.corpus.manifest, "
            "pipeline.ontology.ontology, pipeline.table.labels",
            {"torch", "ray", "open_clip", "mlflow"},
            id="a run with nothing to do",
        ),
        pytest.param("pipeline.labelling.flow", {"torch"}, id="processes that decode"),
        pytest.param(
            "pipeline.ontology.ontology, pipeline.corpus.manifest, pipeline.table.labels",
            {"torch", "ray", "scipy", "cv2", "matplotlib", "pandas"},
            id="what checks the arguments",
        ),
    ],
)
def test_heavy_libraries_are_not_loaded_by(modules: str, heavy: set[str]) -> None:
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
