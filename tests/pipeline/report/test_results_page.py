"""The report of made-up results with known contents, and the page in a real browser."""

from __future__ import annotations

import base64
import copy
import functools
import html
import io
import json
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.errors import MaskMillError
from pipeline.evaluation.results import EvaluationResult, read_results
from pipeline.ontology.reading import load_ontology
from pipeline.report import comparison
from pipeline.report.results_page import MARK, difference, number, write_report
from pipeline.toyworld import scenes as toyworld
from tests.browser import WRITTEN, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
Record = dict[str, Any]


# --- made-up results ---


def ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def make_evaluation(ontology: str = "voc21", *, seed: int = 0, skill: float = 0.7, **changes: Any) -> Record:
    """An evaluation whose every number follows from one random confusion matrix; the last class is absent."""
    known = load_ontology(ontology)
    names, colors, count = known.names, known.palette(), len(known.names)
    random = np.random.default_rng(seed)
    pixels = (random.pareto(1.2, count) * 20_000 + 500).astype(np.int64)
    pixels[-1] = 0
    confusion = np.zeros((count, count + 1), np.int64)
    for row in range(count):
        odds = random.dirichlet(np.full(count + 1, 0.05)) * (1 - skill)
        odds[row] += skill * random.uniform(0.3, 1)
        odds[-2] = 0
        confusion[row] = random.multinomial(pixels[row], odds / odds.sum())
    true, taken, right = confusion.sum(1), confusion.sum(0)[:-1], np.diag(confusion)
    classes = []
    for i in range(count):
        iou = ratio(right[i], true[i] + taken[i] - right[i])
        classes.append(
            {
                "id": i,
                "name": names[i],
                "color": "#{:02x}{:02x}{:02x}".format(*colors[i]),
                "group": None,
                "pixels": int(true[i]),
                "iou": iou,
                "boundary_iou": None if iou is None else iou * 0.7,
                "accuracy": ratio(right[i], true[i]),
                "precision": ratio(right[i], taken[i]),
            }
        )
    ious = [c["iou"] for c in classes if c["iou"] is not None]
    centres = (np.arange(15) + 0.5) / 15
    counts = (random.uniform(0.4, 1, 15) * 10_000 * (0.2 + centres)).astype(np.int64)
    counts[0] = 0
    bins = np.stack([counts, counts * centres**1.3, counts * centres * 255], 1).astype(np.int64)
    record = {
        "schema_version": 1,
        "kind": "evaluation",
        "title": f"maskclip on {ontology} (val)",
        "created": "2026-11-21T10:00:00Z",
        "command": f"maskmill evaluate --dataset {ontology} --recipe maskclip --output results/a",
        "protocol": "seed",
        "dataset": {"name": ontology, "split": "val", "images": 321, "fingerprint": "ab12"},
        "model": {
            "recipe": {
                "name": "maskclip",
                "head": "maskclip",
                "window": 224,
                "prompt_denoising": True,
                "hash": str(seed),
            },
            "weights": {"model": "ViT-B-16-quickgelu", "pretrained": "openai", "fingerprint": "cd34"},
            "toy": False,
        },
        "classes": classes,
        "confusion": confusion.tolist(),
        "calibration": bins.tolist(),
        "metrics": {
            "miou": float(np.mean(ious)),
            "pixel_accuracy": float(right.sum() / true.sum()),
            "mean_accuracy": float(np.mean([c["accuracy"] for c in classes if c["accuracy"] is not None])),
            "fwiou": float(sum(c["iou"] * c["pixels"] for c in classes if c["iou"] is not None) / true.sum()),
            "boundary_miou": 0.7 * float(np.mean(ious)),
            "ece": 0.0421,
        },
        "images": {"evaluated": 318, "failed": 2, "missing": 1, "worst": [], "best": []},
        "published": [
            {
                "method": "MaskCLIP",
                "metric": "miou",
                "value": 0.495,
                "source": "Zhou et al. 2022, Table 2",
                "protocol": "seed",
            },
            {
                "method": "CLIP",
                "metric": "miou",
                "value": 0.112,
                "source": "Zhou et al. 2022, Table 2",
                "protocol": "seed",
            },
            {
                "method": "MaskCLIP, re-run",
                "metric": "miou",
                "value": 0.434,
                "source": "Trident, Table 1",
                "protocol": "unified",
            },
        ],
    }
    return record | changes


def interval(mean: float, half: float = 0.012) -> Record:
    return {"mean": mean, "low": mean - half, "high": mean + half, "runs": [mean - half, mean, mean + half]}


def line(name: str, values: Record, **changes: Any) -> Record:
    row = {
        "name": name,
        "series": None,
        "x": None,
        "values": values,
        "published": {},
        "source": None,
        "missing": None,
    }
    return row | changes


CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "speckle_noise",
    "gaussian_blur",
    "defocus_blur",
    "spatter",
    "jpeg",
)


