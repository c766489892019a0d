"""CLIPSeg's tables: referring expressions, generalised zero-shot, one-shot, text prompts, the ablation.

A row is measured when its dataset and its weights are given. Weights are a decoder (the authors' ``.pth`` or
a file of this project), over the CLIP of the settings ``model`` and ``pretrained``; or a folder in Hugging
Face's layout, which brings its CLIP. ``PATH#3,7,9`` says which blocks the decoder reads, where the file does
not. ``{fold}`` in a path stands for the fold (0 to 3), ``{unseen}`` for the number of unseen classes: the
paper trained one model for each.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.benchmarks.maskclip import Request
from jobs.benchmarks.rows import row
from jobs.console import LOG_EVERY_S, duration
from models.errors import MaskMillError
from pipeline.datasets.oneshot import BENCHMARKS, class_areas, draw_episodes
from pipeline.datasets.registry import DATASETS, open_dataset
from pipeline.datasets.zeroshot import zero_shot_split
from pipeline.published import PublishedTable, Row, load_published

if TYPE_CHECKING:
    from models.clip import Clip
    from models.clipseg import ClipSeg
    from pipeline.datasets.phrasecut import PhraseCutDataset
    from pipeline.prompt_evaluation import Read

METHODS = ("CLIPSeg", "CLIP-Deconv", "ViTSeg")
"""Methods that can be measured here; of the others the published figures stand beside."""
NOT_RUN = ("CLIPSeg (PC+), independent re-run",)
SETTINGS = {"model": "ViT-B-16-quickgelu", "pretrained": "openai", "precision": "fp32"}
"""Settings of the tables and their defaults, which are the paper's."""
PRECISIONS = ("fp32", "bf16", "fp16")
SEED = 0
"""Of episodes and example images. The reference draws them without a seed."""

_ROOTS = {"phrasecut": "phrasecut", "pascal5i": "voc21", "coco20i": "cocoobject81", "voc21": "voc21"}
_TITLES = {
    "phrasecut": "PhraseCut, text prompts",
    "phrasecut/visual": "PhraseCut, image prompts",
    "pascal5i": "Pascal-5i, image prompts",
    "pascal5i/text": "Pascal-5i, text prompts",
    "coco20i": "COCO-20i, image prompts",
    "voc21/unseen10": "PASCAL VOC, 10 unseen classes",
    "voc21/unseen4": "PASCAL VOC, 4 unseen classes",
}
_MASKS_AT_ONCE = 32
_STANDARD = "standard"  # suffix of metrics under the standard convention

Values = dict[str, float]


def referring(request: Request) -> Iterator[dict[str, Any]]:
    """Table 3: PhraseCut by text."""
    yield from _sections("clipseg_referring", request, _phrasecut)


def zero_shot(request: Request) -> Iterator[dict[str, Any]]:
    """Table 4: all 21 classes of PASCAL VOC by name."""
    yield from _sections("clipseg_zero_shot", request, _zero_shot, _zero_shot_rows)


def one_shot(request: Request) -> Iterator[dict[str, Any]]:
    """Table 5: Pascal-5i by example image."""
    yield from _sections("clipseg_one_shot_pascal", request, _one_shot)


def one_shot_coco(request: Request) -> Iterator[dict[str, Any]]:
    """Table 6: COCO-20i by example image."""
    yield from _sections("clipseg_one_shot_coco", request, _one_shot)


def text_pascal(request: Request) -> Iterator[dict[str, Any]]:
    """Table 7: Pascal-5i by text."""
    yield from _sections("clipseg_text_pascal", request, _one_shot)


def ablation(request: Request) -> Iterator[dict[str, Any]]:
    """Table 9: PhraseCut by text and by example image."""
    yield from _sections("clipseg_ablation", request, _phrasecut)


# --- how a row is measured ----------------------------------------------------------------------------------


