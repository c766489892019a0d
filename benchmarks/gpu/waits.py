"""How often the host waits for the GPU, as CUDA's own debug mode counts it."""

from __future__ import annotations

import collections
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench, random_images, random_text
from benchmarks.gpu.training import bare_step, tasks
from benchmarks.training_ingest import make_table
from models.clip.loading import load_clip
from models.settings import MaskClipSettings
from pipeline.labelling.labeller import LabellerSettings
from pipeline.labelling.maskclip import MaskClipLabeller


def run(bench: Bench) -> None:
    """Waits of a batch that is labelled, and of a step of each training."""
    model, pretrained = ("toyclip", "bundled") if bench.toy else ("ViT-B-16-quickgelu", "random:0")
    settings = LabellerSettings(num_classes=20, precision="fp32" if bench.toy else "bf16")
    width = load_clip(model, pretrained, towers="visual").embed_dim
    labeller = MaskClipLabeller(
        settings, model=model, pretrained=pretrained, text=random_text(width, 20), reading=MaskClipSettings()
    )
    count = labeller.batch_size
    images = list(random_images(count, 64, 96).permute(0, 2, 3, 1).contiguous().numpy())
    count_waits(bench, f"labelling {count} image(s)", lambda: labeller.label(images, [(64, 96)] * count))
    with tempfile.TemporaryDirectory(prefix="maskmill-gpu-") as scratch:
        table = Path(scratch)
        make_table(table, 8, 64 if bench.toy else 512)
        for name, make_task, samples, loop in tasks(bench, str(table)):
            loop = loop.replace(batch_size=2)
            count_waits(bench, f"a step of {name}", bare_step(bench.device, make_task, samples, loop))


def count_waits(bench: Bench, name: str, work: Callable[[], object]) -> None:
    """Add a row with the number of waits, and where they are."""
    work()
    work()
    if bench.device.type != "cuda":
        bench.add(name, "needs CUDA")
        return
    bench.wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [each for each in caught if "synchroniz" in str(each.message)]
    places = collections.Counter(f"{Path(each.filename).name}:{each.lineno}" for each in waits)
    listed = ", ".join(f"{place} ×{times}" for place, times in places.most_common(6))
    bench.add(name, f"{len(waits)} waits{': ' if listed else ''}{listed}")
