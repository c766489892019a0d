"""Item 6: CLIPSeg by prompts an image, against transformers in the same process."""

from __future__ import annotations

import torch

from benchmarks.clipseg_speed import MODEL, PRETRAINED, as_transformers, compare
from benchmarks.gpu.bench import Bench
from models.clip.loading import load_clip
from models.clipseg.decoder import build_clipseg
from models.settings import ClipSegConfig

PROMPTS = (1, 5, 20, 100)


def run(bench: Bench) -> None:
    """Milliseconds an image with the embeddings of the prompts given, and computed."""
    # Full fp32, since the outputs are compared.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    ours = build_clipseg(load_clip(MODEL, PRETRAINED, device=bench.device), ClipSegConfig())
    theirs = as_transformers(ours, bench.device)
    for prompts in (1,) if bench.toy else PROMPTS:
        if bench.left() < 8 and not bench.toy:
            bench.add(f"{prompts} prompts", "left out: no time left")
            continue
        (text, own, given, own_given), differs = compare(ours, theirs, prompts, 1 if bench.toy else 7)
        for name, other, here in (("", text, own), (", embeddings given", given, own_given)):
            bench.add(
                f"{prompts} prompt(s){name}, fp32, best of 7",
                f"{1e3 * here:.1f} ms an image, differs by {differs:.0e}",
                other / here,
                "transformers",
            )