def _phrasecut(bench: _Bench, setting: str, line: Row) -> Values:
    from pipeline.prompt_evaluation import VISUAL_PROMPT, phrase_image_queries, phrase_queries

    dataset: PhraseCutDataset = bench.dataset(setting)
    limit = bench.request.limit
    if setting == "phrasecut/visual":
        # The model that was trained on highlighted examples is asked with such.
        style = "blur_highlight" if line.method.endswith("highlight mask") else VISUAL_PROMPT
        queries = phrase_image_queries(dataset, style=style, limit=limit, seed=SEED)
    else:
        queries = phrase_queries(dataset, limit=limit)
    return bench.foreground(setting, line, queries, "images")


def _one_shot(bench: _Bench, setting: str, line: Row) -> Values:
    from pipeline.prompt_evaluation import coco_queries, pascal_queries

    dataset = bench.dataset(setting)
    name, _, task = setting.partition("/")
    benchmark = BENCHMARKS[name]
    names = [sample.name for sample in dataset.samples]
    folds = []
    for fold in range(len(benchmark.folds)):
        episodes = draw_episodes(
            benchmark, fold, names, bench.areas(setting), seed=SEED, episodes=bench.request.limit or None
        )
        if name == "coco20i":
            queries = coco_queries(dataset, episodes)
        elif task == "text":
            queries = pascal_queries(dataset, episodes, style=None)
        else:
            queries = pascal_queries(dataset, episodes)
        folds.append(bench.foreground(setting, line, queries, "episodes", fold=fold))
    return {metric: float(np.mean([values[metric] for values in folds])) for metric in folds[0]}


def _zero_shot(bench: _Bench, setting: str, line: Row) -> Values:
    from pipeline.prompt_evaluation import RELEASED_SCORER, zero_shot_confusion, zero_shot_metrics

    dataset = bench.dataset(setting)
    unseen = setting.partition("/unseen")[2]
    model = bench.model(line, unseen=unseen)
    own = "{unseen}" in bench.request.weights[_title(line)]

    def run(progress: Callable[[int, int], None]) -> dict[str, Any]:
        found = zero_shot_confusion(model, dataset, limit=bench.request.limit, progress=progress)
        return {"confusion": found.tolist()}

    # One model for both numbers of unseen classes is run once.
    name = f"voc21 {f'unseen{unseen} ' if own else ''}{_title(line)}"
    found = bench.measured(name, [dataset.fingerprint(), model.fingerprint], "images", run)
    confusion = np.array(found["confusion"], np.int64)
    split = f"pascal-unseen{unseen}"
    values = zero_shot_metrics(confusion, zero_shot_split(split).unseen_ids)
    released = zero_shot_metrics(confusion, zero_shot_split(RELEASED_SCORER[split]).unseen_ids)
    return values | {f"released_{metric}": value for metric, value in released.items()}


def _zero_shot_rows(
    title: str, values: Values, published: Mapping[str, float], source: str | None, missing: str | None
) -> list[dict[str, Any]]:
    """A measured row three times, as it is not known which order of columns the paper prints."""
    ours = {metric: value for metric, value in values.items() if not metric.startswith("released_")}
    rows = [_row(title, ours, published, source, missing)]
    if values:
        exchanged = {_EXCHANGED.get(metric, metric): value for metric, value in published.items()}
        rows.append(_row(f"{title}, published columns exchanged", ours, exchanged, source, None))
        released = {_EXCHANGED.get(metric, metric): values[f"released_{metric}"] for metric in ours}
        rows.append(_row(f"{title}, counted as the released scorer does", released, published, source, None))
    return rows


_EXCHANGED = {"miou_seen": "miou_unseen", "miou_unseen": "miou_seen"}


# --- what the tables share ----------------------------------------------------------------------------------

Measure = Callable[["_Bench", str, Row], Values]
Rows = Callable[[str, Values, Mapping[str, float], "str | None", "str | None"], list[dict[str, Any]]]


def _row(
    title: str, values: Values, published: Mapping[str, float], source: str | None, missing: str | None
) -> dict[str, Any]:
    runs = {metric: [value] for metric, value in values.items()}
    return row(title, runs, published=published, source=source, missing=missing)


def _one_row(
    title: str, values: Values, published: Mapping[str, float], source: str | None, missing: str | None
) -> list[dict[str, Any]]:
    return [_row(title, values, published, source, missing)]


