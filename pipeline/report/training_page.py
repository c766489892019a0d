"""The page of a training run: curves, pictures of results, and commands to run next.

Every page is a ``TrainingPage``. A student is shown next to its teacher, and next to the truth if known; a
CLIPSeg or a baseline is shown on samples of its own training.

Shapes: H W pixels of an image, S of a training sample, V of CLIP's input.
"""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.errors import MaskMillError
from models.files import write_file
from pipeline.datasets.base import Dataset
from pipeline.evaluation.tables import plan
from pipeline.files import images
from pipeline.files.storage import is_remote
from pipeline.labelling.clipseg.model import THRESHOLD
from pipeline.metrics.names import is_share, percent
from pipeline.ontology.ontology import Ontology
from pipeline.report import charts
from pipeline.report.page import render, setting, setting_rows
from pipeline.report.pictures import (
    Found,
    colorize,
    contact_sheet,
    heat_map,
    overlay,
    overlay_mask,
    overview,
    picture_uri,
    tile,
)
from pipeline.table.labels import decode_mask, iter_rows
from pipeline.table.record import read_table_record
from pipeline.trained import clipseg as clipseg_folder
from pipeline.trained import student as student_folder
from pipeline.trained.clipseg import ClipSegRecord
from pipeline.trained.student import StudentRecord
from pipeline.training.clipseg.sources.base import IGNORED, OBJECT
from pipeline.training.clipseg.triplets import decode_phrase
from pipeline.training.samples.table import class_ids

if TYPE_CHECKING:
    from models.clipseg.decoder import ClipSeg
    from pipeline.training.clipseg.triplets import TripletSamples

PAGE, SHEET = "report.html", "preview.png"
"""Names of the page and of the picture next to it."""
SHOWN = 12
"""Images or samples on a page."""
ON_SHEET = 6
"""Images on a student's contact sheet."""
_THUMBNAIL = 320
_STUDENT_CURVES = {
    "loss": "loss",
    "agreement": "agreement with the teacher",
    "guessed": "share of pixels with a label",
    "guess_confidence": "mean confidence of the guesses",
    "drift": "drift of the predicted classes",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
}
_CLIPSEG_CURVES = {
    "loss": "loss",
    "iou": "IoU at p ≥ 0.5, per batch",
    "learning_rate": "learning rate",
    "found": "share of pixels found",
    "gradient_norm": "gradient norm",
}
_CLIPSEG_TITLES = {"clipseg": "CLIPSeg", "clip-deconv": "CLIP-Deconv", "vitseg": "ViTSeg"}
_LOOKED_AT = 400  # candidate rows for examples: a table may hold millions


# --- any training ---


@dataclass(frozen=True)
class Card:
    """Pictures of one image, side by side.

    Attributes:
        name: name below the pictures.
        pictures: captions and uint8 (H, W, 3); missing ones leave the last columns empty.
    """

    name: str
    pictures: Sequence[tuple[str, np.ndarray]]


@dataclass(frozen=True)
class Score:
    """Scores of a model on a set of images, for comparison with others.

    Attributes:
        name: of the model.
        miou: mean IoU, 0 to 1.
        ious: of each class, None where it is undefined.
    """

    name: str
    miou: float
    ious: Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class TrainingPage:
    """Content of the page.

    Attributes:
        title: heading.
        toy: whether the model is a toy.
        training: from the record: ``iterations``, ``seconds``, ``samples_per_second``, ``data_wait``,
            ``failed_samples``, ``stopped``; all but the first may be missing.
        samples: plural noun for the training samples.
        tiles: names and values at the top.
        cards: pictures.
        note: a sentence about the pictures.
        classes: names and colours ("#rrggbb").
        scores: where truth is known, from the baseline model to the newest.
        names: of the classes in ``scores``.
        curves: keys of ``metrics.jsonl`` and the titles of their charts.
        curves_note: a sentence about the charts.
        marks: steps with a dashed line in the charts.
        data: names and values of the training data.
        files: descriptions and paths of the files.
        commands: purposes and commands to run next.
        settings: all settings, nested.
    """

    title: str
    toy: bool
    training: Mapping[str, Any]
    samples: str
    tiles: Sequence[tuple[str, str]]
    cards: Sequence[Card]
    note: str = ""
    classes: Sequence[tuple[str, str]] = ()
    scores: Sequence[Score] = ()
    names: Sequence[str] = ()
    curves: Mapping[str, str]
    curves_note: str
    marks: Sequence[float] = ()
    data: Sequence[tuple[str, str]]
    files: Sequence[tuple[str, str]]
    commands: Mapping[str, str]
    settings: Mapping[str, Any]