def make_benchmark(*, lift: float = 0.0, **changes: Any) -> Record:
    """A toy-world benchmark: bars beside published figures, eight curves of five levels, three claims."""
    table = "Zhou et al. 2022, Table 2"
    curves = [
        line(
            f"{name} {level}",
            {"miou": interval(0.62 + lift - 0.012 * (i + 1) * level, 0.03), "pixel_accuracy": interval(0.7)},
            series=name,
            x=level,
        )
        for i, name in enumerate(CORRUPTIONS)
        for level in range(1, 6)
    ]
    record = {
        "schema_version": 1,
        "kind": "benchmark",
        "name": "toyworld",
        "title": "The papers' claims in the toy world",
        "created": "2026-11-21T11:30:00Z",
        "command": "maskmill benchmark toyworld --seeds 3 --output results/toyworld",
        "hardware": {"cpu": "AVX512", "cores": 2, "gpu": None},
        "seconds": 312.0,
        "toy": True,
        "sections": [
            {
                "name": "maskclip",
                "title": "MaskCLIP against the unmodified CLIP",
                "chart": "bars",
                "note": "The same weights, text and images; only the last block's path differs.",
                "metrics": ["miou", "pixel_accuracy"],
                "rows": [
                    line(
                        "unmodified CLIP",
                        {"miou": interval(0.131), "pixel_accuracy": interval(0.24)},
                        published={"miou": 0.112},
                        source=table,
                    ),
                    line(
                        "MaskCLIP",
                        {"miou": interval(0.443 + lift, 0.02), "pixel_accuracy": interval(0.6)},
                        published={"miou": 0.217},
                        source=table,
                    ),
                    line(
                        "MaskCLIP + key smoothing",
                        {"miou": {"mean": 0.471, "low": None, "high": None, "runs": [0.471]}},
                        source="Zhou et al. 2022, Table 3",
                    ),
                    line(
                        "MaskCLIP on PASCAL Context",
                        {},
                        published={"miou": 0.254},
                        source=table,
                        missing="needs PASCAL Context: give --root context=FOLDER",
                    ),
                ],
            },
            {
                "name": "corruptions",
                "title": "Corrupted images",
                "chart": "lines",
                "note": None,
                "metrics": ["miou", "pixel_accuracy"],
                "rows": [line("clean", {"miou": interval(0.62), "pixel_accuracy": interval(0.75)}), *curves],
            },
            {
                "name": "novel",
                "title": "Prompts never in a caption",
                "chart": None,
                "note": None,
                "metrics": ["iou_fg", "hits_per_prompt"],
                "rows": [line("red leaf", {"iou_fg": interval(0.4), "hits_per_prompt": {"mean": 12.5}})],
            },
        ],
        "claims": [
            {
                "claim": "MaskCLIP beats the unmodified CLIP",
                "source": table,
                "shows": True,
                "detail": "+0.31 mIoU (95 % 0.29 to 0.33)",
            },
            {
                "claim": "Prompt denoising helps",
                "source": "Zhou et al. 2022, Table 3",
                "shows": False,
                "detail": "-0.004 mIoU",
            },
            {"claim": "The gain grows with the backbone", "source": None, "shows": None, "detail": None},
        ],
        "pictures": [],
    }
    return record | changes


def save(folder: Path, record: Record) -> Path:
    """A result folder; panels are drawn for the images that name one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{record['kind']}.json").write_text(json.dumps(record))
    return folder


def with_pictures(folder: Path, record: Record, count: int = 2, size: int = 96) -> Record:
    """The record with panels (photograph, truth, prediction) of toy scenes as its worst and best images."""
    (folder / "pictures").mkdir(parents=True)
    toys = toyworld.generate(5, 2 * count, size)
    colors = load_ontology("toyworld").palette()
    record = copy.deepcopy(record)
    for index in range(2 * count):
        truth = colors[np.asarray(toys.labels[index])]
        panel = np.concatenate([np.asarray(toys.images[index]), truth, np.roll(truth, 9, axis=1)], axis=1)
        kind, number = ("worst", index + 1) if index < count else ("best", index - count + 1)
        name = f"pictures/{kind}-{number}.png"
        Image.fromarray(panel.astype(np.uint8)).save(folder / name)
        record["images"][kind].append(
            {"name": f"val/scene {index}.jpg", "miou": 0.1 + 0.2 * index, "picture": name}
        )
    return record


# --- reading the page ---


class Outline(HTMLParser):
    """Tags with their attributes, table rows as lists of texts, and all text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self._inside: list[str] = []
        self._cell = False
        self.feed(text)
        self.rows = [[squeeze(cell) for cell in row] for row in self.rows]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in ("style", "script", "title"):
            self._inside.append(tag)
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()
        elif tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            return
        self.words += f"{data} "
        if self._cell:
            self.rows[-1][-1] += f"{data} "

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in wanted.items())]

    def row(self, start: str) -> list[str]:
        """The first table row whose first cell starts so."""
        return next(row for row in self.rows if row and row[0].startswith(start))


def report(tmp_path: Path, *records: Record) -> Outline:
    folders = [save(tmp_path / f"run{i}", record) for i, record in enumerate(records)]
    return Outline(write_report(folders, tmp_path / "report.html").read_text())