def _sections(
    name: str, request: Request, measure: Measure, rows: Rows = _one_row
) -> Iterator[dict[str, Any]]:
    """One section for each dataset of a published table, one row (or more, by ``rows``) for each method."""
    table = load_published(name)
    bench = _Bench(request, table)
    for setting in dict.fromkeys(column.dataset for column in table.columns):
        root = _ROOTS[setting.partition("/")[0]]
        if request.datasets and not {root, setting, setting.partition("/")[0]} & set(request.datasets):
            continue
        columns = [i for i, column in enumerate(table.columns) if column.dataset == setting]
        metrics = [table.columns[i].metric for i in columns]
        found = []
        for line in table.rows:
            published = {
                table.columns[i].metric: round(value / 100, 6)
                for i in columns
                if (value := line.values[i]) is not None
            }
            if not published and not _can_run(line):
                continue  # a method that the paper compares with on another of the sets
            values, missing = bench.attempt(setting, line, measure)
            source = str(table.source_of(line)) if published else None
            found += rows(_title(line), values, published, source, missing)
        extra = (
            ["hiou", "miou"]
            if setting.startswith("voc21/")
            else [f"{metric}_{_STANDARD}" for metric in metrics]
        )
        yield {
            "name": setting.replace("/", "-"),
            "title": _TITLES[setting],
            "note": bench.note(setting),
            "chart": "bars",
            "metrics": [*metrics, *extra],
            "rows": found,
        }


