"""``maskmill benchmark concepts``: apply a list of prompts to any images and draw the result.

Fine-grained and novel concepts have no ground truth. As in the paper, the result is judged by eye: image,
prediction, and a confidence map per prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from jobs.benchmarks.rows import row
from models.clip.loading import load_clip
from models.clip.text import build_text_classifier
from models.device import DTYPES, best_device, native_precision
from models.helper import helper_of
from models.labelmap import label_map
from models.maskclip import MaskClip
from pipeline.evaluation.results import PICTURES, Picture, Section
from pipeline.files import images
from pipeline.files.fetch import fetch, max_bytes
from pipeline.files.storage import cache_dir
from pipeline.labelling.recipes import LabelRecipe
from pipeline.ontology.concepts import ConceptList
from pipeline.ontology.ontology import Ontology
from pipeline.report.pictures import prompt_panel

SHOWN = 10
"""Maximum number of confidence maps per image."""


def draw_concepts(
    addresses: Mapping[str, str],
    concepts: ConceptList,
    recipe: LabelRecipe,
    folder: Path,
    console: Console,
) -> tuple[Section, list[Picture]]:
    """Draw a picture of every image into ``folder``. Unreadable images are reported and skipped.

    Args:
        addresses: where to fetch each image from, by its URI.

    Returns:
        A section of ``benchmark.json`` with each prompt's share of the pixels and highest confidence, and
        the entries of the pictures.

    Raises:
        MaskMillError: for unusable weights or words.
    """
    names = (*concepts.concepts, *concepts.context)
    palette = Ontology.from_dict({"name": "concepts", "classes": list(names)}).palette()
    dtype = DTYPES[native_precision(best_device()) if recipe.precision == "auto" else recipe.precision]
    clip = load_clip(recipe.model, recipe.pretrained, device=best_device(), dtype=dtype)
    templates = "toyworld" if recipe.model == "toyclip" else concepts.templates
    text = build_text_classifier(clip, [[name] for name in names], templates=templates, cache_dir=cache_dir())
    helper = helper_of(recipe.maskclip, device=clip.device, dtype=dtype)
    model = MaskClip(clip, text, recipe.maskclip, helper=helper)
    shares, peaks, pictures = [], [], []
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    for number, (uri, address) in enumerate(addresses.items(), 1):
        try:
            most = recipe.images.max_pixels
            image = images.decode(fetch(address, max_bytes=max_bytes(most)), max_pixels=most)
        except images.ImageError as error:
            console.print(f"left out {uri}: {error}", highlight=False, soft_wrap=True)
            continue
        labels, maps = _read(model, image, recipe)
        share = np.bincount(labels.ravel(), minlength=len(names)) / labels.size
        shares.append(share)
        peaks.append(maps.max((1, 2)))
        shown = _shown(share, len(concepts.concepts))
        file = f"{PICTURES}/concepts-{number:04d}.png"
        prompt_panel(image, labels, {names[i]: maps[i] for i in shown}, names=names, palette=palette).save(
            folder / file, optimize=True
        )
        pictures.append(Picture(file=file, caption=Path(uri).name))
        console.print(f"{number} of {len(addresses)}: {Path(uri).name}", highlight=False, soft_wrap=True)
    rows = [
        row(
            name,
            {
                "share_of_pixels": [float(np.mean([share[i] for share in shares]))],
                "highest_confidence": [float(np.max([peak[i] for peak in peaks]))],
            }
            if shares
            else {},
            missing=None if shares else "no image could be read",
        )
        for i, name in enumerate(names)
    ]
    section = Section(
        name="concepts",
        title="Prompts over the images",
        note="No ground truth: look at the pictures. Confidence is the softmax over all prompts.",
        chart="bars",
        metrics=("share_of_pixels", "highest_confidence"),
        rows=tuple(rows),
    )
    return section, pictures


def _read(model: MaskClip, image: np.ndarray, recipe: LabelRecipe) -> tuple[np.ndarray, np.ndarray]:
    """Label map (H, W), and confidence of every class on the grid (C, h, w)."""
    resized = images.fit(image, recipe.images)
    pixels = torch.from_numpy(np.ascontiguousarray(resized)).permute(2, 0, 1)[None]
    scores = model.grid_scores(pixels.to(model.clip.device))[0]
    temperature = model.confidence_temperature
    labels, _ = label_map(
        scores, network_size=resized.shape[:2], image_size=image.shape[:2], temperature=temperature
    )
    if temperature:
        shares = (scores * temperature).softmax(0)
    else:
        positive = scores.clamp_min(0)
        shares = positive / positive.sum(0).clamp_min(1e-12)
    return labels.cpu().numpy(), shares.cpu().numpy()


def _shown(share: np.ndarray, concepts: int) -> Sequence[int]:
    """Indices of the classes to draw: the concepts, then the context classes by area."""
    context = [int(i) for i in np.argsort(-share) if i >= concepts]
    return [*range(min(concepts, SHOWN)), *context][:SHOWN]
