"""Importing our models changes nothing for others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import models.clip.loading
from open_clip.timm_model import TimmModel
print(type(TimmModel("test_vit", embed_dim=8)).__name__)
"""


@pytest.mark.slow
def test_open_clip_still_builds_what_our_code_cannot_use() -> None:
    """An image tower of timm, as SigLIP's is; hiding timm while open_clip is imported made it fail."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "TimmModel"