class _Bench:
    """What the rows of a table share: opened datasets, the CLIP, results of earlier runs.

    Raises:
        MaskMillError: ``option_invalid`` for weights of a row that the table does not have, or a setting
            that these tables do not.
    """

    def __init__(self, request: Request, table: PublishedTable) -> None:
        self.request = request
        self.table = table
        known = [_title(line) for line in table.rows if _can_run(line)]
        unknown = [name for name in request.weights if name not in known]
        if unknown:
            raise MaskMillError(
                "option_invalid",
                f"--weights: the table has no row {unknown[0]!r} that is measured here.",
                f"Its rows: {'; '.join(known)}.",
            )
        wrong = [name for name in request.settings if name not in SETTINGS]
        if wrong:
            raise MaskMillError(
                "option_invalid",
                f"The tables of CLIPSeg have no setting {wrong[0]!r}; their protocol is fixed.",
                f"Settings: {', '.join(SETTINGS)}.",
            )
        self._settings = SETTINGS | dict(request.settings)
        if self._settings["precision"] not in PRECISIONS:
            raise MaskMillError(
                "option_invalid",
                f"precision cannot be {self._settings['precision']!r}.",
                f"Use one of {', '.join(PRECISIONS)}.",
            )
        self._datasets: dict[str, Any] = {}
        self._areas: dict[str, np.ndarray] = {}
        self._loaded: tuple[Any, ClipSeg] | None = None

    def attempt(self, setting: str, line: Row, measure: Measure) -> tuple[Values, str | None]:
        """Figures of a row, or what it lacks."""
        if not _can_run(line):
            return {}, None
        if self.request.rows and not any(part in _title(line) for part in self.request.rows):
            return {}, "not asked for"
        lacking = self._lacking(setting, line)
        if lacking:
            return {}, lacking
        try:
            return measure(self, setting, line), None
        except MaskMillError as error:
            if error.code == "output_differs":
                raise
            return {}, f"{error.code}: {error.message}"

    def _lacking(self, setting: str, line: Row) -> str | None:
        name, title = _ROOTS[setting.partition("/")[0]], _title(line)
        parts = []
        if name not in self.request.roots:
            parts.append(f"{DATASETS[name].source.title}: --root {name}=DIR{_split_hint(setting)}")
        if title not in self.request.weights:
            parts.append(f"its weights: --weights '{title}=PATH'{_weights_hint(setting, line)}")
        return f"needs {'; and '.join(parts)}" if parts else None

    def dataset(self, setting: str) -> Any:
        """The opened dataset of a setting."""
        name, _, _ = setting.partition("/")
        if name not in self._datasets:
            root, _, split = self.request.roots[_ROOTS[name]].partition("#")
            usual = BENCHMARKS[name].split if name in BENCHMARKS else None
            self._datasets[name] = open_dataset(_ROOTS[name], root=root, split=split or usual)
        return self._datasets[name]

    def areas(self, setting: str) -> np.ndarray:
        """Pixels of each class in each image, from which episodes are drawn."""
        name = setting.partition("/")[0]
        if name not in self._areas:
            dataset = self.dataset(setting)
            parts = []
            with self._progress(f"{name}: what each image shows", "masks") as progress:
                for start in range(0, len(dataset.samples), _MASKS_AT_ONCE):
                    some = dataset.samples[start : start + _MASKS_AT_ONCE]
                    parts.append(class_areas(dataclasses.replace(dataset, samples=some)))
                    progress(start + len(some), len(dataset.samples))
            self._areas[name] = np.concatenate(parts)
        return self._areas[name]

    def foreground(
        self, setting: str, line: Row, queries: Sequence[Read], unit: str, *, fold: int | None = None
    ) -> Values:
        """Figures of a model over queries, under CLIPSeg's convention and the standard one."""
        from pipeline.metrics.foreground import CLIPSEG, STANDARD, summarise
        from pipeline.prompt_evaluation import score

        model = self.model(line, **({} if fold is None else {"fold": str(fold)}))
        threshold = line.threshold if isinstance(line.threshold, float) else None

        def run(progress: Callable[[int, int], None]) -> dict[str, Any]:
            statistics = score(model, queries, progress=progress)
            ours = summarise(statistics, CLIPSEG, threshold=threshold)
            standard = summarise(statistics, STANDARD, threshold=threshold)
            return ours | {f"{metric}_{_STANDARD}": value for metric, value in standard.items()}

        name = f"{setting} {_title(line)}" + ("" if fold is None else f" fold {fold}")
        identity = [self.dataset(setting).fingerprint(), model.fingerprint, threshold]
        found = self.measured(name, identity, unit, run)
        columns = [column.metric for column in self.table.columns if column.dataset == setting]
        return {metric: found[metric] for column in columns for metric in (column, f"{column}_{_STANDARD}")}

    def measured(
        self,
        name: str,
        identity: list[Any],
        unit: str,
        run: Callable[[Callable[[int, int], None]], dict[str, Any]],
    ) -> dict[str, Any]:
        """What ``run`` finds, or found in an earlier run into the same folder.

        Raises:
            MaskMillError: ``output_differs`` if the earlier run was of something else.
        """
        key = [*identity, self.request.limit, str(self._settings["precision"])]
        file = self.request.folder / "rows" / f"{_slug(name)}.json"
        if file.exists():
            earlier = json.loads(file.read_text())
            if earlier["key"] != key:
                raise MaskMillError(
                    "output_differs",
                    f"{file} was measured on other data, with other weights or another --limit.",
                    "Name another --output.",
                )
            found = earlier["found"]
        else:
            with self._progress(name, unit) as progress:
                found = {metric: _or_none(value) for metric, value in run(progress).items()}
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.name}.{os.getpid()}")
            temporary.write_text(json.dumps({"key": key, "found": found}) + "\n")
            os.replace(temporary, file)
        return {metric: math.nan if value is None else value for metric, value in found.items()}

    @contextmanager
    def _progress(self, name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        console = self.request.console
        console.print(f"[bold]{name}[/bold]", highlight=False)
        began = last = time.monotonic()
        with console.status(name) as status:

            def report(done: int, total: int) -> None:
                nonlocal last
                now = time.monotonic()
                left = duration((now - began) / done * (total - done))
                text = f"{name}: {done:,} of {total:,} {unit}, about {left} left"
                status.update(text)
                if not console.is_terminal and now - last >= LOG_EVERY_S:
                    last = now
                    console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, soft_wrap=True)

            yield report

    def note(self, setting: str) -> str:
        """What to know about a section before comparing."""
        name = setting.partition("/")[0]
        parts = []
        dataset = self._datasets.get(name)
        if dataset is not None:
            whole = DATASETS[dataset.name].official.get(dataset.split)
            proper = BENCHMARKS[name].split if name in BENCHMARKS else dataset.split
            if dataset.split != proper:
                parts.append(f"On {dataset.split}, not on {proper}: not comparable with the benchmark.")
            elif whole is not None and whole != len(dataset.samples):
                parts.append(
                    f"{len(dataset.samples):,} of the benchmark's {whole:,} images: not comparable with it."
                )
            if self.request.limit:
                unit = "episodes of each fold" if name in BENCHMARKS else "images"
                parts.append(f"Only {self.request.limit:,} {unit}: not comparable with published figures.")
            if str(self._settings["pretrained"]).startswith("random:"):
                parts.append("The CLIP has random weights: this proves the path and says nothing else.")
            placeholder = _placeholder(setting)
            shared = [title for title, path in self.request.weights.items() if placeholder not in path]
            if placeholder and shared:
                parts.append(
                    f"Measured with one model throughout, whose training may have seen the classes asked "
                    f"for: {'; '.join(shared)}."
                )
        return " ".join([*parts, *self.table.notes])

    # --- models ---------------------------------------------------------------------------------------------

    def model(self, line: Row, **numbers: str) -> ClipSeg:
        """The model of a row, in evaluation mode.

        Args:
            line: the row.
            **numbers: what placeholders in the path of its weights stand for.

        Raises:
            MaskMillError: as ``models.clipseg_weights.load_clipseg``.
        """
        path, _, blocks = self.request.weights[_title(line)].partition("#")
        for name, number in numbers.items():
            path = path.replace(f"{{{name}}}", number)
        key = (line.method, path, _layers(blocks))
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # two models need not be in memory at once
            self._loaded = (key, self._load(*key))
        return self._loaded[1]

    def _load(self, method: str, path: str, layers: tuple[int, ...] | None) -> ClipSeg:
        from models.clipseg_weights import load_clipseg
        from models.precision import best_device

        if method.startswith("CLIP-Deconv"):
            return _clip_deconv(self._clip, Path(path), layers)
        if method.startswith("ViTSeg"):
            return _vitseg(self._clip, Path(path), layers, str(self._settings["pretrained"]))
        decoder_only = Path(path).expanduser().is_file()
        random = str(self._settings["pretrained"]).startswith("random:")
        if method.endswith("no CLIP pre-training") and decoder_only and not random:
            raise MaskMillError(
                "clip_missing",
                f"{path} holds a decoder without its CLIP, whose weights are random in this row: give "
                "--row 'no CLIP' --set pretrained=random:SEED, or a folder with decoder and CLIP.",
                "Name the CLIP that the decoder was trained on.",
            )
        if layers is None and method.endswith("only layer 3"):
            layers = (3,)
        return load_clipseg(
            path,
            clip=self._clip if decoder_only else None,
            extract_layers=layers,
            device=best_device(),
            dtype=self._dtype,
        )

    @cached_property
    def _clip(self) -> Clip:
        from models.clip import load_clip
        from models.precision import best_device

        return load_clip(
            str(self._settings["model"]),
            self._settings["pretrained"],
            device=best_device(),
            dtype=self._dtype,
        )

    @property
    def _dtype(self) -> Any:
        from models.precision import DTYPES

        return DTYPES[str(self._settings["precision"])]


