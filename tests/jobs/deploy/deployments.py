"""Programs that run deployments, and cannot be installed beside MaskMill; see requirements-deploy.txt."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("foreign.py")


def run_deployer(name: str, *arguments: str, home: Path | None = None) -> Any:
    """What a function of ``foreign.py`` returns; the test is skipped without the programs.

    Args:
        name: of the function.
        arguments: its own.
        home: folder for what the programs write beside their work.
    """
    python = Path(os.environ.get("MASKMILL_DEPLOY", ROOT / ".deploy/bin/python"))
    if not python.exists():
        pytest.skip("needs the programs of requirements-deploy.txt")
    done = subprocess.run(
        [python, SCRIPT, name, *arguments],
        env=os.environ | ({"AIRFLOW_HOME": str(home)} if home else {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