def squeeze(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("results")
    first = with_pictures(root / "a", make_evaluation())
    third = make_evaluation("cocostuff171", seed=2, protocol="unified")
    return [
        save(root / "a", first),
        save(root / "b", make_evaluation(seed=1, skill=0.8, title="maskclip, larger windows")),
        save(root / "c", third),
        save(root / "d", make_benchmark()),
        save(root / "e", make_benchmark(lift=0.03, title="The same with other seeds")),
    ]


@pytest.fixture(scope="module")
def page(folders: list[Path]) -> Path:
    return write_report(folders, folders[0].parent / "all.html")


# --- one evaluation ---


def test_every_number_of_an_evaluation_is_on_the_page(tmp_path: Path) -> None:
    record = make_evaluation()
    outline = report(tmp_path, record)
    words = squeeze(outline.words)
    for value in record["metrics"].values():
        assert f"{100 * value:.1f} %" in words
    for entry in record["classes"]:
        # Table of all numbers: id, class, IoU, boundary IoU, recall, precision, pixels.
        row = next(row for row in outline.rows if len(row) == 7 and row[0] == str(entry["id"]))
        figures = [entry[key] for key in ("iou", "boundary_iou", "accuracy", "precision")]
        assert row[1:] == [
            entry["name"],
            *("–" if v is None else f"{100 * v:.1f}" for v in figures),
            f"{entry['pixels']:,}",
        ]
    assert "Failed and left out: 2 images." in words
    assert "Without a prediction and left out: 1 image." in words
    absent = (
        "1 of 21 classes occur neither in the truth nor in the prediction and are left out of the means: "
    )
    assert absent + record["classes"][-1]["name"] in words
    assert record["command"] in outline.words and "ab12" in words and "prompt denoising" in words
    assert len(outline.all("h1")) == 1 and not outline.all("span", **{"class": "badge"})


def test_bars_have_the_length_of_their_value(tmp_path: Path) -> None:
    record = make_evaluation()
    text = write_report([save(tmp_path / "run", record)], tmp_path / "report.html").read_text()
    items = re.findall(r'<li data-id="(\d+)".*?</li>', text, re.S)
    shown = [entry for entry in record["classes"] if entry["iou"] is not None]
    assert [int(i) for i in items] == [c["id"] for c in sorted(shown, key=lambda c: -c["iou"])] + [
        20
    ]  # the absent one last
    for entry in shown:
        item = re.search(rf'<li data-id="{entry["id"]}".*?</li>', text, re.S)
        assert item
        widths = [float(w) for w in re.findall(r"width:([\d.]+)%", item.group())]
        np.testing.assert_allclose(widths, [100 * entry["iou"], 100 * entry["boundary_iou"]], atol=0.006)


def test_confusion_is_a_table_of_row_shares(tmp_path: Path) -> None:
    record = make_evaluation()
    outline = report(tmp_path, record)
    counts = np.array(record["confusion"])
    for row in range(20):
        cells = [
            c.strip()
            for c in next(
                r for r in outline.rows if len(r) == 23 and r[0].strip() == record["classes"][row]["name"]
            )
        ]
        shares = 100 * counts[row] / counts[row].sum()
        assert cells[1:] == [f"{share:.0f}" if share >= 0.5 else "" for share in shares]
    wrong = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    np.fill_diagonal(wrong, 0)
    truth, taken = np.unravel_index(wrong.argmax(), wrong.shape)
    names = [c["name"] for c in record["classes"]] + ["no class"]
    expected = f"{names[truth]} labelled as {names[taken]} {100 * wrong.max():.0f} %"
    assert (
        squeeze(outline.words)
        .partition("Strongest confusions, by share of the true class")[2]
        .lstrip()
        .startswith(expected)
    )


def test_a_large_confusion_matrix_is_a_picture_of_the_same_shares(tmp_path: Path) -> None:
    record = make_evaluation("cocostuff171")
    text = write_report([save(tmp_path / "run", record)], tmp_path / "report.html").read_text()
    uri = re.search(r'<image xlink:href="data:image/png;base64,([^"]+)"', text)
    assert uri
    alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.group(1)))))[..., 3]
    counts = np.array(record["confusion"])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    np.testing.assert_allclose((alpha / 255.0) ** 2, shares, atol=0.005)
    assert "171 classes" in text and text.count("<li data-id=") == 171


def test_calibration_that_was_not_measured_has_no_diagram(tmp_path: Path) -> None:
    outline = report(tmp_path, make_evaluation(calibration=None))
    assert "Calibration was not measured" in outline.words
    assert not [svg for svg in outline.all("svg") if "Reliability" in (svg["aria-label"] or "")]


def test_published_figures_of_another_protocol_stand_apart(tmp_path: Path) -> None:
    record = make_evaluation()
    outline = report(tmp_path, record)
    words = squeeze(outline.words)
    beside, apart = words.split(
        "Measured under another protocol: not comparable with the numbers on this page"
    )
    beside = beside.partition("Compared with published figures")[2]
    ours = record["metrics"]["miou"]
    assert f"MaskCLIP Zhou et al. 2022, Table 2 49.5 ours {difference(ours - 0.495)}" in beside
    assert "43.4" not in beside
    assert outline.row("MaskCLIP, re-run")[1:4] == ["unified", "mIoU", "43.4"]
    assert "ours" not in apart.partition("Trident, Table 1")[0]


