"""The picture and the page that a trained CLIPSeg gets: training samples, answered by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.errors import MaskMillError
from pipeline.report.clipseg_page import Answer, clipseg_page, preview_sheet
from pipeline.report.training_page import PAGE, SHEET, write_training_page
from pipeline.trained.clipseg import load_trained, read_clipseg_record
from pipeline.training.clipseg.triplets import IGNORED, OBJECT, decode_phrase

if TYPE_CHECKING:
    from models.clipseg.decoder import ClipSeg
    from pipeline.training.clipseg.triplets import TripletSamples

SHOWN = 12


def write_pages(
    folder: Path,
    lines: list[Mapping[str, Any]],
    samples: TripletSamples,
    *,
    seed: int,
    commands: Mapping[str, str],
    count: int = SHOWN,
) -> list[str]:
    """Write the picture and the page beside the model.

    Args:
        folder: of the model.
        lines: of ``metrics.jsonl``.
        samples: what it was trained on.
        seed: of the choice.
        commands: what to run next, by purpose.
        count: samples to show.

    Returns:
        The files, the page last.
    """
    from models.device import best_device

    model = load_trained(folder, device=best_device())
    answers = find_answers(model, samples, seed=seed, count=count)
    written = []
    if answers:
        preview_sheet(answers).save(folder / SHEET)
        written.append(str(folder / SHEET))
    page = clipseg_page(read_clipseg_record(folder), answers, uri=str(folder), commands=commands)
    return [*written, str(write_training_page(folder / PAGE, page, lines))]


def find_answers(model: ClipSeg, samples: TripletSamples, *, seed: int, count: int) -> list[Answer]:
    """What a model says to some of its training samples, the same at every call: of different images first.

    Args:
        model: trained.
        samples: what it was trained on; those that cannot be read are passed over.
        seed: of the choice and of the augmentation.
        count: how many.
    """
    import torch

    from models.clipseg.decoder import mix, normalize

    device = model.clip.device
    answers: list[Answer] = []
    order = np.random.default_rng(seed).permutation(samples.order(0, seed))
    _, first = np.unique(samples.source.pairs.image[order], return_index=True)
    order = np.concatenate([order[np.sort(first)], np.delete(order, first)])
    for index in order[: 4 * count].tolist():
        if len(answers) == count:
            break
        try:
            sample = samples.load(index, np.random.default_rng((seed, index)))
            phrase, share = decode_phrase(sample["phrase"]), float(sample["text_weight"])
            image, support = (
                torch.from_numpy(sample[name])[None].to(device) for name in ("image", "support")
            )
            with torch.no_grad():
                texts = model.encode_text([phrase]) if share > 0 else None
                pictures = model.encode_prompt_images(normalize(support)) if share < 1 else texts
                assert pictures is not None
                conditional = pictures if texts is None else mix(texts, pictures, share)
                p = model(normalize(image), conditional)[0, 0].sigmoid().cpu().numpy()
        except MaskMillError:
            continue
        answers.append(
            Answer(
                phrase=phrase if share > 0 else "",
                text_share=share,
                image=_pixels(sample["image"]),
                there=sample["mask"] == OBJECT,
                known=sample["mask"] != IGNORED,
                probability=p,
                example=_pixels(sample["support"]) if share < 1 else None,
            )
        )
    return answers


def _pixels(planes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(planes.transpose(1, 2, 0))
