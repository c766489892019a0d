"""``maskmill benchmark toyworld``: the papers' claims at toy scale, with seeds and confidence intervals.

Everything runs on fresh scenes of the toy world with the bundled small CLIP, through the same Labeller as
real images. Claims that do not hold here are reported as such.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np

from jobs.benchmarks.rows import claim, interval, row
from models.catalogue import HEADS, REFINERS
from models.device import best_device, native_precision
from models.settings import MaskClipSettings
from pipeline.evaluation.results import Claim, Section
from pipeline.files import images
from pipeline.files.corruptions import CORRUPTIONS, LEVELS, corrupt
from pipeline.labelling.calibrating import calibrated, count_scores, plain_scores
from pipeline.labelling.labeller import Labeller
from pipeline.labelling.maskclip import MaskClipLabeller
from pipeline.labelling.prepare import prepare_labeller
from pipeline.labelling.recipes import RECIPES, LabelRecipe, change_recipe
from pipeline.metrics.statistics import SegmentationStatistics, summarise
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology
from pipeline.toyworld import phrases as toyphrases
from pipeline.toyworld.scenes import ToySet, generate

PAPER = "Zhou et al., ECCV 2022"
CORPUS_SEED = 1000
"""Offset from the seed of the evaluation scenes to that of an unlabelled corpus."""


@dataclass(frozen=True)
class Condition:
    """One thing to measure.

    Attributes:
        name: title of the row.
        settings: changes to the recipe ``toy``.
        ontology: the classes; None for the toy world's.
        size: side of the scenes in pixels.
        corruption: name and level.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    ontology: Ontology | None = None
    size: int = 128
    corruption: tuple[str, int] | None = None

    @property
    def key(self) -> str:
        """Identifies the measurement, whatever the name of the row."""
        classes = self.ontology.hash if self.ontology else ""
        return repr((sorted(self.settings.items()), self.size, self.corruption, classes))


