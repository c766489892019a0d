"""The rules of the house that a machine can check: which way imports flow, and what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cluster.session import WORKER_MALLOC

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {"models": {"ray", "mlflow", "pipeline", "jobs"}, "pipeline": {"jobs"}}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize(
    "path", [path for package in FORBIDDEN for path in sorted((ROOT / package).rglob("*.py"))], ids=str
)
def test_imports_flow_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert not FORBIDDEN[package] & set(_imports(path))


def test_a_run_with_nothing_to_do_loads_neither_torch_nor_ray() -> None:
    light = (
        "jobs.cli, jobs.label, jobs.show, pipeline.labelling.recipes, pipeline.corpus.manifest, "
        "pipeline.ontology.ontology, pipeline.table.labels"
    )
    code = f"import sys, {light}; print(sorted({{'torch', 'ray', 'open_clip', 'mlflow'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_decoding_workers_do_not_load_torch() -> None:
    code = "import sys, pipeline.labelling.flow; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_tests_keep_memory_as_the_job_does() -> None:
    (tunables,) = WORKER_MALLOC.values()
    makefile = (ROOT / "Makefile").read_text().splitlines()
    assert f"MALLOC = {tunables}" in makefile
