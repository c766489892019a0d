"""Programs of others that cannot be installed beside MaskMill; see requirements-readers.txt."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("foreign.py")


def run_reader(name: str, *arguments: str) -> Any:
    """What a function of ``foreign.py`` returns; the test is skipped without the programs."""
    python = Path(os.environ.get("MASKMILL_READERS", ROOT / ".readers/bin/python"))
    if not python.exists():
        pytest.skip("needs the programs of requirements-readers.txt")
    done = subprocess.run(
        [python, SCRIPT, name, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