class Bench:
    """Measures conditions on the same scenes in a process pool, each condition once.

    Args:
        seeds: seeds of the scene sets.
        scenes: scenes per set.
        progress: called after each condition with the number done.
        workers: processes. Each uses one thread, as contention between threads would halve the speed.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        scenes: int,
        progress: Callable[[int], None] = lambda _done: None,
        *,
        workers: int = 1,
    ) -> None:
        self.seeds = tuple(seeds)
        self.scenes = scenes
        self.ontology = load_ontology("toyworld")
        self._progress = progress
        self._runs: dict[str, Future[dict[str, list[float]]]] = {}
        self._pool = ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn"), initializer=_use_one_thread
        )

    def close(self) -> None:
        """Shut down the process pool."""
        self._pool.shutdown(cancel_futures=True)

    def start(self, conditions: Iterable[Condition]) -> None:
        """Submit the conditions that are new, without waiting for them."""
        for condition in conditions:
            if condition.key not in self._runs:
                future = self._pool.submit(measure, condition, self.seeds, self.scenes)
                future.add_done_callback(lambda _: self._progress(self.done))
                self._runs[condition.key] = future

    @property
    def done(self) -> int:
        """Number of conditions measured so far."""
        return sum(future.done() for future in self._runs.values())

    def runs(self, condition: Condition) -> dict[str, list[float]]:
        """MIoU and pixel accuracy of a condition, one figure per seed."""
        self.start([condition])
        return self._runs[condition.key].result()

    def section(
        self,
        name: str,
        title: str,
        conditions: Sequence[Condition],
        *,
        note: str = "",
        chart: Literal["bars", "lines"] | None = "bars",
    ) -> Section:
        """A section with one row per condition."""
        self.start(conditions)
        return Section(
            name=name,
            title=title,
            note=note,
            chart=chart,
            metrics=("miou", "pixel_accuracy"),
            rows=tuple(row(condition.name, self.runs(condition)) for condition in conditions),
        )


def measure(condition: Condition, seeds: Sequence[int], scenes: int) -> dict[str, list[float]]:
    """MIoU and pixel accuracy of a condition, one figure per seed."""
    recipe = change_recipe(RECIPES["toy"], condition.settings)
    ontology = condition.ontology or load_ontology("toyworld")
    found: dict[str, list[float]] = {"miou": [], "pixel_accuracy": []}
    labeller = None
    for seed in seeds:
        if labeller is None or recipe.maskclip.classes.calibrate:
            labeller = build_labeller(recipe, ontology, seed)
        made = scene_set(seed, scenes, condition.size)
        total = SegmentationStatistics.zero(ontology.num_classes)
        for index, (image, truth) in enumerate(zip(made.images, made.labels, strict=True)):
            if condition.corruption:
                image = corrupt(image, *condition.corruption, seed=index)
            size = (image.shape[0], image.shape[1])
            prediction = labeller.label([images.fit(image, recipe.images)], [size])[0]
            total = total + SegmentationStatistics.of(
                truth,
                prediction.labels,
                None,
                ontology.num_classes,
                ontology.ignore_index,
                boundary=False,
            )
        summary = summarise(total)
        for metric, values in found.items():
            values.append(summary[metric])
    return found


def build_labeller(recipe: LabelRecipe, ontology: Ontology, seed: int) -> Labeller:
    """A Labeller; if its recipe asks for a first pass, that is over other scenes, those of students."""
    precision = native_precision(best_device())
    classes = recipe.maskclip.classes
    if classes.uncalibrated:
        plain = prepare_labeller(plain_scores(recipe), ontology, precision=precision)
        scenes = generate(seed + CORPUS_SEED, classes.calibrate_images, 128).images
        first = cast(MaskClipLabeller, plain.build(precision=precision))
        fitted = [images.fit(image, recipe.images) for image in scenes]
        recipe = calibrated(recipe, count_scores(first, fitted))
    return prepare_labeller(recipe, ontology, precision=precision).build(precision=precision)


@lru_cache(maxsize=16)
def scene_set(seed: int, scenes: int, size: int) -> ToySet:
    """The cached scenes of a seed."""
    return generate(seed, scenes, size)


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def heads(bench: Bench) -> tuple[Section, list[Claim]]:
    """MaskCLIP against unmodified CLIP."""
    conditions = {
        head: Condition(entry.title, {"head": head}) for head, entry in HEADS.items() if entry.alone
    }
    section = bench.section(
        "heads",
        "MaskCLIP against the unmodified CLIP",
        list(conditions.values()),
        note="The same weights, another head in each row. Training with patch dropout favours the values of "
        "the last block over its output, and its tokens are local already, so the published order of the "
        "other heads does not show here. Heads with a helper are left out: no helper knows the toy world.",
    )
    runs = {head: bench.runs(condition)["miou"] for head, condition in conditions.items()}
    source = f"{PAPER}, section 3.2"
    return section, [
        claim(
            "MaskCLIP beats the unmodified CLIP by 15 points of mIoU",
            source,
            runs["maskclip"],
            runs["plain"],
            margin=0.15,
        ),
        claim(
            "The value path alone beats the unmodified CLIP by 15 points of mIoU",
            source,
            runs["value"],
            runs["plain"],
            margin=0.15,
        ),
    ]


def refinement(bench: Bench) -> tuple[Section, list[Claim]]:
    """Key smoothing and prompt denoising, for both variants of MaskCLIP."""
    options: dict[str, dict[str, Any]] = {
        "no refinement": {},
        "+ key smoothing": {"ks_threshold": 1.0},
        "+ key smoothing, channel axis": {"ks_threshold": 1.0, "ks_axis": "channel"},
        "+ prompt denoising": {"pd_threshold": 0.5},
        "+ both": {"ks_threshold": 1.0, "pd_threshold": 0.5},
    }
    conditions = {
        (head, name): Condition(f"{head}: {name}", {"head": head, **settings})
        for head in ("maskclip", "value")
        for name, settings in options.items()
    }
    section = bench.section(
        "refinement",
        "Key smoothing and prompt denoising",
        list(conditions.values()),
        note="Thresholds 1.0 and 0.5, as in the paper. The published code normalises keys along the token "
        "axis, the paper says per key (channel axis).",
    )
    source = f"{PAPER}, section 3.3"
    base = bench.runs(conditions["maskclip", "no refinement"])["miou"]
    return section, [
        claim(f"{text} raises mIoU", source, bench.runs(conditions["maskclip", name])["miou"], base)
        for text, name in (
            ("Key smoothing", "+ key smoothing"),
            ("Prompt denoising", "+ prompt denoising"),
            ("Key smoothing with prompt denoising", "+ both"),
        )
    ]


def refiners(bench: Bench) -> tuple[Section, list[Claim]]:
    """Refinement by the image, of the toy's own head and of MaskCLIP's."""
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "none": ("not refined", {}),
        **{name: (entry.title, {"refine": name}) for name, entry in REFINERS.items()},
        "pamr, near": (
            "pixel-adaptive mean (PAMR), distances 1, 2, 4, 8",
            {"refine": "pamr", "refine_dilations": (1, 2, 4, 8)},
        ),
    }
    conditions = {
        (head, name): Condition(f"{head}: {title}", {"head": head, **settings})
        for head in ("value", "nn")
        for name, (title, settings) in options.items()
    }
    section = bench.section(
        "refiners",
        "Refinement by the image",
        list(conditions.values()),
        note="Scores are refined at the image's own size. Toy things have sharp edges and fine textures: "
        "refiners that follow colours alone see textures as edges.",
    )
    base = bench.runs(conditions["value", "none"])["miou"]
    return section, [
        claim(f"{entry.title} raises mIoU", "MaskMill", bench.runs(conditions["value", name])["miou"], base)
        for name, entry in REFINERS.items()
    ]


def sizes(bench: Bench) -> tuple[Section, list[Claim]]:
    """Network size, and windows at native resolution, on scenes of 256 px."""
    whole = {
        side: Condition(f"whole image at {side} px", {"scale": (side, side)}, size=256)
        for side in (64, 96, 128, 192, 256)
    }
    windows = [
        Condition(
            f"windows of {window} px, stride {window // 2}",
            {"scale": (256, 256), "window": window, "window_stride": window // 2},
            size=256,
        )
        for window in (64, 128)
    ]
    section = bench.section(
        "sizes",
        "Image size and windows",
        [*whole.values(), *windows],
        note="Scenes of 256 px; the network was trained at 128 px.",
    )
    return section, [
        claim(
            "Windows at native resolution beat the whole image at that resolution",
            "protocol of MaskCLIP's successors",
            bench.runs(windows[1])["miou"],
            bench.runs(whole[256])["miou"],
        ),
        claim(
            "The size that the network was trained at beats half of it",
            f"{PAPER}, 224 px ablation",
            bench.runs(whole[128])["miou"],
            bench.runs(whole[64])["miou"],
        ),
    ]


def corruptions(bench: Bench) -> tuple[Section, list[Claim]]:
    """Each corruption at each level."""
    clean = bench.runs(Condition("clean"))
    worse = {
        (name, level): Condition(f"{name} {level}", corruption=(name, level))
        for name in CORRUPTIONS
        for level in LEVELS
    }
    bench.start(worse.values())
    rows = [row("clean", clean, series="clean", x=0)]
    claims = []
    for name in CORRUPTIONS:
        levels = []
        for level in LEVELS:
            runs = bench.runs(worse[name, level])
            levels.append(runs["miou"])
            rows.append(row(f"{name} {level}", runs, series=name, x=level))
        claims.append(
            claim(
                f"{name.replace('_', ' ')} at level 5 lowers mIoU",
                f"{PAPER}, robustness",
                clean["miou"],
                levels[4],
            )
        )
    return Section(
        name="corruptions",
        title="Corruptions, levels 1 to 5",
        note="Applied at native size before resizing. Toy textures are fine-grained: noise and blur "
        "destroy what distinguishes the classes far sooner than in photographs.",
        chart="lines",
        metrics=("miou", "pixel_accuracy"),
        rows=tuple(rows),
    ), claims


def words(bench: Bench) -> tuple[Section, list[Claim]]:
    """Templates and synonyms."""
    templates = {
        name: Condition(f"templates: {title}", ontology=_with(bench.ontology, templates=name))
        for name, title in {
            "name": "the bare class name",
            "simple": "“a photo of a {}.”",
            "toyworld": "four short ones",
            "imagenet80": "80 of ImageNet",
            "openai85": "85 of the paper",
        }.items()
    }
    merges = {
        merge: Condition(f"synonyms, {merge} over prompts", ontology=_with_synonyms(bench.ontology, merge))
        for merge in ("max", "mean")
    }
    section = bench.section(
        "words",
        "Templates and synonyms",
        [*templates.values(), *merges.values()],
        note="Synonyms are the plural and a pattern word (“zebra”, “zebras”, “something striped”).",
    )
    base = bench.runs(templates["toyworld"])["miou"]
    return section, [
        claim(
            "85 templates beat the bare class name",
            f"{PAPER}, section 4.1 (prompt engineering)",
            bench.runs(templates["openai85"])["miou"],
            bench.runs(templates["name"])["miou"],
        ),
        claim(
            "Synonyms, mean over prompts, beat names alone",
            "MaskMill",
            bench.runs(merges["mean"])["miou"],
            base,
        ),
    ]


def vocabulary(bench: Bench) -> tuple[Section, list[Claim]]:
    """Words that are not class names: how well their scores find the cells they describe."""
    from models.clip.loading import load_clip
    from models.clip.text import build_text_classifier
    from models.maskclip import MaskClip

    clip = load_clip("toyclip", "bundled")
    groups = {
        "pattern words": toyphrases.PATTERN_WORDS,
        "colour words": toyphrases.COLOUR_WORDS,
        "compositions that no caption holds": toyphrases.COMPOSITIONS,
    }
    phrases = [phrase for group in groups.values() for phrase in group]
    text = build_text_classifier(clip, [[phrase] for phrase in phrases], templates=("a photo of {}", "{}"))
    model = MaskClip(clip, text, MaskClipSettings(head="value", image_stats="clip", profile="weights"))
    found: dict[str, list[float]] = {phrase: [] for phrase in phrases}
    within: dict[str, list[float]] = {phrase: [] for phrase in toyphrases.COMPOSITIONS}
    for seed in bench.seeds:
        made = scene_set(seed, bench.scenes, 128)
        cells = toyphrases.phrase_cells(made.images, made.labels, clip.stride)
        scores = np.concatenate([_grid(model, image) for image in made.images])
        for index, phrase in enumerate(phrases):
            found[phrase].append(toyphrases.auc(scores[:, index], cells[phrase]))
            if phrase in within:
                same = toyphrases.class_cells(made.labels, phrase, clip.stride)
                within[phrase].append(toyphrases.auc(scores[:, index][same], cells[phrase][same]))
    rows = [
        row(
            phrase,
            {"auc": found[phrase], **({"auc_within_class": within[phrase]} if phrase in within else {})},
        )
        for phrase in phrases
    ]
    source = f"{PAPER}, section 4.4 (novel concepts)"
    claims = [
        _above_chance(f"An open vocabulary: {title} find what they mean", source, found, list(group))
        for title, group in groups.items()
    ]
    claims.append(
        _above_chance(
            "A colour in a composition tells individuals of one class apart", source, within, list(within)
        )
    )
    return Section(
        name="vocabulary",
        title="Words that are no class name",
        note="How often a cell that the words describe outranks one that they do not (ROC AUC; 0.5 is "
        "chance). For compositions also within the cells of the class, where only the colour decides.",
        chart="bars",
        metrics=("auc", "auc_within_class"),
        rows=tuple(rows),
    ), claims


def _above_chance(
    text: str, source: str, found: Mapping[str, Sequence[float]], phrases: Sequence[str]
) -> Claim:
    seeds = range(len(found[phrases[0]]))
    means = [interval([found[phrase][seed] for phrase in phrases]).mean or np.nan for seed in seeds]
    made = claim(text, source, means, [0.5] * len(means), unit="AUC above chance, mean over the phrases")
    weak = [phrase for phrase in phrases if (interval(found[phrase]).low or 0) <= 0.5]
    if weak:
        return made.model_copy(
            update={"detail": f"{made.detail}; not certainly above chance: {', '.join(weak)}"}
        )
    return made


def _grid(model: Any, image: np.ndarray) -> np.ndarray:
    import torch

    scores: np.ndarray = model.grid_scores(torch.from_numpy(image).permute(2, 0, 1)[None]).cpu().numpy()
    return scores


def _with(ontology: Ontology, **changes: Any) -> Ontology:
    return Ontology.from_dict(ontology.to_dict() | changes)


def _with_synonyms(ontology: Ontology, merge: str) -> Ontology:
    from pipeline.toyworld.scenes import THINGS

    patterns = {name: phrase for phrase, name in toyphrases.PATTERN_WORDS.items()}
    classes = []
    for entry in ontology.to_dict()["classes"]:
        name = entry["name"]
        extra = ([f"{name}s"] if name in THINGS else []) + ([patterns[name]] if name in patterns else [])
        classes.append(entry | ({"synonyms": extra, "merge": merge} if extra else {}))
    return _with(ontology, classes=classes)