def _clip_deconv(clip: Clip, path: Path, layers: tuple[int, ...] | None) -> ClipSeg:
    from models.clipseg_baselines import ClipDeconvConfig, build_clip_deconv

    state = _baseline_state(path, ("film_mul.weight", "reduce2.0.weight"))
    config = ClipDeconvConfig(
        reduce_dim=len(state["film_mul.weight"]),
        reduce2_dim=len(state["reduce2.0.weight"]),
        extract_layer=layers[0] if layers else ClipDeconvConfig().extract_layer,
    )
    return _filled(build_clip_deconv(clip, config), state, path)


def _vitseg(clip: Clip, path: Path, layers: tuple[int, ...] | None, pretrained: str) -> ClipSeg:
    from models.clipseg_baselines import ViTSegConfig, build_vitseg

    state = _baseline_state(path, ("film_mul.weight",))
    config = ViTSegConfig(
        reduce_dim=len(state["film_mul.weight"]),
        extract_layers=layers or ViTSegConfig().extract_layers,
    )
    # A trial with a random CLIP has no use for a download of the other tower.
    tower = pretrained if pretrained.startswith("random:") else "pretrained"
    return _filled(build_vitseg(clip, config, weights=tower), state, path)


def _baseline_state(path: Path, needed: Sequence[str]) -> dict[str, Any]:
    from models.weights import read_state

    path = path.expanduser()
    if not path.is_file():
        raise MaskMillError("weights_missing", f"There is no file {path}.", "Check the path.")
    state = read_state(path)
    absent = [name for name in needed if name not in state]
    if absent:
        raise MaskMillError(
            "weights_do_not_fit", f"{path} has no {', '.join(absent)}.", "Give the decoder of this baseline."
        )
    return state


