"""The CLIPSeg sections of ``maskmill benchmark toyworld``: trained decoders, prompted by text and by image.

For every seed, seven decoders are trained as by ``maskmill train clipseg --recipe toy``: CLIPSeg on true
masks, on the toy teacher's labels alone, on true masks without phrases for the unseen classes, and on those
plus the teacher's labels for the unseen classes; and the paper's two baselines, one of them with two towers.
They are evaluated on scenes that no decoder was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from jobs.benchmarks.rows import claim, row
from jobs.benchmarks.toyworld.labelling import scene_set
from jobs.benchmarks.toyworld.students import draw_scenes
from jobs.benchmarks.toyworld.tower import train_tower
from jobs.label import label_images
from jobs.labelling.options import LabelOptions
from jobs.train.clipseg import train_clipseg
from jobs.train.run import INTERRUPTED, TrainOptions
from models.clipseg import toyvit
from models.clipseg.decoder import ClipSeg, normalize
from models.device import best_device, native_precision
from pipeline.datasets.toy import open_toyworld
from pipeline.evaluation.results import Claim, Section
from pipeline.labelling.prepare import prepare_labeller
from pipeline.labelling.recipes import RECIPES
from pipeline.metrics.foreground import (
    STANDARD,
    THRESHOLDS,
    ForegroundStatistics,
    average_precision,
    foreground_iou,
    mean_iou,
)
from pipeline.metrics.ratios import mean_of_defined, ratio
from pipeline.ontology.reading import load_ontology
from pipeline.toyworld.scenes import CLASSES, THINGS, VISIBLE_SHARE
from pipeline.tracking.tracker import OFF
from pipeline.trained.clipseg import load_trained
from pipeline.training.clipseg.crops import support_image
from pipeline.training.clipseg.recipes import CLIPSEG_RECIPES
from pipeline.training.clipseg.sources.base import OBJECT
from pipeline.training.clipseg.sources.toy import KINDS, ToySource, kind_of, open_toy_source
from pipeline.training.clipseg.triplets import TripletSettings, crop_by_settings

SECTION = "prompts"
"""Name for ``--row``."""
MOST_SEEDS = 3
"""Each seed trains seven decoders, which takes minutes."""
PAPER = "Lüddecke & Ecker, CVPR 2022"
TRAINING_SEED = 2000
"""Offset from the seed of the evaluation scenes to that of the training scenes."""
THRESHOLD_SEED = 3000
"""Offset to the seed of the scenes on which thresholds are chosen."""
SCENES = 1500
"""Training scenes."""
UNSEEN = ("sand", "zebra", "fish", "cloud")
"""Classes withheld from the zero-shot decoder, the same as for the zero-shot student."""
WANTED_EMPTY = 0.92
"""Share of absent phrases with an empty mask, on the scenes where the strict threshold is chosen. The target
on the evaluation scenes is 0.9."""

_UNSEEN = [CLASSES.index(name) for name in UNSEEN]
_SEEN = [number for number in range(len(CLASSES)) if number not in _UNSEEN]
_SIDE = 128
_SHOWN = {"text": "", "picture": "crop_blur_highlight352", "raw picture": "image_only"}
_ABSENT = 3  # absent phrases per scene
_TEACHER = "MaskCLIP (the teacher)"

Runs = dict[str, list[float]]


@dataclass(frozen=True)
class Variant:
    """A decoder to train.

    Attributes:
        name: name of its folder.
        title: title of its row.
        settings: changes to the recipe ``toy``.
        truth: train on true masks.
        guessed: train on the teacher's labels; together with ``truth``, only on those of unseen classes.
        tower: for ViTSeg: the file of the tower, and the classes it was trained on.
    """

    name: str
    title: str
    settings: tuple[str, ...] = ()
    truth: bool = True
    guessed: bool = False
    tower: tuple[str, Sequence[str]] | None = None


CLIPSEG = Variant("clipseg", "CLIPSeg")
PSEUDO = Variant("pseudo-labels", "CLIPSeg, from pseudo-labels alone", truth=False, guessed=True)
_WITHHELD = (f"unseen=[{','.join(UNSEEN)}]",)
ZERO_SHOT = Variant("zero-shot", "CLIPSeg, never told of the unseen", _WITHHELD)
GUESSED = Variant("guessed", "CLIPSeg, pseudo-labels of the unseen", _WITHHELD, guessed=True)
DECONV = Variant("clip-deconv", "CLIP-Deconv", ("kind=clip-deconv",))
_VITSEG = ("kind=vitseg", f"tower={toyvit.MODEL_NAME}")
VITSEG = Variant("vitseg", "ViTSeg", _VITSEG, tower=("tower.safetensors", THINGS))
VITSEG_ALL = Variant(
    "vitseg-all", "ViTSeg, tower told all classes", _VITSEG, tower=("tower-all.safetensors", CLASSES)
)
_PROMPTED = (CLIPSEG, PSEUDO, DECONV, VITSEG, VITSEG_ALL)
_LABELLERS = (ZERO_SHOT, GUESSED, PSEUDO, CLIPSEG)
VARIANTS = (*_PROMPTED, ZERO_SHOT, GUESSED)


def prompts(
    seeds: Sequence[int],
    scenes: int,
    folder: Path,
    console: Console,
    *,
    training_scenes: int = SCENES,
    settings: Sequence[str] = (),
    variants: Sequence[Variant] = VARIANTS,
    make_tower: Callable[[Path, Console, Sequence[str]], None] = train_tower,
) -> tuple[list[Section], list[Claim]]:
    """Train and evaluate the decoders, reusing those already trained in ``folder``.

    Args:
        seeds: seeds of the scene sets.
        scenes: evaluation scenes per set.
        folder: for images, tables and decoders.
        console: for progress.
        training_scenes: training scenes per seed.
        settings: changes to all recipes.
        variants: the decoders to train.
        make_tower: trains a tower for ViTSeg and writes its weights.

    Returns:
        Sections and claims of ``benchmark.json``.
    """
    found: dict[str, Runs] = {}
    for seed in seeds:
        figures = {_TEACHER: _teacher(seed, scenes)}
        for variant in variants:
            changes = [*variant.settings, f"loop.seed={seed}", *settings]
            if variant.tower is not None:
                name, classes = variant.tower
                make_tower(folder / name, console, classes)
                changes.append(f"tower_weights={(folder / name).resolve()}")
            output = folder / f"seed-{seed}" / variant.name
            model = _trained(variant, changes, seed, training_scenes, output, console)
            console.print(f"Evaluating {variant.title} on {scenes} scenes", highlight=False)
            if variant in _PROMPTED:
                figures |= _prompt_figures(model, variant.title, seed, scenes)
            if variant in _LABELLERS:
                figures |= _label_figures(model, variant.title, seed, scenes)
        for name, values in figures.items():
            runs = found.setdefault(name, {})
            for metric, value in values.items():
                runs.setdefault(metric, []).append(value)
    return _sections(found, training_scenes), _claims(found)


def missing(reason: str) -> Section:
    """The section to show if the training failed."""
    return Section(
        name="clipseg",
        title="CLIPSeg against its baselines",
        note="",
        chart=None,
        metrics=("text_iou",),
        rows=(row("decoders", {}, missing=reason),),
    )


def _sections(found: Mapping[str, Runs], training_scenes: int) -> list[Section]:
    against = Section(
        name="clipseg",
        title="CLIPSeg against its baselines",
        note=f"Trained on {training_scenes} scenes. Foreground IoU at the threshold that is best on other "
        "scenes, and average precision, for text prompts and for example pictures, prepared as in the paper "
        "or raw. empty: share of absent phrases whose mask is too small to be visible at the strict "
        f"threshold, the lowest that leaves {WANTED_EMPTY:.0%} of them empty on other scenes; "
        "text_iou_strict is the IoU there. ViTSeg's tower was trained for a few minutes to classify which "
        "things, or which of all classes, a scene shows. Unlike ImageNet's classes, these are the prompted "
        "ones. The toy CLIP was trained on captions for half an hour. All decoders read whitened inputs "
        "(models/clipseg/whitening.py) and get the same number of updates at the same learning rate, chosen "
        "for CLIPSeg. CLIPSeg and ViTSeg have the refined head here, CLIP-Deconv its plain one. No decoder "
        "saw raw pictures in training. Examples come from other scenes, so phrases that are true of only one "
        "scene are not prompted by picture.",
        chart="bars",
        metrics=(
            "text_iou",
            "text_ap",
            "picture_iou",
            "picture_ap",
            "raw_picture_iou",
            "raw_picture_ap",
            "empty",
            "text_iou_strict",
        ),
        rows=tuple(
            row(variant.title, found[variant.title]) for variant in _PROMPTED if variant.title in found
        ),
    )
    kinds = Section(
        name="clipseg-phrases",
        title="CLIPSeg by kind of phrase",
        note="names: “ladybug”; coloured: “red ladybug”; colours: “something red”; patterns: “something "
        "striped”; counts: “two things”, all things of a scene that has two.",
        chart="bars",
        metrics=("text_iou", "text_ap", "picture_iou", "picture_ap"),
        rows=tuple(
            row(f"{variant.title}: {kind}", found[f"{variant.title}: {kind}"])
            for variant in (CLIPSEG, PSEUDO, DECONV)
            if variant.title in found
            for kind in KINDS
        ),
    )
    labelling = Section(
        name="clipseg-labels",
        title="Labels of CLIPSeg, and of classes without truth",
        note=f"Only the last decoder was trained on the truth of {', '.join(UNSEEN)}. Either one label "
        "per pixel, the name with the highest probability, as in the paper's generalised zero-shot task; or "
        "each name alone, at the threshold chosen on the other classes.",
        chart="bars",
        metrics=("miou_unseen", "miou_seen", "miou"),
        rows=tuple(
            row(name, found[name])
            for name in (_TEACHER, *(name for variant in _LABELLERS for name in _label_rows(variant.title)))
            if name in found
        ),
    )
    return [against, kinds, labelling]


def _claims(found: Mapping[str, Runs]) -> list[Claim]:
    ours = found[CLIPSEG.title]
    claims = [
        claim(
            f"CLIPSeg beats {other.title} with {what} prompts ({measure})", f"{PAPER}, Tables 3 to 7",
            ours[metric], found[other.title][metric], unit=measure,
        )
        for other in (DECONV, VITSEG)
        if other.title in found
        for what, measure, metric in (
            ("text", "IoU", "text_iou"), ("text", "AP", "text_ap"),
            ("picture", "IoU", "picture_iou"), ("picture", "AP", "picture_ap"),
        )
    ]  # fmt: skip
    aim = [0.9] * len(ours["empty"])
    return [
        *claims,
        claim(
            "An example picture cropped, blurred and darkened as in the paper beats the raw picture",
            f"{PAPER}, Table 2", ours["picture_ap"], ours["raw_picture_ap"], unit="AP",
        ),
        claim(
            f"At the strict threshold, in 90 % of the cases a phrase true of nothing finds less than "
            f"{VISIBLE_SHARE:.1%} of the picture",
            "MaskMill", ours["empty"], aim, unit="share",
        ),
        *(
            claim(
                f"{what}, CLIPSeg beats the MaskCLIP teacher{where}", "MaskMill",
                found[_label_rows(variant.title)[0]][metric], found[_TEACHER][metric],
            )
            for what, variant, where, metric in (
                ("Never told of them", ZERO_SHOT, " on the unseen classes", "miou_unseen"),
                ("Told of them by pseudo-labels", GUESSED, " on the unseen classes", "miou_unseen"),
                ("From pseudo-labels alone", PSEUDO, "", "miou"),
            )
            if _label_rows(variant.title)[0] in found
        ),
    ]  # fmt: skip


def _label_rows(title: str) -> tuple[str, str]:
    """Titles of a decoder's two label rows: the highest name, and each name alone."""
    return f"{title}: highest name", f"{title}: each name alone"


