"""Train the bundled small CLIP from captions on the toy world (``--output DIR``).

Plain CLIP: open_clip's architecture, tokenizer and ``ClipLoss`` on pairs of picture and caption. Label maps
are not used for training, only for the evaluation in the model card.

Two techniques make the patch tokens local, which the dense heads depend on. Patch dropout: a class token that
sees only a few patches must recognise each object from whichever of its patches is left. Token swap: see
``_token_swap``.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import tyro
from numpy.typing import NDArray
from open_clip.loss import ClipLoss
from open_clip.transformer import PatchDropout
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from jobs.toyclip.card import Scores, card, evaluate
from models.clip import toy as toyclip
from models.clip.loading import load_source
from models.clip.templates import TEMPLATE_SETS
from models.clip.weights import OPENAI_MEAN, OPENAI_STD, WeightSource
from models.errors import MaskMillError, WrongUse
from pipeline.metrics.names import percent
from pipeline.toyworld import scenes as toyworld
from pipeline.toyworld.captions import caption_words

COMMON_MERGES = 2000
"""Number of leading merges of the full table to keep, so that other words take only a few tokens."""


@dataclass(frozen=True)
class PretrainRecipe:
    """Settings of the training.

    Attributes:
        seed: random seed of the weights, batches and training scenes; the card uses scenes of ``seed + 1``.
        scenes: number of training scenes, drawn once and kept in memory (48 KiB each at 128 px).
        size: side of the scenes in pixels, and input size of the network.
        steps: optimiser steps, by phase. Each phase starts with a new optimiser.
        batch: pairs per step, by phase.
        learning_rate: peak after ``warmup`` steps, by phase; followed by cosine decay to zero.
        warmup: steps of linear warm-up, by phase.
        weight_decay: applied to matrices only.
        patch_dropout: share of the patches dropped in each step, by phase; below 1.
        token_swap: share of the pictures whose class token is swapped (``_token_swap``), by phase.
        patch_size, width, layers, head_width, embed_dim: of the image tower.
        text_width, text_layers, context_length: of the text tower.
        card_scenes: number of unseen scenes for the card's evaluation; 0 skips it.
    """

    seed: int = 0
    scenes: int = 30_000
    size: int = 128
    steps: tuple[int, ...] = (1600, 500, 100)
    batch: tuple[int, ...] = (256, 128, 256)
    learning_rate: tuple[float, ...] = (2e-3, 1e-3, 1e-3)
    warmup: tuple[int, ...] = (60, 20, 20)
    weight_decay: float = 0.05
    patch_dropout: tuple[float, ...] = (0.85, 0.8, 0.975)
    token_swap: tuple[float, ...] = (0.0, 0.6, 0.5)
    patch_size: int = 8
    width: int = 192
    layers: int = 3
    head_width: int = 64
    embed_dim: int = 128
    text_width: int = 64
    text_layers: int = 2
    context_length: int = 32
    card_scenes: int = 200

    def __post_init__(self) -> None:
        by_phase = ("steps", "batch", "learning_rate", "warmup", "patch_dropout", "token_swap")
        counts = [len(getattr(self, name)) for name in by_phase]
        if len(set(counts)) != 1 or not counts[0]:
            raise WrongUse(
                "setting_invalid",
                f"{', '.join(by_phase)} have {', '.join(map(str, counts))} values.",
                "Give one value of each for every phase.",
            )


def model_config(recipe: PretrainRecipe, vocab_size: int) -> dict[str, Any]:
    """The open_clip configuration of the network, without patch dropout."""
    return {
        "embed_dim": recipe.embed_dim,
        "quick_gelu": False,
        "vision_cfg": {
            "image_size": recipe.size,
            "patch_size": recipe.patch_size,
            "width": recipe.width,
            "layers": recipe.layers,
            "head_width": recipe.head_width,
        },
        "text_cfg": {
            "context_length": recipe.context_length,
            "vocab_size": vocab_size,
            "width": recipe.text_width,
            "heads": max(1, recipe.text_width // 64),
            "layers": recipe.text_layers,
        },
    }


def new_model(recipe: PretrainRecipe, config: dict[str, Any]) -> open_clip.CLIP:
    """The untrained network, with patch dropout; its weights depend only on ``recipe.seed``."""
    torch.manual_seed(recipe.seed)
    vision = {**config["vision_cfg"], "patch_dropout": max(recipe.patch_dropout)}
    return open_clip.CLIP(**{**config, "vision_cfg": vision}, output_dict=True)


def corpus(recipe: PretrainRecipe, *, workers: int) -> tuple[Tensor, list[str]]:
    """The training pairs, drawn by ``workers`` processes: uint8 (n, 3, s, s) RGB, and n captions."""
    chunk = 250
    starts = range(0, recipe.scenes, chunk)
    jobs = [(recipe.seed, min(chunk, recipe.scenes - start), recipe.size, start) for start in starts]
    images = np.empty((recipe.scenes, 3, recipe.size, recipe.size), np.uint8)
    captions: list[str] = []
    # Not forked: the parent may hold a CUDA context and torch threads.
    with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else nullcontext() as pool:
        parts = map(_draw, jobs) if pool is None else pool.imap(_draw, jobs)
        for part_images, part_captions in parts:
            images[len(captions) : len(captions) + len(part_captions)] = part_images
            captions += part_captions
            if len(captions) % 5000 < chunk:
                print(f"drawn {len(captions)}/{recipe.scenes} scenes", flush=True)
    return torch.from_numpy(images), captions


def _draw(job: tuple[int, int, int, int]) -> tuple[NDArray[np.uint8], list[str]]:
    seed, count, size, start = job
    made = toyworld.generate(seed, count, size, start=start)
    return made.images.transpose(0, 3, 1, 2), made.captions


def train(
    model: open_clip.CLIP,
    images: Tensor,
    tokens: Tensor,
    recipe: PretrainRecipe,
    *,
    phase: int,
    device: torch.device,
) -> list[float]:
    """Run one phase of contrastive training, in place.

    Args:
        model: from ``new_model``, on ``device``.
        images: uint8 (n, 3, s, s); moved to ``device`` as a whole.
        tokens: int64 (n, context_length).
        phase: from 0. Its random numbers do not depend on earlier phases.

    Returns:
        The loss of each step.
    """
    steps, batch, peak = recipe.steps[phase], recipe.batch[phase], recipe.learning_rate[phase]
    torch.manual_seed(_phase_seed(recipe, phase))
    generator = torch.Generator().manual_seed(_phase_seed(recipe, phase))
    if isinstance(model.visual.patch_dropout, PatchDropout):
        model.visual.patch_dropout.prob = recipe.patch_dropout[phase]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.98),
    )
    clip_loss = ClipLoss()
    mean = torch.tensor(OPENAI_MEAN, device=device).view(1, 3, 1, 1) * 255
    std = torch.tensor(OPENAI_STD, device=device).view(1, 3, 1, 1) * 255
    images, tokens = images.to(device), tokens.to(device)
    losses: list[Tensor] = []  # read rarely, as the host waits for a GPU then
    began = time.monotonic()
    swap = model.visual.transformer.resblocks[-1].register_forward_pre_hook(
        _token_swap(recipe.token_swap[phase])
    )
    model.train()
    for step, rows in enumerate(_batches(len(images), steps, batch, generator)):
        for group in optimiser.param_groups:
            group["lr"] = peak * _rate(step, steps, recipe.warmup[phase])
        rows = rows.to(device, non_blocking=True)
        pixels = images[rows]
        if torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(-1)
        pixels = (pixels.float() - mean) / std
        with _fast_arithmetic(device):
            out = model(pixels, tokens[rows])
        loss = clip_loss(out["image_features"].float(), out["text_features"].float(), out["logit_scale"])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, math.log(100.0))
        losses.append(loss.detach())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            spent = time.monotonic() - began
            left = spent / (step + 1) * (steps - step - 1)
            print(
                f"phase {phase + 1}/{len(recipe.steps)}  step {step + 1}/{steps}  "
                f"loss {torch.stack(losses[-50:]).mean():.3f}  {batch * (step + 1) / spent:.0f} pairs/s  "
                f"{left / 60:.1f} min left in this phase",
                flush=True,
            )
    swap.remove()
    model.eval()
    return torch.stack(losses).tolist()


def _token_swap(share: float) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Replace the class token of some pictures with a random patch token before the last block.

    A class token collects information in every block, and what it collects before the last block bypasses the
    values that dense labels are read from. Without this history it must find everything in the last block's
    values. Because a patch's residual takes its place, this also trains the residual and the MLP that the
    dense head keeps.
    """

    def hook(block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens, *rest = args
        pictures, count, _ = tokens.shape
        row = torch.arange(pictures, device=tokens.device)[:, None]
        chosen = torch.randint(1, count, (pictures, 1), device=tokens.device)
        chosen = torch.where(torch.rand(pictures, 1, device=tokens.device) < share, chosen, 0)
        return (torch.cat([tokens[row, chosen], tokens[:, 1:]], dim=1), *rest)

    return hook


def _phase_seed(recipe: PretrainRecipe, phase: int) -> int:
    return recipe.seed + 1_000_003 * phase


def _batches(count: int, steps: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of indices, int64 (batch,), from shuffled passes over ``count`` pairs."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:batch]
        order = order[batch:]


def _rate(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * done))


@contextmanager
def _fast_arithmetic(device: torch.device) -> Iterator[None]:
    """Use bf16 where the processor supports it, and plain attention on a CPU.

    With 65 tokens, the backward pass of the CPU flash kernel alone took 40 % of a step.
    """
    if device.type == "cuda":
        with torch.autocast("cuda", dtype=torch.bfloat16):
            yield
        return
    native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(native)):
        yield