def test_groups_are_bars_in_a_panel_for_each_series_and_metric(tmp_path: Path) -> None:
    figures = {("A", "small"): (0.1, 0.2), ("A", "large"): (0.8, 0.4), ("B", "small"): (0.3, None)}
    rows = [
        {
            "name": f"{series}, {group}",
            "series": series,
            "x": float(group == "large"),
            "values": {"iou_fg": {"mean": values[0]}, "ap": {"mean": values[1]}},
        }
        for (series, group), values in figures.items()
    ]
    section = {
        "name": "x-size", "title": "By size", "chart": "bars", "metrics": ["iou_fg", "ap"], "rows": rows[::-1]
    }  # fmt: skip
    record = make_benchmark() | {"sections": [section]}
    text = write_report([save(tmp_path / "run", record)], tmp_path / "report.html").read_text()
    panels = re.findall(r"<figure><figcaption>(.)<small>(.*?)</small></figcaption><ol>(.*?)</ol>", text, re.S)
    assert [(series, metric) for series, metric, _ in panels] == [
        (series, metric) for series in "BA" for metric in ("foreground IoU", "average precision")
    ]
    for series, metric, bars in panels:
        place = metric == "average precision"
        items = re.findall(r"<li><span>(.*?)</span><span class=\"num\">(.*?)</span>(.*?)</li>", bars, re.S)
        assert [name for name, *_ in items] == [group for own, group in figures if own == series]
        for group, number_, bar in items:
            value = figures[series, group][place]
            assert number_ == ("–" if value is None else f"{100 * value:.1f}")
            widths = [float(width) for width in re.findall(r"width:([\d.]+)%", bar)]
            assert widths == ([] if value is None else [pytest.approx(100 * value / 0.8, abs=0.006)])
    assert "bars from 0 to 80 %" in text


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"protocol": "custom"}, "No published figure is known for this protocol"),
        (
            {
                "model": {
                    "recipe": {},
                    "weights": {"model": "ViT-B-16", "pretrained": "random:0"},
                    "toy": False,
                }
            },
            "Random weights",
        ),
        (
            {"model": {"recipe": {}, "weights": {"model": "toyclip"}, "toy": True}},
            "say nothing about photographs",
        ),
    ],
)
def test_what_the_numbers_are_worth_is_said(tmp_path: Path, changes: Record, phrase: str) -> None:
    assert phrase not in report(tmp_path / "plain", make_evaluation()).words
    assert phrase in squeeze(report(tmp_path / "changed", make_evaluation(**changes)).words)


def test_worst_and_best_images_are_inside_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    record = with_pictures(folder, make_evaluation())
    (folder / "pictures" / "worst-2.png").unlink()
    (folder / "pictures" / "best-1.png").write_bytes(b"no picture")
    Image.new("RGB", (3000, 1000)).save(folder / "pictures" / "best-2.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    record["images"]["best"].append({"name": "x.jpg", "miou": 1.0, "picture": "../outside.png"})
    outline = Outline(write_report([save(folder, record)], tmp_path / "report.html").read_text())
    images = outline.all("img")
    assert [image["alt"] for image in images] == [
        "Photograph, truth and prediction of scene 0.jpg",
        "Photograph, truth and prediction of scene 3.jpg",
    ]
    kept = Image.open(folder / "pictures" / "worst-1.png").convert("RGB")
    shown = Image.open(io.BytesIO(base64.b64decode((images[0]["src"] or "").partition(",")[2])))
    assert shown.size == kept.size == (int(images[0]["width"] or 0), int(images[0]["height"] or 0))
    assert np.abs(np.asarray(shown.convert("RGB"), int) - np.asarray(kept, int)).mean() < 6
    assert images[1]["width"] == "1200"  # large ones are made smaller
    for reason in (
        "pictures/worst-2.png cannot be read",
        "pictures/best-1.png: ",
        "outside the result folder",
    ):
        assert reason in outline.words


def test_names_are_text_whatever_they_contain(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>"\' onload=x'
    evaluation, benchmark = (
        make_evaluation(title=evil, command=evil, protocol=evil),
        make_benchmark(title=evil),
    )
    evaluation["classes"][0]["name"] = evaluation["classes"][1]["group"] = evil
    evaluation["published"][0]["method"] = evaluation["dataset"]["name"] = evil
    evaluation["model"]["recipe"][evil] = evil
    evaluation["metrics"][evil] = 0.5
    for section in benchmark["sections"]:
        section["title"] = section["note"] = section["rows"][0]["name"] = evil
        section["rows"][-1]["missing"] = section["rows"][-1]["series"] = evil
    benchmark["claims"][0]["claim"] = evil
    outline = report(tmp_path, evaluation, evaluation, benchmark, benchmark)
    assert len(outline.all("script")) == 1
    assert not [tag for tag, attributes in outline.tags if "onload" in attributes]
    assert outline.words.count(evil) > 20


@pytest.mark.slow
def test_nothing_is_loaded_from_anywhere(page: Path) -> None:
    outline = Outline(page.read_text())
    for _, attributes in outline.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), value
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp", page.read_text())
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in outline.all("meta"))