def _filled(model: ClipSeg, state: Mapping[str, Any], path: Path) -> ClipSeg:
    try:
        model.decoder.load_state_dict(state)
    except RuntimeError as error:
        raise MaskMillError(
            "weights_do_not_fit",
            f"The tensors of {path} are not those of this baseline: {' '.join(str(error).split())[:400]}",
            "Give the decoder's state_dict, and the CLIP it was trained on as --set model=....",
        ) from error
    return model


def _layers(blocks: str) -> tuple[int, ...] | None:
    if not blocks:
        return None
    try:
        return tuple(int(block) for block in blocks.split(","))
    except ValueError as error:
        raise MaskMillError(
            "option_invalid", f"#{blocks} is no list of blocks.", "Write them as in rd64-uni.pth#3,7,9."
        ) from error


def _can_run(line: Row) -> bool:
    return line.method.startswith(METHODS) and line.method not in NOT_RUN


def _title(line: Row) -> str:
    return f"{line.method} ({line.model})" if line.model else line.method


def _placeholder(setting: str) -> str:
    """What in a path of weights tells the models of a setting apart; empty if there is one."""
    return "{unseen}" if setting.startswith("voc21/") else "{fold}" if _folds(setting) else ""


def _folds(setting: str) -> bool:
    return setting.partition("/")[0] in BENCHMARKS


def _split_hint(setting: str) -> str:
    return f" (split {BENCHMARKS['coco20i'].split}; another as DIR#SPLIT)" if setting == "coco20i" else ""


def _weights_hint(setting: str, line: Row) -> str:
    if _folds(setting):
        return ", with {fold} in PATH for the model of each fold"
    if setting.startswith("voc21/"):
        return ", with {unseen} in PATH for the models trained without 10 and without 4 classes"
    if line.method.endswith("no CLIP pre-training"):
        return ", and its CLIP: --set pretrained=random:SEED"
    return ""


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _slug(text: str) -> str:
    spelled = text.lower().replace("+", " plus ")  # PC and PC+ are different rows
    return "-".join("".join(letter if letter.isalnum() else " " for letter in spelled).split())


TABLES: Mapping[str, tuple[str, Callable[[Request], Iterator[dict[str, Any]]]]] = {
    "clipseg-referring": ("CLIPSeg: referring expressions on PhraseCut", referring),
    "clipseg-zero-shot": ("CLIPSeg: generalised zero-shot segmentation on PASCAL VOC", zero_shot),
    "clipseg-one-shot": ("CLIPSeg: one-shot segmentation on Pascal-5i, image prompts", one_shot),
    "clipseg-one-shot-coco": ("CLIPSeg: one-shot segmentation on COCO-20i, image prompts", one_shot_coco),
    "clipseg-text-pascal": ("CLIPSeg: Pascal-5i with text prompts", text_pascal),
    "clipseg-ablation": ("CLIPSeg: ablation on PhraseCut, text and image prompts", ablation),
}
