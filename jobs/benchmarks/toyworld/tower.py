"""ViTSeg's tower at toy scale: ``models.clipseg.toyvit``, trained to classify what a scene shows.

The paper's ViT was trained on ImageNet's labels, which mostly name things: no grass, no sky, no colours. This
one learns which things, or which of all classes, a toy scene shows, from as many scenes as a few minutes
allow. The bundled CLIP was trained on captions for ten times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import save
from torch import Tensor

from models.clipseg import toyvit
from models.clipseg.decoder import normalize
from models.files import write_file
from pipeline.metrics.names import percent
from pipeline.toyworld import scenes as toyworld
from pipeline.toyworld.phrases import auc
from pipeline.toyworld.scenes import CLASSES, THINGS, VISIBLE_SHARE

SEED = 600
SCENES = 6000
STEPS = 700
BATCH = 64
HELD_OUT = 300
_RATE = 1e-3
_DROPPED = 0.75  # share of patches, as for the bundled CLIP: a quarter of the time


def train_tower(
    path: Path,
    console: Console,
    classes: Sequence[str] = THINGS,
    *,
    scenes: int = SCENES,
    steps: int = STEPS,
    held_out: int = HELD_OUT,
) -> None:
    """Train a tower and write its weights under timm's names. No-op if the file is from the same training.

    Args:
        path: safetensors file to write; a file from another training is replaced.
        console: for progress.
        classes: the classes to predict.
        scenes: training scenes.
        steps: updates.
        held_out: evaluation scenes.
    """
    training = {"classes": ", ".join(classes), "scenes": str(scenes), "steps": str(steps), "seed": str(SEED)}
    if path.exists():
        with safetensors.safe_open(path, "pt") as file:
            if file.metadata() == training:
                return
    console.print(f"Training a tower of ViTSeg on {len(classes)} labels of {scenes} scenes, {steps} steps")
    toyvit.register()
    images, shown = _scenes(SEED, scenes, classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        tower = timm.create_model(toyvit.MODEL_NAME, num_classes=len(classes), patch_drop_rate=_DROPPED)
        optimizer = torch.optim.AdamW(tower.parameters(), lr=_RATE, weight_decay=0.05)
        tower.train()
        for step in range(steps):
            chosen = torch.randint(scenes, (BATCH,))
            batch = images[chosen]
            batch = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, batch, batch.flip(3))
            warmup = min(1.0, (step + 1) / 50)
            for group in optimizer.param_groups:
                group["lr"] = _RATE * warmup * 0.5 * (1 + np.cos(np.pi * step / steps))
            loss = F.binary_cross_entropy_with_logits(tower(normalize(batch)), shown[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % 100 == 0:
                console.print(f"  step {step + 1}/{steps}, loss {loss.item():.3f}", highlight=False)
    tower.eval()
    with torch.inference_mode():
        images, shown = _scenes(SEED + 1, held_out, classes)
        scores = torch.cat([tower(normalize(part)) for part in images.split(BATCH)]).numpy()
    quality = np.nanmean([auc(scores[:, k], shown[:, k].numpy() > 0) for k in range(len(classes))])
    console.print(f"  AUC on new scenes: {percent(float(quality))} %")
    state = {name: value for name, value in tower.state_dict().items() if not name.startswith("head.")}
    write_file(path, save(state, training))


def _scenes(seed: int, count: int, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Scenes, uint8 (N, 3, 128, 128), and which of the classes they show, float32 (N, classes)."""
    made = toyworld.generate(seed, count, 128)
    flat = made.labels.reshape(count, -1)
    shares = np.stack([(flat == CLASSES.index(name)).mean(1) for name in classes], 1)
    images = torch.from_numpy(made.images).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy((shares >= VISIBLE_SHARE).astype(np.float32))