def test_links_ids_and_labels_fit(page: Path) -> None:
    outline = Outline(page.read_text())
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [(a["href"] or "")[1:] for a in outline.all("a")] + [
        a["aria-labelledby"] for _, a in outline.tags if "aria-labelledby" in a
    ]
    assert len(targets) > 20 and set(targets) <= set(ids)
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in outline.all("svg"))
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert all("scope" in cell for cell in outline.all("th"))


# --- a benchmark ---


def test_benchmark_tables_claims_and_gaps(tmp_path: Path) -> None:
    outline = report(tmp_path, make_benchmark())
    words = squeeze(outline.words)
    assert outline.row("unmodified CLIP")[1:] == [
        "13.1 11.9 to 14.3",
        "11.2 ours +1.9",
        "24.0 22.8 to 25.2",
        "1",
    ]
    assert outline.row("MaskCLIP + key smoothing")[1:] == ["47.1", "–", "–", "2"]
    assert "Zhou et al. 2022, Table 2 Zhou et al. 2022, Table 3 Corrupted images" in words  # the sources
    assert outline.row("MaskCLIP on PASCAL Context")[1:3] == ["not measured", "25.4"]
    assert (
        "MaskCLIP on PASCAL Context not measured: needs PASCAL Context: give --root context=FOLDER" in words
    )
    assert "✓ shown MaskCLIP beats the unmodified CLIP +0.31 mIoU (95 % 0.29 to 0.33)" in words
    assert "not shown Prompt denoising helps" in words
    assert "not measured The gain grows with the backbone" in words
    assert re.search(r"claims shown\s*1\s*claims not shown\s*1\s*claims not measured\s*1", words)
    assert outline.row("red leaf")[1:] == ["40.0 38.8 to 41.2", "12.5"]
    assert "hits per prompt" in words and "5 min 12 s" in words
    assert len(outline.all("span", **{"class": "badge"})) == 1


def test_bars_and_intervals_share_an_axis(tmp_path: Path) -> None:
    text = write_report([save(tmp_path / "run", make_benchmark())], tmp_path / "report.html").read_text()
    row = re.search(r"MaskCLIP</span>.*?</tr>", text, re.S)
    assert row
    # The axis ends at 0.5: the greatest value is 0.471.
    bar = re.search(r"<i style=\"left:([\d.]+)%;width:([\d.]+)%", row.group())
    whisker = re.search(r"<b style=\"left:([\d.]+)%;width:([\d.]+)%", row.group())
    tick = re.search(r"<em style=\"left:([\d.]+)%", row.group())
    assert bar and whisker and tick
    assert [float(g) for g in bar.groups()] == pytest.approx([0, 88.6], abs=0.01)
    assert [float(g) for g in whisker.groups()] == pytest.approx([84.6, 8.0], abs=0.01)
    assert float(tick.group(1)) == pytest.approx(43.4, abs=0.01)


def test_a_section_with_negative_values_has_its_zero_inside(tmp_path: Path) -> None:
    record = make_benchmark()
    record["sections"] = [
        record["sections"][0]
        | {"rows": [line("less", {"miou": {"mean": -0.25}}), line("more", {"miou": {"mean": 0.5}})]}
    ]
    text = write_report([save(tmp_path / "run", record)], tmp_path / "report.html").read_text()
    bars = re.findall(r"<i style=\"left:([\d.]+)%;width:([\d.]+)%", text)
    # From -0.3 to 0.5: zero lies at 37.5 %.
    assert [tuple(map(float, bar)) for bar in bars] == [(6.25, 31.25), (37.5, 62.5)]
    assert "−25.0" in text


def test_curves_go_through_their_points(tmp_path: Path) -> None:
    record = make_benchmark()
    outline = report(tmp_path, record)
    labels = [svg["aria-label"] or "" for svg in outline.all("svg")]
    assert len(labels) == 8
    for index, name in enumerate(CORRUPTIONS):
        assert labels[index] == f"mIoU of {name}: " + ", ".join(
            f"{62 - 1.2 * (index + 1) * x:.1f} % at {x}" for x in range(1, 6)
        )
        row = outline.row(name.replace("_", " "))
        assert row[1:] == [
            f"{m:.1f} {m - 3:.1f} to {m + 3:.1f}" for m in (62 - 1.2 * (index + 1) * x for x in range(1, 6))
        ]
    assert "clean 62.0 (60.8 to 63.2)" in squeeze(outline.words)


def test_a_curve_without_a_name_and_lines_without_a_place(tmp_path: Path) -> None:
    record = make_benchmark()
    sizes = [line(f"{size} px", {"miou": {"mean": size / 1000}}, x=size) for size in (224, 336, 448)]
    record["sections"] = [record["sections"][1] | {"rows": sizes}]
    assert [svg["aria-label"] for svg in report(tmp_path / "a", record).all("svg")] == [
        "mIoU of mIoU: 22.4 % at 224, 33.6 % at 336, 44.8 % at 448"
    ]
    record["sections"][0]["rows"] = [line("one", {"miou": {"mean": 0.5}})]
    outline = report(tmp_path / "b", record)
    assert not outline.all("svg") and outline.row("one")[1] == "50.0"