def pretrain(recipe: PretrainRecipe, output: Path, *, device: torch.device, workers: int) -> Scores | None:
    """Draw the scenes, train, and write weights, configuration, vocabulary and card to a folder.

    Args:
        output: the folder; files of an earlier training are replaced.
        workers: number of processes that draw scenes.

    Returns:
        The evaluation in the card, or None if ``recipe.card_scenes`` is 0.
    """
    began = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    templates = [template for texts in TEMPLATE_SETS.values() for template in texts]
    merges = toyclip.used_merges([*caption_words(), *templates], common=COMMON_MERGES)
    vocabulary = output / toyclip.vocabulary_path().name
    config = model_config(recipe, toyclip.write_vocabulary(vocabulary, merges))
    tokenizer = open_clip.SimpleTokenizer(bpe_path=str(vocabulary), context_length=recipe.context_length)

    images, captions = corpus(recipe, workers=workers)
    drawn = time.monotonic()
    model = new_model(recipe, config).to(device)
    tokens = tokenizer(captions)
    losses: list[float] = []
    for phase in range(len(recipe.steps)):
        losses += train(model, images, tokens, recipe, phase=phase, device=device)
    trained = time.monotonic()

    weights = output / toyclip.weights_path().name
    save_file(
        {
            name: tensor.detach().half().cpu().contiguous()
            for name, tensor in model.state_dict().items()
            if name != "attn_mask"
        },
        weights,
    )
    (output / toyclip.config_path().name).write_text(json.dumps(config, indent=2) + "\n")
    facts = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "weights": f"{weights.stat().st_size / 1e6:.2f} MB, fp16",
        "final loss": f"{np.mean(losses[-50:]):.3f} (captions repeat within a batch: it cannot reach 0)",
        "time": f"{(drawn - began) / 60:.1f} min drawing, {(trained - drawn) / 60:.1f} min training",
        "machine": _machine(device),
        "versions": f"torch {torch.__version__}, open_clip {open_clip.__version__}",
    }
    scores = None
    if recipe.card_scenes:
        source = WeightSource(
            toyclip.MODEL_NAME, str(weights), config, weights, None, OPENAI_MEAN, OPENAI_STD
        )
        clip = load_source(source, device=device)
        clip.tokenizer = tokenizer
        sizes = [recipe.size, *(s for s in (64, 96, 128, 192) if s != recipe.size)]
        scores = evaluate(clip, seed=recipe.seed + 1, scenes=recipe.card_scenes, sizes=sizes)
    settings = {key.replace("_", " "): str(value) for key, value in asdict(recipe).items()}
    text = card(scores, {**facts, **settings}, seed=recipe.seed + 1, scenes=recipe.card_scenes)
    (output / "MODEL_CARD.md").write_text(text)
    return scores


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class Arguments:
    """Train the bundled small CLIP.

    Attributes:
        output: folder for weights, configuration, vocabulary and card; must not contain weights yet.
        bundled: replace the files that come with the project, instead of writing to --output.
        overwrite: replace the weights of an earlier training in --output.
        device: auto takes a GPU if there is one.
        workers: number of processes that draw scenes; 0 is one per processor.
        recipe: settings of the training.
    """

    output: Path | None = None
    bundled: bool = False
    overwrite: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = 0
    recipe: tyro.conf.OmitArgPrefixes[PretrainRecipe] = field(default_factory=PretrainRecipe)


