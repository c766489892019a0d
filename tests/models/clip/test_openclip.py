from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

LIGHT = """
import sys
import models.clip.loading
assert "transformers" not in sys.modules, "imported with open_clip"
from models.clip.openclip import open_clip, with_the_rest
assert open_clip.hf_model.transformers is None

import transformers  # whoever wants it has it
with_the_rest()
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
LOADED = """
import sys
import torch
from models.clip.loading import load_clip
for name in ("RN50", "toyclip"):
    clip = load_clip(name, "random:0")
    clip.encode_text(["a cat"])
    clip.encode_image(torch.zeros(1, 3, 64, 64))
print([name for name in ("torch._dynamo", "sympy", "timm", "transformers") if name in sys.modules])
"""
COMPILER = """
import sys
import models.clip.loading
import torch
import torchvision
assert "torch._dynamo" not in sys.modules
torch.use_deterministic_algorithms(True)  # asks whether the compiler works here
boxes = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])]
ours = torchvision.ops.roi_align(torch.arange(64.0).reshape(1, 1, 8, 8), boxes, 2)
assert "torch._dynamo" in sys.modules
from torch._dynamo.utils import is_compile_supported
assert is_compile_supported.__code__.co_filename.endswith("_dynamo/utils.py")
assert torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)) == 1
import timm  # whoever wants it has it
from models.clip.openclip import open_clip, with_the_rest
with_the_rest()
tower = open_clip.model.TimmModel("resnet10t", 8, pool="avg", proj="linear").eval()
print(tuple(ours.shape), tuple(tower(torch.zeros(1, 3, 32, 32)).shape))
"""
THEIRS_FIRST = """
import sys
import transformers
import models.clip.loading
from models.clip.openclip import open_clip, with_the_rest
assert open_clip.hf_model.transformers is transformers
assert sys.modules["transformers"] is transformers
with_the_rest()
print("kept")
"""


@pytest.mark.parametrize(
    ("program", "says"),
    [
        pytest.param(LIGHT, "(2, 8)", id="transformers"),
        pytest.param(THEIRS_FIRST, "kept", id="transformers-theirs"),
        pytest.param(LOADED, "[]", id="loaded"),
        pytest.param(COMPILER, "(1, 1, 2, 2) (1, 8)", id="compiler-and-timm"),
    ],
)
def test_what_open_clip_need_not_import_is_there_for_those_who_want_it(program: str, says: str) -> None:
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == says