def test_the_clean_point_of_curves_is_a_line_across_and_published_points_are_marks(tmp_path: Path) -> None:
    record = make_benchmark()
    rows = record["sections"][1]["rows"]
    rows[0] |= {"series": "clean", "x": 0}
    rows[5]["published"] = {"miou": 0.111}
    rows[6] |= {"values": {}, "missing": "needs a GPU"}
    outline = report(tmp_path, record)
    assert len(outline.all("svg")) == 8 and len(outline.all("g", **{"class": "reference"})) == 8
    assert len(outline.all("g", **{"class": "theirs"})) == 1
    assert outline.row("gaussian noise")[5].endswith("published 11.1")
    assert outline.row("shot noise")[1] == "not measured"
    assert "Corrupted images: shot_noise 1 not measured: needs a GPU" in squeeze(outline.words)


def test_lines_of_other_people_are_neither_measured_nor_missing(tmp_path: Path) -> None:
    record = make_benchmark()
    others = [line("SPNet", {}, published={"miou": 0.3}), line("empty", {"miou": {"mean": None}})]
    record["sections"] = [record["sections"][0] | {"rows": others}]
    outline = report(tmp_path, record)
    assert outline.row("SPNet")[1:3] == ["–", "30.0"]
    assert "What is missing" not in outline.words and "rows measured 0 of 0" in squeeze(outline.words)


def test_a_section_with_no_point_of_its_curves_is_a_table(tmp_path: Path) -> None:
    record = make_benchmark()
    rows = [line("clean", {}, series="clean", x=0, missing=f"needs set {i}") for i in range(11)]
    record["sections"] = [record["sections"][1] | {"rows": [row]} for row in rows]
    outline = report(tmp_path, record)
    assert not outline.all("svg") and outline.row("clean")[1:] == ["not measured", "not measured"]
    words = squeeze(outline.words)
    assert (
        "not measured: needs set 7 3 more Corrupted images" in words and "not measured: needs set 10" in words
    )


def test_an_empty_benchmark_still_makes_a_page(tmp_path: Path) -> None:
    words = squeeze(report(tmp_path, make_benchmark(sections=[], claims=[], seconds=None)).words)
    assert "rows measured 0 of 0" in words


# --- several results ---


def test_comparable_evaluations_get_differences(page: Path, folders: list[Path]) -> None:
    runs = [json.loads((folder / "evaluation.json").read_text()) for folder in folders[:3]]
    outline = Outline(page.read_text())
    first, second = runs[0]["metrics"], runs[1]["metrics"]
    row = outline.row("maskclip, larger windows")
    assert row[1:3] == ["seed", "318"]
    assert row[3:] == [
        " ".join((f"{100 * second[k]:.1f}", *([difference(second[k] - first[k])]))) for k in first
    ]
    other = outline.row("maskclip on cocostuff171")
    assert "not comparable: another protocol, another dataset, other classes" in other[0]
    assert other[3:] == [f"{100 * value:.1f}" for value in runs[2]["metrics"].values()]
    assert "5 results compared" in outline.words


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("protocol", "unified", ["another protocol"]),
        ("dataset", {"name": "voc21", "split": "train", "fingerprint": "ab12"}, ["another split"]),
        (
            "dataset",
            {"name": "voc21", "split": "val", "fingerprint": "zz"},
            ["other images or truth (the fingerprints of the dataset differ)"],
        ),
        ("title", "renamed", []),
    ],
)
def test_what_forbids_a_comparison(field: str, value: Any, reason: list[str]) -> None:
    first, other = (EvaluationResult.model_validate(make_evaluation(**c)) for c in ({}, {field: value}))
    assert comparison.obstacles(first, other) == reason


def test_less_calibration_error_is_better_and_more_of_all_else() -> None:
    assert (
        comparison.cell("miou", 0.5, 0.4).better is True and comparison.cell("miou", 0.3, 0.4).better is False
    )
    assert (
        comparison.cell("ece", 0.5, 0.4).better is False and comparison.cell("ece", 0.3, 0.4).better is True
    )
    assert comparison.cell("miou", 0.4, 0.4) == comparison.Cell(0.4, 0.0, None)
    assert (
        comparison.cell("miou", None, 0.4).difference is None is comparison.cell("miou", 0.4, None).difference
    )


def test_settings_and_classes_that_differ() -> None:
    base, changed = make_evaluation(), make_evaluation(seed=0)
    changed["model"]["recipe"] |= {"window": 336, "extra": [1, True, None]}
    ious = [c["iou"] for c in base["classes"]]
    for index, gain in ((3, 0.05), (7, -0.1), (9, 0.01)):
        changed["classes"][index]["iou"] = ious[index] + gain
    found = comparison.evaluations([EvaluationResult.model_validate(record) for record in (base, changed)])
    assert found["settings"] == [
        ("recipe window", ["224", "336"]),
        ("recipe extra", ["none", "1, yes, none"]),
    ]
    names = [c["name"] for c in base["classes"]]
    assert [c["name"] for c in found["changes"][0]["classes"]] == [names[3], names[9], names[7]]


