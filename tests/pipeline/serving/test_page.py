"""The page in headless Chromium, with a real server behind it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.serve import entry
from models.errors import MaskMillError
from pipeline.serving.limits import Limits
from pipeline.serving.registry import Entry, ModelInfo
from pipeline.toyworld import scenes as toyworld
from tests.browser import Page
from tests.pipeline.serving.harness import Server, png
from tests.pipeline.trained.test_student import toy_student

pytestmark = pytest.mark.browser

SCENE = toyworld.scene(2026, 0, 96)
IDLE = "document.getElementById('busy').hidden && !!document.getElementById('overlay').dataset.answer"
PAINTED = """(() => {
  const overlay = document.getElementById('overlay');
  if (overlay.hidden || !overlay.width) return 0;
  const data = overlay.getContext('2d').getImageData(0, 0, overlay.width, overlay.height).data;
  let painted = 0;
  for (let i = 3; i < data.length; i += 4) painted += data[i] > 0;
  return painted / (overlay.width * overlay.height);
})()"""
ROWS = """[...document.querySelectorAll('#prompts li')].map(row =>
  [row.querySelector('.name').textContent, row.querySelector('.num').textContent])"""
ALERT = "document.getElementById('alert').hidden ? '' : document.getElementById('alert').innerText"


def settled(page: Page, *, prompts: int) -> None:
    """Wait until there are so many prompts and an answer about them."""
    page.wait(f"{IDLE} && document.querySelectorAll('#prompts li').length === {prompts}")
    page.wait(f"{ROWS}.every(([, share]) => share)")


def choose_model(page: Page, name: str) -> None:
    page.run(
        f"(() => {{ const s = document.getElementById('model'); s.value = '{name}';"
        " s.dispatchEvent(new Event('change')); return true; })()"
    )


def test_a_sample_and_typed_prompts(toy: Server, browser: Page) -> None:
    browser.open(toy.url)
    assert "Toy weights" in browser.run("document.getElementById('notice').innerText")
    assert browser.run("getComputedStyle(document.getElementById('view')).display") == "none"
    browser.wait(
        "(all => all.length > 0 && all.every(image => image.naturalWidth === 256))"
        "([...document.querySelectorAll('.samples img')])"
    )
    browser.click(".samples li:first-child button")
    settled(browser, prompts=3)
    before = browser.run(PAINTED)
    assert 0.3 < before <= 1

    browser.type("#word", "sunflower, no such thing")
    settled(browser, prompts=5)
    rows = dict(browser.run(ROWS))
    scene = toyworld.scene(2026, 0, 256)
    truth = (scene.labels == toyworld.CLASSES.index("sunflower")).mean()
    assert abs(int(rows["sunflower"].split()[0]) / 100 - truth) < 0.05
    # A mask where the sunflower is, in the colour of its row.
    y, x = (int(np.median(axis)) for axis in np.nonzero(scene.labels == toyworld.CLASSES.index("sunflower")))
    pixel = browser.run(
        f"[...document.getElementById('overlay').getContext('2d').getImageData({x}, {y}, 1, 1).data]"
    )
    at = list(rows).index("sunflower")
    swatches = f"document.querySelectorAll('#prompts .swatch')[{at}]"
    swatch = browser.run(f"getComputedStyle({swatches}).backgroundColor")
    np.testing.assert_allclose(pixel[:3], [int(v) for v in swatch[4:-1].split(",")], atol=2)

    # What is under the pointer is named.
    box = browser.run("(() => { const b = document.getElementById('picture').getBoundingClientRect();"
                      " return [b.x, b.y, b.width, b.height]; })()")  # fmt: skip
    browser.mouse("mouseMoved", box[0] + box[2] * (x + 0.5) / 256, box[1] + box[3] * (y + 0.5) / 256)
    assert browser.run("document.getElementById('tip').textContent").startswith("sunflower ")

    # Hiding, removing, undoing with the keyboard.
    everything = browser.run(PAINTED)
    browser.click(f"#prompts li:nth-child({at + 1}) .toggle")
    browser.wait(f"{PAINTED} < {everything} - {truth} / 2")
    browser.click("#prompts li:nth-child(1) .remove")
    settled_rows = f"{ROWS}.length === 4"
    browser.wait(settled_rows)
    browser.click("#word")
    browser.key("Backspace", 8)
    browser.wait(f"{ROWS}.length === 3")
    assert browser.run("document.activeElement.id") == "word"
    assert browser.console == []
    assert all(url.startswith((toy.url, "data:", "blob:")) for url in browser.requests)


def test_threshold_opacity_and_views_need_no_request(toy: Server, browser: Page) -> None:
    browser.open(toy.url)
    browser.give("drop", ".stage", png(SCENE.image), "scene.png")
    browser.type("#word", "grass, water")
    settled(browser, prompts=2)
    before = browser.run(PAINTED)
    browser.requests.clear()
    set_slider = (
        "(() => { const s = document.getElementById('%s'); s.value = %d;"
        " s.dispatchEvent(new Event('input')); return true; })()"
    )
    browser.run(set_slider % ("threshold", 97))
    browser.wait(f"{PAINTED} < {before}")
    browser.run(set_slider % ("opacity", 30))
    assert browser.run("document.getElementById('overlay').style.opacity") == "0.3"
    browser.click("[data-view=heat]")
    browser.wait(f"{PAINTED} === 1")
    browser.click("[data-view=image]")
    browser.wait(f"{PAINTED} === 0")
    browser.run("document.getElementById('picture').focus()")
    browser.key("ArrowLeft", 37)
    assert browser.run("!document.getElementById('cross').hidden")
    assert not [url for url in browser.requests if "/api/" in url] and browser.console == []


def test_downloads_are_of_the_size_of_the_image(toy: Server, browser: Page) -> None:
    browser.open(toy.url)
    browser.give("paste", "body", png(SCENE.image), "scene.png")
    browser.type("#word", "grass, sunflower")
    settled(browser, prompts=2)
    browser.run(
        "HTMLAnchorElement.prototype.click = function () { window.named = this.download; };"
        "URL.createObjectURL = blob => { const reader = new FileReader();"
        " reader.onload = () => { window.data = reader.result; };"
        " reader.readAsDataURL(blob); return 'blob:x'; }; true"
    )
    browser.click("#save-mask")
    data = browser.wait("window.data")
    assert browser.run("window.named") == "scene-mask.png"
    mask = Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2])))
    assert mask.mode == "P" and mask.size == (96, 96) and mask.info["transparency"] == 0
    ids = np.asarray(mask)
    truth = SCENE.labels == toyworld.CLASSES.index("grass")
    assert set(np.unique(ids)) <= {0, 1, 2} and ((ids == 1) == truth).mean() > 0.85
    color = browser.run("getComputedStyle(document.querySelector('#prompts .swatch')).backgroundColor")
    assert mask.getpalette()[3:6] == [int(value) for value in color[4:-1].split(",")]
    browser.run("window.data = null; true")
    browser.click("#save-overlay")
    data = browser.wait("window.data")
    overlay = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB"))
    assert overlay.shape == SCENE.image.shape
    assert np.abs(overlay.astype(int) - SCENE.image)[ids == 0].max() <= 2
    assert np.abs(overlay.astype(int) - SCENE.image)[ids == 1].mean() > 20


def test_an_example_is_marked_and_used(toy: Server, browser: Page) -> None:
    browser.open(toy.url)
    assert browser.run("document.getElementById('examples').hidden")  # the teacher takes none
    choose_model(browser, "prompts")
    browser.wait("document.getElementById('state').dataset.state === 'ready'")
    browser.give("drop", ".stage", png(SCENE.image), "scene.png")
    sent: list[Any] = []
    browser.run(
        "(() => { const real = fetch; window.sent = []; window.fetch = async (path, options) => {"
        " if (path === '/api/segment') { const mask = options.body.get('mask0');"
        " sent.push([options.body.get('request'), mask && mask.size]); }"
        " return real(path, options); }; return true; })()"
    )
    browser.give("drop", "#examples", png(toyworld.scene(2026, 1, 120).image), "my ladybug.png")
    browser.wait("document.getElementById('editor').open")
    x, y = browser.center("#example-mask")
    browser.click("[data-tool=box]")
    browser.drag((x - 40, y - 30), (x, y), (x + 40, y + 20))
    browser.click("#editor .primary")
    settled(browser, prompts=1)
    assert browser.run(ROWS)[0][0] == "my ladybug"
    assert browser.run("document.querySelector('#prompts img').naturalWidth") == 96
    sent = browser.run("window.sent")
    assert '"mask":"mask0"' in sent[-1][0] and sent[-1][1] > 0
    # Cancelled, and without a mark.
    browser.give("drop", "#examples", png(SCENE.image), "x.png")
    browser.wait("document.getElementById('editor').open")
    browser.key("Escape", 27)
    browser.wait("!document.getElementById('editor').open")
    browser.give("drop", "#examples", png(SCENE.image), "whole.png")
    browser.wait("document.getElementById('editor').open")
    browser.click("#editor .primary")
    settled(browser, prompts=2)
    assert '{"image":"example1","name":"whole"}' in browser.run("window.sent.at(-1)[0]")
    # The teacher leaves them out, and says so.
    choose_model(browser, "toy")
    browser.wait(f"{ROWS}.every(([, share]) => share === 'not used')")
    assert browser.console == []


def test_errors_say_what_is_wrong(toy: Server, browser: Page, tmp_path: Path) -> None:
    browser.open(toy.url)
    (tmp_path / "notes.txt").write_text("no image at all")
    browser.choose("#file", tmp_path / "notes.txt")
    told = browser.wait(ALERT)
    assert "notes.txt" in told and "the content is not an image" in told and "Send a JPEG" in told
    assert browser.run("getComputedStyle(document.getElementById('drop')).display") != "none"
    browser.click("#alert-close")
    assert browser.run(ALERT) == ""
    # What the browser cannot show the server makes into something that it can.
    Image.fromarray(SCENE.image).save(tmp_path / "scene.tif")
    browser.choose("#file", tmp_path / "scene.tif")
    browser.wait("document.getElementById('photo').width === 96 && !document.getElementById('view').hidden")
    assert browser.run(ALERT) == ""
    browser.type("#word", "qxjz " * 20)
    assert "tokens" in browser.wait(ALERT)
    browser.click("#prompts .remove")
    browser.type("#word", "grass")
    settled(browser, prompts=1)
    assert browser.run(ALERT) == ""  # it goes when all is well


def test_a_server_that_refuses_and_a_model_that_fails(start: Callable[..., Server], browser: Page) -> None:
    def broken() -> Any:
        raise MaskMillError("weights_missing", "There are no weights.", "Put them there.")

    bad = Entry(ModelInfo(name="bad", kind="clipseg", title="bad"), broken)
    server = start([entry("toy"), bad], Limits(per_minute=1, burst=4, upload_bytes=300_000))
    browser.open(server.url)  # 1: load
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3)).astype(np.uint8)
    browser.give("drop", ".stage", png(noise), "noise.png")
    assert "this server takes 0" in browser.wait(ALERT)
    browser.give("drop", ".stage", png(SCENE.image), "scene.png")
    browser.type("#word", "grass")
    settled(browser, prompts=1)  # 2
    choose_model(browser, "bad")  # 3: load, 4: segment
    assert "There are no weights." in browser.wait(ALERT)
    browser.wait("document.getElementById('state').textContent === 'could not be loaded'")
    choose_model(browser, "toy")
    browser.wait(f"({ALERT}).includes('faster than this server allows')")
    assert browser.run("!document.getElementById('alert-retry').hidden")


def test_a_student_shows_its_own_classes(start: Callable[..., Server], browser: Page, tmp_path: Path) -> None:
    toy_student(tmp_path / "run")
    server = start([entry(f"mine={tmp_path / 'run'}")])
    browser.open(server.url)
    browser.give("drop", ".stage", png(SCENE.image), "scene.png")
    browser.wait(f"{IDLE} && {ROWS}.length > 0")
    names = [name for name, _ in browser.run(ROWS)]
    assert set(names) <= set(toyworld.CLASSES)
    painted = browser.run(PAINTED)
    assert painted > 0.95
    browser.click("#prompts li:first-child .toggle")
    browser.wait(f"{PAINTED} < {painted}")
    browser.click("#suggestions button")
    settled(browser, prompts=1)
    assert browser.console == []


@pytest.mark.parametrize(("width", "dark"), [(390, False), (820, True), (1440, False)])
def test_it_fits_the_screen(toy: Server, browser: Page, width: int, dark: bool, tmp_path: Path) -> None:
    browser.open(toy.url, width=width, dark=dark)
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.run(overflow) <= 0
    browser.give("drop", ".stage", png(toyworld.scene(2026, 0, 700).image), f"{'a long name ' * 9}.png")
    browser.type("#word", "grass, " + "a very long prompt of many letters " * 2)
    settled(browser, prompts=2)
    assert browser.run(overflow) <= 0
    photo, frame = "document.getElementById('photo')", "document.querySelector('.frame')"
    assert browser.run(f"{photo}.clientWidth <= {frame}.clientWidth")
    browser.screenshot(tmp_path / "page.png")
    corner = np.asarray(Image.open(tmp_path / "page.png").convert("L"))[:8, :8].mean()
    assert (corner < 60) == dark


def test_sliders_show_their_values_on_a_phone(toy: Server, browser: Page) -> None:
    browser.open(toy.url, width=390, height=844)
    browser.wait("document.querySelectorAll('.samples img').length > 0")
    browser.click(".samples li:first-child button")
    browser.wait(IDLE)
    for slider, value, text in (("threshold", 40, "0.40"), ("opacity", 25, "25 %")):
        browser.run(
            f"(() => {{ const s = document.getElementById('{slider}'); s.value = {value};"
            " s.dispatchEvent(new Event('input')); return true; })()"
        )
        shown, label, track = browser.run(
            f"['#{slider}-value', 'label:has(#{slider})', '#{slider}'].map(query => (b => "
            "[b.left, b.right, b.width])(document.querySelector(query).getBoundingClientRect()))"
        )
        assert browser.run(f"document.getElementById('{slider}-value').innerText") == text
        assert shown[2] > 20 and label[0] <= shown[0] and shown[1] <= label[1] <= 390
        assert track[1] <= shown[0] and track[2] > 150  # the value is beside the slider, which has room
    assert browser.run("document.documentElement.scrollWidth") <= 390