def write_training_page(path: Path, page: TrainingPage, lines: Sequence[Mapping[str, Any]]) -> Path:
    """Write the page, replacing an older one atomically.

    Args:
        path: the HTML file.
        page: its content.
        lines: records of ``metrics.jsonl``.
    """
    text = render(
        "training.html",
        page=page,
        tiles=_tiles(page),
        columns=max((len(card.pictures) for card in page.cards), default=1),
        cards=[{"name": card.name, "pictures": _pictures(card)} for card in page.cards],
        gains=_gains(page.scores, page.names),
        curves=_curves(page, lines),
        facts=[
            (title, rows)
            for title, rows in (("Data", page.data), ("Time", _time(page)), ("Where things are", page.files))
            if rows
        ],
        settings=setting_rows(page.settings),
    )
    write_file(path, text.encode())
    return path


def _write(
    folder: Path, page: TrainingPage, sheet: Image.Image | None, lines: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Write the sheet, if any, and the page; return their paths, the page last."""
    written = []
    if sheet is not None:
        sheet.save(folder / SHEET)
        written.append(str(folder / SHEET))
    return [*written, str(write_training_page(folder / PAGE, page, lines))]


def thousands(count: Any) -> str:
    """A number with thousands separators; anything else as a setting."""
    return f"{count:,}" if isinstance(count, int) and not isinstance(count, bool) else setting(count)


def _tiles(page: TrainingPage) -> list[tuple[str, str]]:
    training, tiles = page.training, [*page.tiles]
    tiles.append(("steps", f"{training['iterations']:,}"))
    if training.get("seconds"):
        tiles.append(("time of training", _duration(training["seconds"])))
    if training.get("samples_per_second"):
        tiles.append((f"{page.samples}/s", f"{training['samples_per_second']:.1f}"))
    return tiles


def _time(page: TrainingPage) -> list[tuple[str, str]]:
    training = page.training
    rows = [("steps", f"{training['iterations']:,}")]
    if training.get("seconds"):
        rows.append(("training", _duration(training["seconds"])))
        rows.append(("a step", f"{training['seconds'] / max(1, training['iterations']):.3g} s"))
    if training.get("samples_per_second"):
        rows.append((f"{page.samples} a second", f"{training['samples_per_second']:.1f}"))
    if training.get("data_wait") is not None:
        rows.append((f"waiting for {page.samples}", f"{training['data_wait']:.0%} of the time"))
    if training.get("failed_samples"):
        rows.append((f"{page.samples} that could not be loaded", f"{training['failed_samples']:,}"))
    return rows


def _duration(seconds: float) -> str:
    return f"{seconds / 60:,.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def _pictures(card: Card) -> list[dict[str, Any]]:
    return [
        {"caption": caption, "uri": uri, "width": width, "height": height}
        for caption, picture in card.pictures
        for uri, width, height in [picture_uri(_large(picture), longest=_THUMBNAIL)]
    ]


def _large(picture: np.ndarray) -> np.ndarray:
    """Enlarge small pictures by an integer factor, so that browsers do not blur them."""
    factor = _THUMBNAIL // max(picture.shape[:2])
    return picture.repeat(factor, 0).repeat(factor, 1) if factor > 1 else picture


def _gains(scores: Sequence[Score], names: Sequence[str]) -> list[dict[str, Any]]:
    """One row per class: IoU of each model, and the gain of the last over the first."""
    if not scores:
        return []
    rows = []
    for index, name in enumerate(names):
        values = [score.ious[index] for score in scores]
        first, last = values[0], values[-1]
        gain = last - first if first is not None and last is not None and len(values) > 1 else None
        rows.append({"name": name, "values": values, "gain": gain})
    return rows


def _curves(page: TrainingPage, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    curves = []
    for key, title in page.curves.items():
        scale, unit = (100.0, ", %") if is_share(key) else (1.0, "")
        points = [
            charts.Point(float(line["step"]), scale * float(line[key]))
            for line in lines
            if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])
        ]
        if len(points) > 1:
            chart = charts.trace(points, label=title + unit, marks=page.marks)
            curves.append({"title": title + unit, "chart": chart})
    return curves


# --- a student ---


@dataclass(frozen=True)
class Example:
    """An image and its labels.

    Attributes:
        name: of the image.
        image: uint8 (H, W, 3).
        teacher: integer (H, W) class ids; ids without a colour are grey.
        student: integer (H, W).
        truth: integer (H, W), None where it is not known.
    """

    name: str
    image: np.ndarray
    teacher: np.ndarray
    student: np.ndarray
    truth: np.ndarray | None = None


def student_page(
    record: StudentRecord, examples: Sequence[Example], *, scores: Sequence[Score] = (), note: str = ""
) -> TrainingPage:
    """The page of a student.

    Args:
        record: record of the student.
        examples: images to show.
        scores: of the teacher, then of the student, if truth is known.
        note: a sentence about the examples and scores.
    """
    teacher, palette = record.teacher["weights"], record.ontology.palette()
    counts = record.teacher.get("counts", {})
    parts = dict.fromkeys((record.config["decoder"], record.config["backbone"]))
    guided = record.recipe.get("selftrain", {}).get("guided", (0, 0))[1]
    return TrainingPage(
        title=f"Student of {teacher['model']}",
        toy=teacher["model"] == "toyclip",
        training=record.training,
        samples="crops",
        tiles=[
            *((f"mIoU of the {score.name}", f"{percent(score.miou)} %") for score in scores),
            ("student", ", ".join(parts)),
        ],
        cards=[_student_card(example, palette) for example in examples],
        note=note,
        classes=[
            (name, "#{:02x}{:02x}{:02x}".format(*color))
            for name, color in zip(record.ontology.names, palette.tolist(), strict=True)
        ],
        scores=scores,
        names=record.ontology.names,
        curves=_STUDENT_CURVES,
        curves_note="By step; the dashed line is where the student began to learn from its own guesses.",
        marks=[guided] if guided > 0 else [],
        data=[
            ("labels", str(record.teacher.get("labels", ""))),
            *(
                (name, thousands(counts[name]))
                for name in ("images", "labelled", "failed")
                if counts.get(name)
            ),
            ("classes", thousands(record.ontology.num_classes)),
            *([("without truth", ", ".join(unseen))] if (unseen := record.training.get("unseen")) else []),
        ],
        files=[
            ("folder", record.uri),
            ("student", f"{student_folder.WEIGHTS_FILE}, {student_folder.RECORD_FILE}"),
            ("curves as numbers", "metrics.jsonl"),
            ("checkpoints to resume from", "checkpoints/"),
        ],
        commands=student_commands(record.uri),
        settings={"recipe": record.recipe, "teacher": teacher, "versions": record.versions},
    )


def student_sheet(examples: Sequence[Example], record: StudentRecord) -> Image.Image:
    """Rows of image, truth if known, teacher and student."""
    palette, shown = record.ontology.palette(), examples[:ON_SHEET]
    toy = record.teacher["weights"]["model"] == "toyclip"
    rows = [("images", [example.image for example in shown])]
    truths = [example.truth for example in shown if example.truth is not None]
    if len(truths) == len(shown):
        rows.append(("truth", [colorize(truth, palette) for truth in truths]))
    rows.append(("teacher (pseudo-labels)", [colorize(example.teacher, palette) for example in shown]))
    rows.append(("student", [colorize(example.student, palette) for example in shown]))
    caption = "toy world: a student trained on pseudo-labels of the bundled toy CLIP" if toy else ""
    return contact_sheet(rows, names=record.ontology.names, palette=palette, caption=caption)


def _student_card(example: Example, palette: np.ndarray) -> Card:
    maps = [] if example.truth is None else [("truth", example.truth)]
    maps += [("teacher", example.teacher), ("student", example.student)]
    painted = [(caption, overlay(example.image, labels, palette)) for caption, labels in maps]
    return Card(example.name, [("image", example.image), *painted])


def write_student_page(
    record: StudentRecord,
    lines: Sequence[Mapping[str, Any]],
    *,
    labels: str,
    truth: Dataset | None = None,
    scores: Sequence[Score] = (),
    note: str = "",
    count: int = SHOWN,
) -> list[str]:
    """Write the page and the contact sheet into the student's folder.

    Args:
        record: record of the student.
        lines: records of ``metrics.jsonl``.
        labels: label table with the images and the teacher's labels.
        truth: of the same images, if known.
        scores: see ``student_page``.
        note: see ``student_page``.
        count: number of images to show.

    Returns:
        The files, the page last; none if the folder is not local.
    """
    if is_remote(record.uri):
        return []
    examples = find_examples(record, labels=labels, truth=truth, count=count)
    sheet = student_sheet(examples, record) if examples else None
    return _write(Path(record.uri), student_page(record, examples, scores=scores, note=note), sheet, lines)


def student_commands(output: str) -> dict[str, str]:
    """Commands for a student, by purpose."""
    folder = shlex.quote(output)
    return {
        "Label with it": f"maskmill label --model {folder} --images DIR --output OUT",
        "Measure it": f"maskmill evaluate --model {folder} --dataset NAME --root DIR",
        "See it": f"maskmill serve --model {folder}",
    }


def find_examples(record: StudentRecord, *, labels: str, truth: Dataset | None, count: int) -> list[Example]:
    """Images of a label table with the teacher's, the student's and the true labels; deterministic.

    Skips images that can no longer be read.
    """
    from models.device import best_device, native_precision
    from pipeline.labelling.labeller import LabellerSettings
    from pipeline.labelling.student import StudentLabeller

    true_rows = plan(labels, truth.samples).samples if truth is not None else {}
    teacher = _teacher_ids(labels, record.ontology)
    settings = LabellerSettings(
        num_classes=record.ontology.num_classes,
        ignore_index=record.ontology.ignore_index,
        precision=native_precision(best_device()),
    )
    labeller = StudentLabeller(settings, uri=record.uri)
    found: list[Example] = []
    for row in _chosen_rows(labels):
        sample = true_rows.get(row["id"])
        image = None if truth is not None and sample is None else _image(row, record)
        if image is None:
            continue
        true = None
        if truth is not None and sample is not None:
            ids = class_ids(truth.class_names, record.ontology, truth.ignore_index)
            true = _shown(ids[truth.truth(sample)])
        found.append(
            Example(
                PurePosixPath(row["uri"]).name,
                image,
                _shown(teacher[decode_mask(row["mask"]["bytes"])]),
                labeller.label([images.fit(image, record.labelling)], [image.shape[:2]])[0].labels,
                true,
            )
        )
        if len(found) == count:
            break
    return found


def _chosen_rows(labels: str) -> list[dict[str, Any]]:
    """Labelled rows from the start of a table, in an order independent of how it was written."""
    rows = []
    for row in iter_rows(labels, ["id", "uri", "status", "sha256", "mask"]):
        if row["status"] == "ok":
            rows.append(row)
        if len(rows) == _LOOKED_AT:
            break
    return sorted(rows, key=lambda row: hashlib.sha256(PurePosixPath(row["uri"]).name.encode()).digest())


def _image(row: Mapping[str, Any], record: StudentRecord) -> np.ndarray | None:
    """The image that was labelled; None if it cannot be read or has changed."""
    try:
        data = images.fetch(row["uri"])
        if hashlib.sha256(data).digest() != row["sha256"]:
            return None
        return images.decode(data, max_pixels=record.labelling.max_pixels)
    except images.ImageError:
        return None


def _teacher_ids(labels: str, ontology: Ontology) -> np.ndarray:
    """Map table ids to student ids, as in training; negative for classes that the student lacks."""
    known = read_table_record(labels).ontology
    return class_ids(known.names, ontology, known.ignore_index, words=known.prompts())


def _shown(ids: np.ndarray) -> np.ndarray:
    """Ids for display: negative ones become 65535, which has no colour."""
    return np.where(ids < 0, 65535, ids).astype(np.uint16)


# --- a CLIPSeg ---


@dataclass(frozen=True, eq=False)
class Answer:
    """A training sample and the model's answer.

    Attributes:
        phrase: the words of the prompt; "" for a picture alone.
        text_share: weight of the words in the prompt; the rest is the example's.
        image: uint8 (S, S, 3).
        there: bool (S, S), the truth.
        probability: float (S, S) in [0, 1].
        example: uint8 (V, V, 3), as CLIP sees it, or None.
        known: bool (S, S), where the truth is known; other pixels are not counted. None means everywhere.
    """

    phrase: str
    text_share: float
    image: NDArray[np.uint8]
    there: NDArray[np.bool_]
    probability: NDArray[np.float32]
    example: NDArray[np.uint8] | None = None
    known: NDArray[np.bool_] | None = None

    @property
    def found(self) -> NDArray[np.bool_]:
        """The mask, (S, S), at the default threshold."""
        return np.asarray(self.probability >= THRESHOLD)

    @property
    def heat(self) -> NDArray[np.uint8]:
        """round(255 p), (S, S)."""
        return np.rint(self.probability * 255).astype(np.uint8)

    @property
    def caption(self) -> str:
        """The kind of prompt, and the quality of the answer."""
        asked = "text" if self.text_share == 1 else f"text {self.text_share:.0%}, example"
        there, found = self._counted(self.there), self._counted(self.found)
        if not there.any():
            answered = "a false alarm" if found.any() else "rightly not found"
            return f"{asked}; not in the image: {answered}"
        return f"{asked}; IoU {percent((there & found).sum() / (there | found).sum())} %"

    @property
    def share(self) -> float:
        """Share of the object among the pixels with known truth."""
        there = self._counted(self.there)
        return float(there.mean()) if there.size else 0.0

    def _counted(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return mask.ravel() if self.known is None else mask[self.known]


def clipseg_page(
    record: ClipSegRecord, answers: Sequence[Answer], *, uri: str, commands: Mapping[str, str]
) -> TrainingPage:
    """The page of a trained CLIPSeg or baseline.

    Args:
        record: record of the model.
        answers: samples to show.
        uri: folder of the model.
        commands: commands to run next, by purpose.
    """
    clip, config = record.clip, record.config
    files = [("folder", uri), ("decoder", f"{clipseg_folder.DECODER_FILE}, {clipseg_folder.RECORD_FILE}")]
    if record.hugging_face:
        files.append(("for transformers", "model.safetensors, config.json, …"))
    files += [("curves as numbers", "metrics.jsonl"), ("checkpoints to resume from", "checkpoints/")]
    iou = record.metrics.get("iou")
    names = {"triplets": "pairs of image and phrase"}
    layers = config.get("extract_layers") or [config["extract_layer"]]
    return TrainingPage(
        title=f"{_CLIPSEG_TITLES.get(record.model, record.model)} over {clip['model']}",
        toy=clip["model"] == "toyclip",
        training=record.training,
        samples="samples",
        tiles=[
            *([("IoU at p ≥ 0.5, last batches", f"{percent(iou)} %")] if isinstance(iou, float) else []),
            ("decoder", f"{config['reduce_dim']} wide, layers {' '.join(str(each) for each in layers)}"),
        ],
        cards=[_answer_card(answer) for answer in answers],
        note=f"Training samples with their prompts below; the mask is p ≥ {THRESHOLD:g}.",
        curves=_CLIPSEG_CURVES,
        curves_note="By step, on the training data. For other data, run maskmill evaluate.",
        data=[
            (names.get(name, name), thousands(value))
            for name, value in record.data.items()
            if name != "fingerprint"
        ],
        files=files,
        commands=commands,
        settings={"recipe": record.recipe, "clip": clip, "versions": record.versions},
    )


def clipseg_sheet(answers: Sequence[Answer], *, columns: int = 3) -> Image.Image:
    """All samples on one picture: image, truth and prediction."""
    panels = []
    for answer in answers:
        there = answer.there.astype(np.uint8) * 255
        asked = answer.phrase or "(the example alone)"
        cells = [
            Found("there", there, answer.there, f"{answer.share:.1%} of the pixels"),
            Found(asked, answer.heat, answer.found, answer.caption, answer.example),
        ]
        panels.append(overview("", answer.image, cells, side=160))
    return tile(panels, columns=columns, gap=0)


def _answer_card(answer: Answer) -> Card:
    pictures = [
        ("image", answer.image),
        ("there", overlay_mask(answer.image, answer.there)),
        ("found", overlay_mask(answer.image, answer.found)),
        ("probability", np.asarray(heat_map(answer.heat).convert("RGB"))),
    ]
    if answer.example is not None:
        pictures.append(("example", answer.example))
    asked = f"“{answer.phrase}”" if answer.phrase else "the example alone"
    return Card(f"{asked}: {answer.caption}", pictures)


def write_clipseg_page(
    folder: Path,
    lines: Sequence[Mapping[str, Any]],
    samples: TripletSamples,
    *,
    seed: int,
    commands: Mapping[str, str],
    count: int = SHOWN,
) -> list[str]:
    """Write the page and the picture into the model's folder.

    Args:
        folder: folder of the model.
        lines: records of ``metrics.jsonl``.
        samples: the training samples.
        seed: seed for choosing samples.
        commands: commands to run next, by purpose.
        count: number of samples to show.

    Returns:
        The files, the page last.
    """
    from models.device import best_device

    model = clipseg_folder.load_trained(folder, device=best_device())
    answers = find_answers(model, samples, seed=seed, count=count)
    page = clipseg_page(
        clipseg_folder.read_clipseg_record(folder), answers, uri=str(folder), commands=commands
    )
    return _write(folder, page, clipseg_sheet(answers) if answers else None, lines)


def find_answers(model: ClipSeg, samples: TripletSamples, *, seed: int, count: int) -> list[Answer]:
    """Answers of a model to some of its training samples; deterministic, preferring different images.

    Args:
        model: the trained model.
        samples: the training samples; unreadable ones are skipped.
        seed: seed for choosing and augmenting samples.
        count: number of answers.
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