def test_benchmarks_of_one_name_are_compared_line_by_line(page: Path) -> None:
    outline = Outline(page.read_text())
    assert outline.row("MaskCLIP")[1:] == ["44.3", "47.3 +3.0"]
    assert outline.row("shot_noise 2")[1:] == ["57.2", "60.2 +3.0"]


# --- files ---


def test_both_results_of_one_folder(tmp_path: Path) -> None:
    save(tmp_path, make_evaluation())
    kinds = [result.kind for _, result in read_results(save(tmp_path, make_benchmark()))]
    assert kinds == ["evaluation", "benchmark"]


def test_nan_means_null(tmp_path: Path) -> None:
    record = make_evaluation()
    record["metrics"]["ece"] = record["classes"][0]["iou"] = float("nan")
    record["metrics"]["fwiou"] = float("inf")
    folder = save(tmp_path, record)
    assert "NaN" in (folder / "evaluation.json").read_text()
    [(_, result)] = read_results(folder)
    assert isinstance(result, EvaluationResult)
    assert result.metrics["ece"] is None is result.metrics["fwiou"] and result.classes[0].iou is None
    words = Outline(write_report([folder], tmp_path / "report.html").read_text()).words
    assert (
        "nan" not in squeeze(words).lower().split()
        and "calibration error (ECE) could not be computed" in words
    )


def break_json(record: Record) -> str:
    return json.dumps(record)[:-20]


def newer(record: Record) -> str:
    return json.dumps(record | {"schema_version": 2})


def other_kind(record: Record) -> str:
    return json.dumps(record | {"kind": "benchmark"})


def bad_color(record: Record) -> str:
    record["classes"][4]["color"] = "red;background:url(x)"
    return json.dumps(record)


def short_confusion(record: Record) -> str:
    return json.dumps(record | {"confusion": record["confusion"][:-1]})


def no_classes(record: Record) -> str:
    del record["classes"]
    return json.dumps(record)


