"""Item 7, if asked for: train the bundled CLIP with four times the steps."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.gpu.bench import Bench
from jobs.toyclip.pretrain import PretrainRecipe, pretrain


def run(bench: Bench) -> None:
    """Mean IoU of MaskCLIP's heads on scenes that no training saw; the bundled card has those of today."""
    recipe = PretrainRecipe(steps=(6400, 2000, 400), scenes=60_000)
    if bench.toy:
        recipe = PretrainRecipe(steps=(2, 2, 2), batch=(8, 8, 8), scenes=32, card_scenes=4)
    with tempfile.TemporaryDirectory(prefix="maskmill-gpu-") as scratch:
        workers = len(os.sched_getaffinity(0))
        scores = pretrain(recipe, Path(scratch), device=bench.device, workers=workers)
    if scores is not None:
        for head, by_size in scores.iou.items():
            bench.add(f"head {head}: mean IoU at {recipe.size} px", f"{np.mean(by_size[recipe.size]):.3f}")
