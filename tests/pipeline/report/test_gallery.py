"""The gallery of small tables with known contents, and the page in a real browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from models.errors import MaskMillError
from pipeline.ontology.ontology import Ontology
from pipeline.report import gallery
from pipeline.report.gallery import write_gallery
from pipeline.table import labels, statistics
from pipeline.toyworld import scenes as toyworld

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZE = 64


def grey_png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def labelled_row(
    number: int, path: Path, mask: np.ndarray, confidence: np.ndarray, quality: float
) -> dict[str, Any]:
    return {
        "id": number,
        "uri": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).digest() if path.exists() else b"\0" * 32,
        "height": mask.shape[0],
        "width": mask.shape[1],
        "status": "ok",
        "error": None,
        "mask": {"bytes": grey_png(mask), "path": None},
        "confidence": {"bytes": grey_png(confidence), "path": None},
        "segments": statistics.segments(mask, confidence, ignore_index=255),
        "quality": quality,
    }


def failed(number: int, uri: str, code: str, message: str) -> dict[str, Any]:
    row = dict.fromkeys(labels.LABEL_SCHEMA.names)
    return row | {"id": number, "uri": uri, "status": code, "error": message}


def make_table(folder: Path, *, count: int = 8, model: str = "toyclip", pretrained: str = "bundled") -> Path:
    """A table of toy scenes in two files, with true maps as labels, doubts, and failures of two kinds."""
    (folder / "photos").mkdir(parents=True)
    (folder / "table" / "labels").mkdir(parents=True)
    toys = toyworld.generate(3, count, SIZE)
    random = np.random.default_rng(0)
    rows = []
    for index in range(count):
        path = folder / "photos" / f"scene {index}.png"
        Image.fromarray(np.asarray(toys.images[index])).save(path)
        mask = np.asarray(toys.labels[index]).astype(np.uint8).copy()
        mask[:6, :10] = 255
        coarse = random.integers(90, 255, (4, 4)).astype(np.uint8)
        confidence = np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        rows.append(labelled_row(index * 1001, path, mask, confidence, 0.95 - 0.1 * index))
    rows.append(failed(77, "gone.jpg", "not_found", "FileNotFoundError: gone.jpg"))
    rows.append(failed(78, "x.jpg", "truncated", "image file is truncated <b>bold</b>"))
    rows.append(failed(79, "y.jpg", "truncated", "image file is truncated"))
    for part, some in enumerate((rows[:5], rows[5:])):
        table = pa.Table.from_pylist(some, schema=labels.LABEL_SCHEMA)
        pq.write_table(table, folder / "table" / "labels" / f"{part}.parquet", row_group_size=2)
    ontology = Ontology(
        name="<toys & things>", classes=[{"name": name} for name in toyworld.CLASSES], background=None
    )
    record = {
        "schema_version": 1,
        "ontology": ontology.to_record(),
        "recipe": {"name": "toy", "hash": "0"},
        "weights": {"model": model, "pretrained": pretrained, "fingerprint": "0"},
        "versions": {},
        "counts": {},
    }
    (folder / "table" / "dataset.json").write_text(json.dumps(record))
    return folder / "table"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_table(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="module")
def page(table: Path) -> Path:
    return write_gallery(table, table / "gallery.html")


class Outline(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in wanted.items())]


def pixels(uri: str | None) -> np.ndarray:
    assert uri is not None and uri.startswith("data:image/jpeg;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_everything_is_on_the_page(page: Path) -> None:
    outline = Outline(page.read_text())
    cards = outline.all("article", **{"class": "card"})
    assert len(cards) == 8
    assert len(outline.all("img")) == 3 * 8 + 1  # and the empty one of the enlarged view
    assert "Toy weights" in outline.words
    assert "<toys & things>" in outline.words  # names are text, whatever they contain
    assert "bold" in outline.words and not outline.all("b")
    for code, count in (("truncated", "2"), ("not_found", "1")):
        assert re.search(rf"{count}\s*{code}", outline.words)
    assert all(image.get("alt") for image in outline.all("img")[:-1])


def test_nothing_is_loaded_from_anywhere(page: Path) -> None:
    outline = Outline(page.read_text())
    for _, attributes in outline.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:"), value
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp", page.read_text())
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in outline.all("meta"))


def test_coverage_is_counted_over_the_whole_table(table: Path, tmp_path: Path) -> None:
    text = write_gallery(table, tmp_path / "page.html", limit=1).read_text()
    area: dict[int, int] = {}
    for row in labels.iter_rows(table, ["segments", "status"]):
        for segment in row["segments"] or ():
            area[segment["class_id"]] = area.get(segment["class_id"], 0) + segment["area"]
    total = 8 * (SIZE * SIZE - 60)
    assert sum(area.values()) == total
    outline = Outline(text)
    order = [int(b["data-class"] or -1) for b in outline.all("button") if "data-class" in b]
    assert order == sorted(area, key=lambda i: (-area[i], i))
    largest = order[0]
    name, share = toyworld.CLASSES[largest], 100 * area[largest] / total
    assert re.search(rf"{name}\s*{share:.0f} %", outline.words)
    assert len(outline.all("article")) == 1


def test_pictures_show_what_is_in_the_table(table: Path, page: Path) -> None:
    outline = Outline(page.read_text())
    images = outline.all("img")
    row = next(row for row in labels.iter_rows(table) if row["uri"].endswith("scene 2.png"))
    place = next(i for i, image in enumerate(images) if image["alt"] == "Image scene 2.png")
    photo, overlay, certain = (pixels(images[place + i]["src"]) for i in range(3))
    truth = np.asarray(Image.open(row["uri"]))
    assert photo.shape == truth.shape and np.abs(photo.astype(int) - truth).mean() < 12
    mask = labels.decode_mask(row["mask"]["bytes"])
    # Unsure pixels have no colour of their own; the rest leans to the colour of the class.
    corner = overlay[1:4, 1:8].astype(int)
    assert (corner.max(axis=2) - corner.min(axis=2)).max() < 30
    given = json.loads((table / "dataset.json").read_text())["ontology"]
    palette = Ontology.model_validate({k: given[k] for k in ("name", "classes", "background")}).palette()
    inside = (mask != 255) & (np.roll(mask, 1, 0) == mask) & (np.roll(mask, 1, 1) == mask)
    tinted, wanted = overlay[inside].astype(float), palette[mask[inside]].astype(float)
    assert np.corrcoef(tinted[:, 0] - tinted[:, 2], wanted[:, 0] - wanted[:, 2])[0, 1] > 0.9
    # Viridis: more confidence is more green.
    confidence = labels.decode_confidence(row["confidence"]["bytes"])
    known = mask != 255
    assert np.corrcoef(certain[..., 1][known].astype(float), confidence[known].astype(float))[0, 1] > 0.9


@pytest.mark.parametrize("order", ["sample", "worst", "best"])
def test_order_and_limit(table: Path, tmp_path: Path, order: Any) -> None:
    text = write_gallery(table, tmp_path / "page.html", limit=3, order=order).read_text()
    scores = [float(card["data-quality"] or "nan") for card in Outline(text).all("article")]
    expected = {"worst": [0.25, 0.35, 0.45], "best": [0.95, 0.85, 0.75]}.get(order)
    assert len(scores) == 3
    if expected:
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_the_sample_does_not_depend_on_files(table: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    shutil.copy(table / "dataset.json", tmp_path)
    whole = pa.concat_tables(
        [pq.read_table(path) for path in sorted((table / "labels").iterdir(), reverse=True)]
    )
    pq.write_table(whole, tmp_path / "labels" / "one.parquet")
    names = []
    for place in (table, tmp_path):
        outline = Outline(write_gallery(place, tmp_path / "page.html", limit=4).read_text())
        names.append([image["alt"] for image in outline.all("img")])
    assert names[0] == names[1]


def test_vanished_and_changed_images(tmp_path: Path) -> None:
    table = make_table(tmp_path, count=3)
    (tmp_path / "photos" / "scene 0.png").unlink()
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "photos" / "scene 1.png")
    outline = Outline(write_gallery(table, tmp_path / "page.html").read_text())
    assert "there is no such file or object" in outline.words
    assert "the file has changed since it was labelled" in outline.words
    alts = [image["alt"] or "" for image in outline.all("img")]
    assert not any(alt == "Image scene 0.png" for alt in alts)
    assert any(alt.startswith("Labels of scene 0.png") for alt in alts)


def test_notices(tmp_path: Path) -> None:
    for index, (model, pretrained, words) in enumerate(
        [("ViT-B-16", "random:0", "Random weights"), ("ViT-B-16-quickgelu", "openai", None)]
    ):
        table = make_table(tmp_path / str(index), count=1, model=model, pretrained=pretrained)
        outline = Outline(write_gallery(table, tmp_path / "page.html").read_text())
        notices = outline.all("p", role="note")
        assert bool(notices) == (words is not None)
        assert words is None or words in outline.words


def test_a_table_without_its_record_and_one_of_failures_only(tmp_path: Path) -> None:
    table = make_table(tmp_path / "a", count=1)
    (table / "dataset.json").unlink()
    assert "class " in Outline(write_gallery(table, tmp_path / "page.html").read_text()).words
    (tmp_path / "b" / "labels").mkdir(parents=True)
    rows = pa.Table.from_pylist([failed(1, "x", "empty", "0 bytes")], schema=labels.LABEL_SCHEMA)
    pq.write_table(rows, tmp_path / "b" / "labels" / "0.parquet")
    outline = Outline(write_gallery(tmp_path / "b", tmp_path / "page.html").read_text())
    assert "No labelled image" in outline.words and "empty" in outline.words


def test_wrong_use(tmp_path: Path, table: Path) -> None:
    for arguments, code in (
        ({"table": tmp_path}, "table_missing"),
        ({"table": table, "limit": -1}, "wrong_use"),
        ({"table": table, "order": "random"}, "wrong_use"),
    ):
        with pytest.raises(MaskMillError) as caught:
            write_gallery(output=tmp_path / "page.html", **arguments)  # type: ignore[arg-type]
        assert caught.value.code == code
    assert not (tmp_path / "page.html").exists()


def test_large_images_become_thumbnails() -> None:
    assert gallery.thumbnail_size((3000, 4000), 480) == (360, 480)
    assert gallery.thumbnail_size((30, 40), 480) == (30, 40)
    assert gallery.thumbnail_size((1, 10_000), 480) == (1, 480)


# --- in a browser ---


def chromium(*arguments: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
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


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt install chromium)")
def test_in_a_browser(page: Path, tmp_path: Path) -> None:
    """Filter, sort and enlarge work, nothing is written to the console, nothing asked of the network."""
    steps = """
    <script>
    const problems = [];
    addEventListener("error", event => problems.push(event.message));
    addEventListener("securitypolicyviolation", event => problems.push(event.blockedURI));
    addEventListener("load", () => {
      const shown = () => [...document.querySelectorAll(".card:not([hidden])")];
      const bar = document.querySelector("[data-class]"), sort = document.getElementById("sort");
      const all = shown().length;
      bar.click();
      const some = shown(), fits = some.every(c => c.dataset.classes.split(" ").includes(bar.dataset.class));
      const pressed = bar.getAttribute("aria-pressed");
      document.querySelector(".clear").click();
      sort.value = "worst";
      sort.dispatchEvent(new Event("change"));
      const scores = shown().map(card => +card.dataset.quality);
      document.querySelector(".pane button").click();
      const images = [...document.querySelectorAll(".card img")];
      const report = {
        all, some: some.length, fits, pressed, again: shown().length,
        sorted: scores.every((score, i) => !i || score >= scores[i - 1]),
        dialog: document.querySelector("dialog").open,
        broken: images.filter(image => !image.naturalWidth).length,
        wide: document.documentElement.scrollWidth - innerWidth,
        requests: performance.getEntriesByType("resource").map(r => r.name)
          .filter(name => !name.startsWith("data:")),
        problems,
      };
      document.body.innerHTML = "<pre id=report>" + JSON.stringify(report) + "</pre>";
    });
    </script>"""
    driven = tmp_path / "driven.html"
    driven.write_text(page.read_text().replace("<head>", "<head>" + steps, 1))
    for width in (500, 1440):  # Chromium opens no narrower window
        ran = chromium(
            f"--window-size={max(width, 500)},900",
            "--enable-logging=stderr",
            "--v=0",
            "--dump-dom",
            driven.as_uri(),
        )
        found = re.search(r'<pre id="report">(.*?)</pre>', ran.stdout)
        assert found, ran.stderr[-2000:]
        report = json.loads(found.group(1))
        assert report["all"] == report["again"] == 8 and 0 < report["some"] <= 8
        assert report["fits"] and report["pressed"] == "true" and report["sorted"] and report["dialog"]
        assert report["broken"] == 0 and report["wide"] <= 0
        assert report["requests"] == [] and report["problems"] == []
        assert "CONSOLE" not in ran.stderr