@pytest.mark.parametrize(
    ("damage", "code", "phrase"),
    [
        (break_json, "file_damaged", "not valid JSON"),
        (lambda _: "[]", "file_damaged", "list"),
        (lambda _: "\x00\xff", "file_damaged", "not valid JSON"),
        (newer, "newer_version", "schema 2"),
        (other_kind, "file_damaged", ": kind: "),
        (bad_color, "file_damaged", "classes.4.color"),
        (short_confusion, "file_damaged", "21 × 22"),
        (no_classes, "file_damaged", "classes: Field required"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Any, code: str, phrase: str) -> None:
    (tmp_path / "evaluation.json").write_text(damage(make_evaluation()), encoding="latin-1")
    with pytest.raises(MaskMillError) as caught:
        write_report([tmp_path], tmp_path / "report.html")
    assert caught.value.code == code and phrase in caught.value.message
    assert str(tmp_path / "evaluation.json") in caught.value.message and caught.value.remedy
    assert not (tmp_path / "report.html").exists()


def test_a_folder_without_a_result_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MaskMillError) as caught:
            write_report([folder], tmp_path / "report.html")
        assert caught.value.code == "input_missing" and str(folder) in caught.value.message


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    folder, output = save(tmp_path / "run", make_benchmark()), tmp_path / "deep" / "report.html"
    write_report([folder], output)
    before = output.read_text()
    save(folder, make_benchmark(title="Another title"))
    assert "Another title" in write_report([folder], output).read_text() != before
    for mine in (tmp_path / "mine.html", tmp_path / "empty.html"):
        mine.write_text("my notes about MaskMill" if mine.stem == "mine" else "")
        kept = mine.read_bytes()
        with pytest.raises(MaskMillError) as caught:
            write_report([folder], mine)
        assert caught.value.code == "output_exists" and mine.read_bytes() == kept
    with pytest.raises(MaskMillError) as caught:
        write_report([folder], folder)
    assert caught.value.code == "output_exists"
    assert MARK in before[:4096] and sorted(p.name for p in output.parent.iterdir()) == ["report.html"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.4954, "49.5"),
        (-0.0321, "−3.2"),
        (12.34, "12.3"),
        (123456.7, "123,457"),
        (1, "100.0"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


# --- in a browser ---

_PROBE = """
<script>
const problems = [];
addEventListener("error", event => problems.push(event.message));
addEventListener("securitypolicyviolation", event => problems.push(event.blockedURI));
addEventListener("load", () => {
  const frame = document.querySelector("iframe"), inner = frame.contentDocument, view = frame.contentWindow;
  const values = list => [...list.children].map(item => Number(item.dataset.iou)).filter(value => value >= 0);
  const select = inner.querySelector("[data-sorts]"), list = inner.querySelector("[data-sorted]");
  const before = values(list);
  select.value = "-iou";
  select.dispatchEvent(new view.Event("change"));
  const after = values(list);
  const rising = list => list.every((value, i) => !i || value >= list[i - 1]);
  for (const details of inner.querySelectorAll("details")) details.open = true;
  const report = {
    width: view.innerWidth, wide: inner.documentElement.scrollWidth - view.innerWidth,
    falling: rising([...before].reverse()), rising: rising(after), items: after.length,
    last: Number(list.lastElementChild.dataset.iou), visible: !select.closest("label").hidden,
    images: [...inner.querySelectorAll("img")].map(image => image.naturalWidth),
    flat: [...inner.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height < 50).length,
    boxes: [...inner.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth + 1).length,
    requests: view.performance.getEntriesByType("resource").map(r => r.name)
      .filter(name => !name.startsWith("data:")),
    problems,
  };
  document.body.innerHTML = "<pre id=report>" + JSON.stringify(report) + "</pre>";
});
</script>"""


def chromium(*arguments: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--virtual-time-budget=3000",
    ]
    # A profile of its own: beside another Chromium with the same one it would only open a tab there.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        return subprocess.run(
            [CHROMIUM, *flags, f"--user-data-dir={profile}", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


def probe(page: Path, width: int, tmp_path: Path) -> Record:
    """What a browser says of the page in a frame: Chromium opens no window as narrow as a phone."""
    text = page.read_text().replace(
        "<head>",
        "<head><script>addEventListener('error', e => parent.problems.push(e.message));"
        "addEventListener('securitypolicyviolation', e => parent.problems.push(e.blockedURI));</script>",
        1,
    )
    driven = tmp_path / f"driven-{width}.html"
    frame = f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{html.escape(text)}"></iframe>'
    driven.write_text(f"<!doctype html><meta charset=utf-8><body>{_PROBE}{frame}", encoding="utf-8")
    ran = chromium(
        f"--window-size={max(width, 500) + 40},900",
        "--enable-logging=stderr",
        "--v=0",
        "--dump-dom",
        driven.as_uri(),
    )
    found = re.search(r'<pre id="report">(.*?)</pre>', ran.stdout)
    assert found, ran.stderr[-2000:]
    assert "CONSOLE" not in ran.stderr, ran.stderr
    report: Record = json.loads(html.unescape(found.group(1)))
    return report


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (Debian: apt install chromium)"
)


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(page: Path, tmp_path: Path, width: int) -> None:
    """Nothing sticks out sideways, sorting works, the console is silent, nothing is asked of the network."""
    seen = probe(page, width, tmp_path)
    assert seen["width"] == width and seen["wide"] <= 0
    assert (
        seen["visible"] and seen["falling"] and seen["rising"] and seen["items"] == 20 and seen["last"] == -1
    )
    assert len(seen["images"]) == 4 and all(seen["images"]) and seen["flat"] == 0
    assert seen["requests"] == [] and seen["problems"] == []
    assert (seen["boxes"] > 0) == (width == 390)  # wide tables scroll in their own box on a phone only


@pytest.mark.browser
@needs_browser
def test_screenshot_and_print(folders: list[Path], tmp_path: Path) -> None:
    page = write_report([folders[0], folders[3]], tmp_path / "report.html")
    shot, paper = tmp_path / "page.png", tmp_path / "page.pdf"
    chromium("--window-size=1280,1600", f"--screenshot={shot}", page.as_uri())
    picture = Image.open(shot).convert("RGB")
    assert picture.size == (1280, 1600)
    assert len(picture.getcolors(1 << 24)) > 200
    assert np.asarray(picture)[-200:].std() > 5  # text and bars, to the lower end
    chromium(f"--print-to-pdf={paper}", "--no-pdf-header-footer", page.as_uri())
    assert paper.read_bytes().startswith(b"%PDF") and paper.stat().st_size > 50_000


LONG = "a_name_without_any_place_to_break_" * 5
HOSTILE = (LONG, "<script>alert(1)</script>", "قطة", "🐞", "a\u202eb", "long words " * 12)


def make_hostile(ontology: str) -> Record:
    record = make_evaluation(ontology, title=LONG, command=LONG, protocol=LONG)
    for known, name in zip(record["classes"], HOSTILE, strict=False):
        known["name"] = name
    record["model"]["weights"]["model"] = record["dataset"]["name"] = LONG
    record["published"][0]["method"] = LONG
    return record


def make_single() -> Record:
    record = make_evaluation("voc21")
    return record | {"classes": record["classes"][:1], "confusion": [[100, 20]]}


def make_long_benchmark() -> Record:
    record = make_benchmark(title=LONG)
    for section in record["sections"]:
        section["title"] = section["rows"][0]["name"] = LONG
    return record


def make_empty_benchmark() -> Record:
    nothing = {"name": "a", "title": "A", "note": None, "metrics": ["miou"], "rows": []}
    return make_benchmark(sections=[nothing], claims=[])


@pytest.mark.browser
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(make_hostile, "voc21"),
        functools.partial(make_hostile, "cocostuff171"),
        make_single,
        make_long_benchmark,
        make_empty_benchmark,
    ],
    ids=["21 classes", "171 classes", "one class", "benchmark", "nothing"],
)
def test_nothing_sticks_out_whatever_the_names(tmp_path: Path, browser: Page, make: Any) -> None:
    page = write_report([save(tmp_path / "run", make())], tmp_path / "report.html")
    for width in (320, 390, 1440):
        browser.open(page.as_uri(), width=width, ready=WRITTEN)
        browser.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("document.querySelectorAll('script').length") == 1 and browser.console == []
