from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LIGHT = """
import sys
import models.clip
assert "transformers" not in sys.modules, "imported with open_clip"
from models.openclip import open_clip, with_transformers
assert open_clip.hf_model.transformers is None

import transformers  # whoever wants it has it
with_transformers()
assert open_clip.hf_model.transformers is transformers
from transformers import RobertaConfig
tower = open_clip.model.HFTextEncoder(
    "roberta-base", 8, RobertaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=16, vocab_size=32, max_position_embeddings=16), proj_type="linear",
    pooler_type="mean_pooler", pretrained=False,
)
import torch
print(tuple(tower(torch.full((2, 4), 5)).shape))
"""
THEIRS_FIRST = """
import sys
import transformers
import models.clip
from models.openclip import open_clip, with_transformers
assert open_clip.hf_model.transformers is transformers
assert sys.modules["transformers"] is transformers
with_transformers()
print("kept")
"""


@pytest.mark.parametrize(("program", "says"), [(LIGHT, "(2, 8)"), (THEIRS_FIRST, "kept")])
def test_transformers_is_imported_for_those_who_want_it_only(program: str, says: str) -> None:
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == says
