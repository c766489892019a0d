"""The gallery of small tables with known contents, and the page in a real browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable
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
from pipeline.report.gallery_filter import Only
from pipeline.table import labels, statistics
from pipeline.table.views import View
from pipeline.toyworld import scenes as toyworld
from tests.browser import WRITTEN, Page

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


def test_counts_are_believed_if_they_are_of_as_many_rows(tmp_path: Path) -> None:
    table = make_table(tmp_path, count=4)
    record = json.loads((table / "dataset.json").read_text())
    counts = labels.summarise(str(table)) | {"mean_quality": 0.123}
    for images, believed in ((counts["images"], True), (counts["images"] + 1, False)):
        record["counts"] = counts | {"images": images}
        (table / "dataset.json").write_text(json.dumps(record))
        words = write_gallery(table, tmp_path / "page.html").read_text()
        assert ("<dd>0.12</dd>" in words) == believed


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
    assert len(cards) == 8 + 3 and len(outline.all("img")) == 3 * 8
    assert [card["data-status"] for card in cards] == ["ok"] * 8 + ["not_found", "truncated", "truncated"]
    assert "Toy weights" in outline.words
    assert "<toys & things>" in outline.words  # names are text, whatever they contain
    assert "bold" in outline.words and not outline.all("b")
    for code, count in (("truncated", "2"), ("not_found", "1")):
        assert re.search(rf"{count}\s*{code}", outline.words)
    assert all(image.get("alt") for image in outline.all("img"))


def test_nothing_is_loaded_from_anywhere(page: Path) -> None:
    outline = Outline(page.read_text())
    for _, attributes in outline.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), value
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
    assert [card["data-status"] for card in outline.all("article")] == ["ok", "not_found", "truncated"]


def test_pictures_show_what_is_in_the_table(table: Path, page: Path) -> None:
    outline = Outline(page.read_text())
    images = outline.all("img")
    row = next(row for row in labels.iter_rows(table) if row["uri"].endswith("scene 2.png"))
    place = next(i for i, image in enumerate(images) if image["alt"] == "Image scene 2.png")
    photo, overlay, certain = (pixels(images[place + i]["src"]) for i in (0, -1, 1))
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
    cards = Outline(text).all("article", **{"data-status": "ok"})
    scores = [float(card["data-quality"] or "nan") for card in cards]
    expected = {"worst": [0.25, 0.35, 0.45], "best": [0.95, 0.85, 0.75]}.get(order)
    assert len(scores) == 3
    if expected:
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def shown(text: str) -> list[str]:
    """Names of the images on a page, failed ones too, sorted."""
    return sorted(str(card["data-name"]) for card in Outline(text).all("article"))


def test_only_what_is_asked_for_is_shown(table: Path, tmp_path: Path) -> None:
    rows = [*labels.iter_rows(table)]
    number = toyworld.CLASSES.index("sky")
    with_sky = sorted(
        Path(row["uri"]).name
        for row in rows
        if any(one["class_id"] == number for one in row["segments"] or ())
    )

    def page(limit: int = 60, view: Any = None, **asked: Any) -> str:
        only = Only.of(*(asked.get(name) for name in ("name", "status", "quality")))
        return write_gallery(table, tmp_path / "page.html", limit=limit, view=view, only=only).read_text()

    assert 0 < len(with_sky) < 8 and shown(page(name="sky")) == with_sky
    assert shown(page(status="truncated")) == ["x.jpg", "y.jpg"]
    assert shown(page(quality="0.4-0.7")) == ["scene 3.png", "scene 4.png", "scene 5.png"]
    assert "with sky, quality from 0 to below 0.5" in page(name="sky", quality="0-0.5")
    # A few of all that are so, not those of a few that happen to be.
    assert len(shown(page(limit=1, name="sky"))) == 1
    # Through a view, its classes and qualities are asked for; the statistics are of the whole table.
    record = json.loads((table / "dataset.json").read_text())["ontology"]
    ontology = Ontology.model_validate({k: record[k] for k in ("name", "classes", "background")})
    view = View(rename={"sky": "heaven"}).of(ontology)
    found = page(view=view, name="heaven")
    assert shown(found) == with_sky and "of 11 images" in found
    for asked, says in (
        ({"name": "skyy"}, "Did you mean sky"),
        ({"status": "truncatd"}, "Did you mean truncated"),
        ({"quality": "low"}, "Write --quality 0-0.5"),
        ({"quality": "0.5-0.5"}, "no range"),
    ):
        with pytest.raises(MaskMillError) as caught:
            page(**asked)
        assert caught.value.code == "wrong_use" and says in str(caught.value), caught.value


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
        ({"table": tmp_path}, "input_missing"),
        ({"table": table, "limit": -1}, "wrong_use"),
        ({"table": table, "order": "random"}, "wrong_use"),
    ):
        with pytest.raises(MaskMillError) as caught:
            write_gallery(output=tmp_path / "page.html", **arguments)  # type: ignore[arg-type]
        assert caught.value.code == code
    assert not (tmp_path / "page.html").exists()
    for output in ("s3://bucket/page.html", Path("s3://bucket/page.html")):
        with pytest.raises(MaskMillError, match="local"):
            write_gallery(table, output)


def test_large_images_become_thumbnails() -> None:
    assert gallery.thumbnail_size((3000, 4000), 480) == (360, 480)
    assert gallery.thumbnail_size((30, 40), 480) == (30, 40)
    assert gallery.thumbnail_size((1, 10_000), 480) == (1, 480)


def test_failures_of_every_code_are_shown(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    rows = [failed(i, f"{i}.jpg", "truncated", "cut") for i in range(500)]
    rows += [failed(1000 + i, f"gone {i}.jpg", "not_found", f"<i>{i}</i>") for i in range(2)]
    table = pa.Table.from_pylist(rows, schema=labels.LABEL_SCHEMA)
    pq.write_table(table, tmp_path / "labels" / "0.parquet", row_group_size=100)
    outline = Outline(write_gallery(tmp_path, tmp_path / "page.html", limit=10).read_text())
    shown = [card["data-status"] for card in outline.all("article")]
    assert shown.count("truncated") == 5 and shown.count("not_found") == 2
    assert "<i>1</i>" in outline.words and "truncated (500)" in outline.words


HOSTILE = (
    "<script>problems.push('class')</script>",
    "\"'><img src=x onerror=problems.push('attribute')>",
    "{{ 7 * 7 }}",
    "قطة",
    "a rather long name of a class that nobody will ever want to read to its end " * 2,
    "🐞🐞🐞",
    "a\u202eb",  # the rest of the line from right to left
)


def make_hostile(folder: Path, *, count: int = 60) -> Path:
    """Images of all shapes, with names and classes that are no harmless words."""
    (folder / "photos").mkdir(parents=True)
    (folder / "table" / "labels").mkdir(parents=True)
    random = np.random.default_rng(0)
    names = [*HOSTILE, *(f"class {i}" for i in range(171 - len(HOSTILE)))]
    rows = []
    for index in range(count):
        height, width = random.integers(20, 200, 2).tolist() if index else (4, 400)
        stem = HOSTILE[index % len(HOSTILE)].replace("/", "_")[:80]
        path = folder / "photos" / f"{index} {stem}.png"
        Image.fromarray(random.integers(0, 255, (height, width, 3)).astype(np.uint8)).save(path)
        mask = (np.arange(width) * 8 // width + index).astype(np.uint8)[None].repeat(height, 0)
        confidence = np.full(mask.shape, 200, np.uint8)
        rows.append(labelled_row(index, path, mask, confidence, 0.5 + index / 200))
    rows += [failed(1000 + i, f"/x/{name}.png", "not_found", name) for i, name in enumerate(HOSTILE)]
    table = pa.Table.from_pylist(rows, schema=labels.LABEL_SCHEMA)
    pq.write_table(table, folder / "table" / "labels" / "0.parquet")
    ontology = Ontology(name="odd", classes=[{"name": name} for name in names], background=None)
    record = {
        "schema_version": 1,
        "ontology": ontology.to_record(),
        "recipe": {"name": HOSTILE[0], "hash": "0"},
        "weights": {"model": HOSTILE[1], "pretrained": HOSTILE[2], "fingerprint": "0"},
        "versions": {},
        "counts": {},
    }
    (folder / "table" / "dataset.json").write_text(json.dumps(record))
    return folder / "table"


# --- in a browser ---


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = make_hostile(tmp_path_factory.mktemp("hostile"))
    return write_gallery(table, table / "gallery.html")


SHOWN = "[...document.querySelectorAll('.card')].filter(card => card.offsetParent)"
WATCH = """
var problems = [];
addEventListener('error', event => problems.push(event.message));
addEventListener('securitypolicyviolation', event => problems.push(event.blockedURI));
"""


@pytest.fixture
def opened(browser: Page) -> Callable[[Path, int], None]:
    browser.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)

    def go(page: Path, width: int) -> None:
        browser.open(page.as_uri(), width=width, ready=WRITTEN)

    return go


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 390, 700, 1440, 2200])
def test_rows_have_no_gaps(browser: Page, opened: Any, hostile: Path, page: Path, width: int) -> None:
    """In every row the pictures are equally high, and but for the last row they fill it."""
    for shown in (page, hostile):
        opened(shown, width)
        boxes = browser.run(
            f"{SHOWN}.map(card => [card, card.querySelector('.open')].flatMap(e => "
            "(b => [b.left, b.top, b.right, b.bottom])(e.getBoundingClientRect())))"
        )
        left, right = browser.run(
            "(b => [b.left, b.right])(document.querySelector('.grid').getBoundingClientRect())"
        )
        rows: dict[int, list[list[float]]] = {}
        for box in boxes:
            rows.setdefault(round(box[1]), []).append(box)
        last = max(rows)
        for top, cards in rows.items():
            assert max(box[3] for box in cards) - min(box[3] for box in cards) < 1.5
            assert max(box[7] for box in cards) - min(box[7] for box in cards) < 1.5
            assert abs(cards[0][0] - left) < 1
            if top != last:
                assert abs(cards[-1][2] - right) < 1
        assert len(rows) > 1
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("problems") == [] and browser.console == []


@pytest.mark.browser
def test_pages_filters_and_order(browser: Page, opened: Any, hostile: Path) -> None:
    opened(hostile, 390)
    assert browser.run("document.documentElement.scrollHeight") < 6000  # 67 images on a phone
    assert browser.run(f"{SHOWN}.length") == 12
    assert browser.run("document.getElementById('page').textContent") == "1 to 12 of 67"
    seen = set()
    for step in range(6):
        seen |= set(browser.run(f"{SHOWN}.map(card => card.dataset.name)"))
        if step < 5:
            browser.click("[data-step='1']")
    assert len(seen) == 67 and browser.run("document.querySelector(\"[data-step='1']\").disabled")

    def select(box: str, value: str) -> None:
        browser.run(
            f"(() => {{ const s = document.getElementById('{box}'); s.value = '{value}';"
            " s.dispatchEvent(new Event('change')); return true; })()"
        )

    select("status", "not_found")
    assert browser.run(f"{SHOWN}.map(card => card.dataset.status)") == ["not_found"] * 7
    select("status", "ok")
    for order, right in (("worst", 0.5), ("best", 0.5 + 59 / 200)):
        select("sort", order)
        assert browser.run(f"{SHOWN}.map(card => +card.dataset.quality)")[0] == pytest.approx(right)
    browser.click("aside summary")
    chosen = browser.run("document.querySelector('[data-class]').dataset.class")
    browser.click(f"[data-class='{chosen}']")
    classes = browser.run(f"{SHOWN}.map(card => card.dataset.classes.split(' '))")
    assert classes and all(chosen in some for some in classes)
    assert browser.run("document.querySelector('[data-class]').getAttribute('aria-pressed')") == "true"
    # What is chosen stands in the address: it may be linked to.
    assert browser.run("location.hash") == f"#class={chosen}&status=ok"
    browser.click("#clear")
    assert browser.run(f"{SHOWN}.length") == 12
    browser.run("location.hash = 'status=ok&quality=0.5-0.8'")
    browser.wait("document.getElementById('quality').value === '0.5-0.8'")
    assert all(0.5 <= quality < 0.8 for quality in browser.run(f"{SHOWN}.map(card => +card.dataset.quality)"))
    assert browser.run("problems") == [] and browser.console == []


@pytest.mark.browser
def test_views_and_the_large_picture_with_the_keyboard(browser: Page, opened: Any, page: Path) -> None:
    opened(page, 1440)
    pictures = "[...card.querySelectorAll('img')].filter(i => i.offsetParent).map(i => i.className).join()"
    visible = f"{SHOWN}.slice(0, 8).map(card => {pictures})"
    assert set(browser.run(visible)) == {"labels"}
    for view, kind in (("photo", "photo"), ("certain", "certain"), ("labels", "labels")):
        browser.run(f"document.querySelector('.segmented [data-view={view}]').focus()")
        browser.key("Enter", 13, "\r")
        assert set(browser.run(visible)) == {kind}
    browser.run("document.querySelector('.open').focus()")
    browser.key("Enter", 13, "\r")
    assert browser.run("document.querySelector('dialog').open")
    names = browser.run(f"{SHOWN}.map(card => card.dataset.name)")
    assert browser.run("document.getElementById('large-name').textContent") == names[0]
    assert browser.run("document.querySelectorAll('dialog img').length") == 3
    browser.key("ArrowRight", 39)
    assert browser.run("document.getElementById('large-name').textContent") == names[1]
    browser.key("Escape", 27)
    assert not browser.run("document.querySelector('dialog').open")
    # The keyboard resumes where the large picture was.
    browser.wait(f"document.activeElement.closest('.card')?.dataset.name === '{names[1]}'")
    assert browser.run("[...document.querySelectorAll('.card img')].every(i => i.complete && i.naturalWidth)")
    assert not [url for url in browser.requests if not url.startswith(("data:", page.as_uri()))]
    assert browser.run("problems") == [] and browser.console == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1440])
def test_zoom_overlay_and_confidence_by_key(browser: Page, opened: Any, page: Path, width: int) -> None:
    opened(page, width)
    view = "document.querySelector('.grid').dataset.view"
    for key, code, kind in (("o", 79, "photo"), ("c", 67, "certain")):
        for expected in (kind, "labels"):
            browser.key(key, code)
            assert browser.run(view) == expected
    browser.key("c", 67)
    assert browser.run("document.querySelector('.scale').offsetParent !== null")
    browser.key("c", 67)

    # In the large picture they stand in the place of the labels, enlarged or not.
    browser.click(".open")
    card, labels_pane = "document.querySelector('.card')", "document.querySelector('dialog img.labels')"
    caption = f"{labels_pane}.closest('figure').querySelector('figcaption').textContent"
    for zoomed in (False, True):
        for key, code, kind, says in (("o", 79, "photo", "image"), ("c", 67, "certain", "confidence")):
            browser.key(key, code)
            assert browser.run(f"{labels_pane}.src === {card}.querySelector('img.{kind}').src")
            assert browser.run(caption) == says
            browser.key(key, code)
            assert browser.run(f"{labels_pane}.src === {card}.querySelector('img.labels').src")
            assert browser.run(caption) == "labels" and browser.run(view) == "labels"
        before = browser.run(f"{labels_pane}.getBoundingClientRect().width")
        browser.key("z", 90)
        ratio = browser.run(f"{labels_pane}.getBoundingClientRect().width") / before
        assert ratio < 1 if zoomed else ratio > 1.8
    # A click zooms, too; of another image the labels are shown.
    browser.click("dialog img.labels")
    assert browser.run("document.querySelector('.zoomed').scrollWidth > innerWidth * .9")
    browser.key("o", 79)
    browser.key("ArrowRight", 39)
    assert browser.run(caption) == "labels" and not browser.run("document.querySelector('.zoomed')")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("problems") == [] and browser.console == []


@pytest.mark.browser
def test_a_filter_that_nothing_on_the_page_passes_says_how_to_look_further(
    browser: Page, opened: Any, table: Path, tmp_path: Path
) -> None:
    opened(write_gallery(table, tmp_path / "page.html", limit=1), 390)
    absent = browser.run("document.querySelector('.absent').dataset.class")
    name = browser.run("document.querySelector('.absent .name').textContent")
    browser.run(f"location.hash = 'class={absent}&status=ok&quality=0-0.5'")
    browser.wait("!document.getElementById('none').hidden")
    said = browser.run("document.getElementById('more').textContent")
    assert said == f"maskmill show {shlex.quote(str(table))} --class {name} --status ok --quality 0-0.5"
    assert browser.run("document.documentElement.scrollWidth") <= 390


@pytest.mark.browser
def test_hostile_names_are_text(browser: Page, opened: Any, hostile: Path) -> None:
    opened(hostile, 1440)
    words = browser.run("document.body.textContent")
    assert all(name in words for name in HOSTILE)
    browser.click(".open")
    assert browser.run("document.querySelectorAll('script').length") == 1
    assert browser.run("document.querySelectorAll('[onerror]').length") == 0
    assert browser.run("problems") == []