def destination(arguments: Arguments) -> Path:
    """The folder to write to.

    Raises:
        WrongUse: ``wrong_use``; ``output_exists`` if it contains weights and ``--overwrite`` is not set.
    """
    assets = toyclip.weights_path().parent
    if arguments.bundled:
        return assets
    if arguments.output is None:
        raise WrongUse(
            "wrong_use",
            "No folder for the weights was given.",
            "Name one with --output DIR, or replace the project's own with --bundled.",
        )
    if arguments.output.resolve() == assets:
        raise WrongUse(
            "wrong_use",
            f"{arguments.output} holds the weights that come with the project.",
            "Give --bundled to replace them, or name another folder.",
        )
    if (arguments.output / toyclip.weights_path().name).exists() and not arguments.overwrite:
        raise WrongUse(
            "output_exists",
            f"{arguments.output} already holds weights.",
            "Name another folder, or give --overwrite.",
        )
    return arguments.output


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for wrong use."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m jobs.toyclip.pretrain")
    try:
        output = destination(arguments)
    except MaskMillError as error:
        print(error, file=sys.stderr)
        return 2
    wanted = arguments.device
    device = torch.device(
        "cuda" if wanted == "auto" and torch.cuda.is_available() else "cpu" if wanted == "auto" else wanted
    )
    scores = pretrain(
        arguments.recipe, output, device=device, workers=arguments.workers or os.cpu_count() or 1
    )
    if scores is not None:
        size = arguments.recipe.size
        for head, by_size in scores.iou.items():
            print(f"{head}: mean IoU {percent(float(np.mean(by_size[size])))} % at {size} px")
    print(f"Written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