# --- training -----------------------------------------------------------------------------------------------


def _trained(
    variant: Variant, changes: Sequence[str], seed: int, count: int, output: Path, console: Console
) -> ClipSeg:
    table, split = None, f"seed-{seed + TRAINING_SEED}"
    if variant.guessed:
        scenes = output.with_name("scenes")
        table = str(output.with_name("table"))
        draw_scenes(scenes / "images", scenes / "masks", seed + TRAINING_SEED, count)
        ontology = load_ontology("toyworld")
        source = str(scenes / "images")
        options = LabelOptions(output=table, tracking=OFF)
        label_images(source, RECIPES["toy"], ontology, options, console=console)
    status = train_clipseg(
        CLIPSEG_RECIPES.load("toy", changes),
        # So small that they are trained in this process, also if there is a cluster.
        TrainOptions(output=str(output), workers=0, address="local", tracking=OFF),
        labels=table,
        dataset=open_toyworld(split=split, count=count) if variant.truth else None,
        console=console,
    )
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    return load_trained(str(output))


# --- measuring ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """A decoder's answers to phrases, and to example pictures of the same things, by form of prompt.

    The forms are "text", "picture" and "raw picture"; T is the number of thresholds.

    Attributes:
        present: counts for phrases that are true of the scene; the classes are kinds of phrases.
        absent: share (n, T) of the scene covered at each threshold, for n absent phrases.
    """

    present: Mapping[str, ForegroundStatistics]
    absent: Mapping[str, npt.NDArray[np.float64]]

    def empty(self, form: str) -> npt.NDArray[np.float64]:
        """Share of absent phrases with no visible mask, at each threshold (T,)."""
        shares: npt.NDArray[np.float64] = (self.absent[form] < VISIBLE_SHARE).mean(0)
        return shares

    def best_threshold(self, form: str) -> int:
        """Index of the threshold with the highest foreground IoU."""
        return int(np.argmax(foreground_iou(self.present[form], STANDARD)))

    def strict_threshold(self, form: str) -> int:
        """Index of the lowest threshold with ``WANTED_EMPTY`` of the absent phrases empty, else the last."""
        enough = np.flatnonzero(self.empty(form) >= WANTED_EMPTY)
        return int(enough[0]) if len(enough) else len(THRESHOLDS) - 1


@torch.inference_mode()
def ask(model: ClipSeg, source: ToySource, *, seed: int) -> Answers:
    """Prompt a decoder for every phrase that is true of a scene, and for a few that are not.

    Args:
        model: any decoder.
        source: the scenes and their phrases.
        seed: for drawing examples and absent phrases.
    """
    rng = np.random.default_rng(seed)
    pairs, triplets = source.pairs, CLIPSEG_RECIPES.load("toy").triplets
    present: dict[str, list[ForegroundStatistics]] = {form: [] for form in _SHOWN}
    absent: dict[str, list[npt.NDArray[np.float64]]] = {form: [] for form in _SHOWN}
    limits = np.array(THRESHOLDS, np.float32)
    for image in np.unique(pairs.image).tolist():
        own = np.flatnonzero(pairs.image == image)
        examples = [source.read(pair) for pair in own.tolist()]
        other = [phrase for phrase in range(len(pairs.phrases)) if not pairs.may_hold(image, phrase)]
        drawn = rng.permutation(other)[:_ABSENT].tolist()
        phrases = [*pairs.phrase[own].tolist(), *drawn]
        activations = model.encode_image(_pixels([examples[0].image]))
        shown = [_example(source, phrase, image, rng) for phrase in phrases]
        for form, style in _SHOWN.items():
            if form == "text":
                indices = list(range(len(phrases)))
                conditionals = model.encode_text([pairs.phrases[phrase][0] for phrase in phrases])
            else:
                indices = [number for number, pair in enumerate(shown) if pair is not None]
                pictures = [
                    _picture(source, pair, style, triplets, rng) for pair in shown if pair is not None
                ]
                conditionals = model.encode_prompt_images(_pixels(pictures))
            found = model.decode(activations, conditionals)[0].sigmoid().numpy()
            for number, answer in zip(indices, found, strict=True):
                if number < len(examples):
                    kind = KINDS.index(kind_of(pairs.phrases[phrases[number]][0]))
                    present[form].append(
                        ForegroundStatistics.of(answer, examples[number].mask == OBJECT, kind)
                    )
                else:
                    absent[form].append((answer[None] > limits[:, None, None]).mean((1, 2)))
    return Answers(
        {form: ForegroundStatistics.merge(parts) for form, parts in present.items()},
        {form: np.array(parts) for form, parts in absent.items()},
    )


def _example(source: ToySource, phrase: int, image: int, rng: np.random.Generator) -> int | None:
    """A pair with the phrase from another scene, as the scene itself would show the answer; None if none."""
    members = source.pairs.members(phrase)
    others = members[source.pairs.image[members] != image]
    return int(rng.choice(others)) if len(others) else None


def _picture(
    source: ToySource, pair: int, style: str, triplets: TripletSettings, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """An example picture (S, S, 3), prepared as in training."""
    image, mask, _ = crop_by_settings(source.read(pair), triplets.support_size, triplets, rng)
    return support_image(image, mask == OBJECT, style, rng).transpose(1, 2, 0)


def _pixels(images: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
    return normalize(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))


def _prompt_figures(model: ClipSeg, title: str, seed: int, scenes: int) -> dict[str, dict[str, float]]:
    """Figures of a decoder, over all phrases and by kind."""
    answers = ask(model, _phrases(seed, scenes), seed=seed)
    chosen_on = ask(model, _phrases(seed + THRESHOLD_SEED, scenes), seed=seed)
    limits = {form: chosen_on.best_threshold(form) for form in _SHOWN}
    strict = chosen_on.strict_threshold("text")
    figures = {title: _figures(answers.present, limits)}
    figures[title] |= {
        "empty": float(answers.empty("text")[strict]),
        "text_iou_strict": float(foreground_iou(answers.present["text"], STANDARD)[strict]),
    }
    for number, kind in enumerate(KINDS):
        figures[f"{title}: {kind}"] = _figures(
            {form: statistics.of_class(number) for form, statistics in answers.present.items()}, limits
        )
    return figures


def _phrases(seed: int, scenes: int) -> ToySource:
    return open_toy_source(open_toyworld(split=f"seed-{seed}", count=scenes, size=_SIDE))


def _figures(present: Mapping[str, ForegroundStatistics], limits: Mapping[str, int]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for form, statistics in present.items():
        name = form.replace(" ", "_")
        figures[f"{name}_iou"] = float(foreground_iou(statistics, STANDARD)[limits[form]])
        figures[f"{name}_ap"] = average_precision(statistics, STANDARD)
    return figures


@torch.inference_mode()
def _label_figures(model: ClipSeg, title: str, seed: int, scenes: int) -> dict[str, dict[str, float]]:
    """MIoU of a decoder's label maps."""
    conditionals = model.encode_text(CLASSES)

    def probabilities(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = model(_pixels([image]), conditionals)[0].sigmoid().numpy()
        return found

    # The truth of unseen classes counts as unknown, so the threshold is chosen on the seen ones.
    made = scene_set(seed + THRESHOLD_SEED, scenes, _SIDE)
    chosen_on = ForegroundStatistics.merge(
        ForegroundStatistics.of(found[number], truth == number, number)
        for image, truth in zip(made.images, made.labels, strict=True)
        for found in [probabilities(image)]
        for number in _SEEN
    )
    limit = THRESHOLDS[int(np.nanargmax(mean_iou(chosen_on, STANDARD)))]
    made = scene_set(seed, scenes, _SIDE)
    found = [probabilities(image) for image in made.images]
    highest, alone = _label_rows(title)
    return {
        highest: _mious([_one_hot(part.argmax(0)) for part in found], made.labels),
        alone: _mious([part > limit for part in found], made.labels),
    }


@torch.inference_mode()
def _teacher(seed: int, scenes: int) -> dict[str, float]:
    """MIoU of the teacher's label maps."""
    precision = native_precision(best_device())
    ontology = load_ontology("toyworld")
    teacher = prepare_labeller(RECIPES["toy"], ontology, precision=precision).build(precision=precision)
    made = scene_set(seed, scenes, _SIDE)
    found = [teacher.label([image], [image.shape[:2]])[0].labels for image in made.images]
    return _mious([_one_hot(labels) for labels in found], made.labels)


def _mious(masks: Sequence[npt.NDArray[np.bool_]], truths: npt.NDArray[Any]) -> dict[str, float]:
    """MIoU over unseen, seen and all classes, from N masks (C, H, W) and true labels (N, H, W)."""
    counts = np.zeros((len(CLASSES), 3), np.int64)
    for mask, truth in zip(masks, truths, strict=True):
        true = _one_hot(truth)
        pairs = ((mask & true), (mask & ~true), (~mask & true))
        counts += np.stack([part.sum((1, 2)) for part in pairs], 1)
    return {
        name: mean_of_defined(ratio(counts[classes, 0], counts[classes].sum(1)))
        for name, classes in (
            ("miou_unseen", _UNSEEN), ("miou_seen", _SEEN), ("miou", [*range(len(CLASSES))]),
        )
    }  # fmt: skip


def _one_hot(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = labels[None] == np.arange(len(CLASSES))[:, None, None]
    return mask
