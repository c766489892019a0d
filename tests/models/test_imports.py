"""Importing our models changes nothing for others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import models.clip.loading
import open_clip
model = open_clip.create_model("ViT-B-16-SigLIP", pretrained=None)
print(type(model.visual).__name__)
"""


def test_open_clip_still_builds_what_our_code_cannot_use() -> None:
    """SigLIP's image tower is timm's; hiding timm while open_clip is imported made it fail."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "TimmModel"
