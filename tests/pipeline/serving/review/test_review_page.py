"""The page of a review in headless Chromium: keys, brush, two reviewers, and a server that is gone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.labelling.single import load_labeller
from pipeline.review.desk import open_desk
from pipeline.serving.limits import Limits
from pipeline.serving.review.app import create_review_app
from pipeline.table.labels import decode_mask
from tests.browser import Page
from tests.pipeline.review.reviews import TOYWORLD, make_reviewed, queue_of, row_id
from tests.pipeline.serving.harness import serving

pytestmark = pytest.mark.browser

READY = "document.body?.dataset.ready === 'true'"
LOADED = (
    "document.body.dataset.mode === 'editor' && document.getElementById('waiting').hidden"
    " && document.getElementById('name').textContent === 'scene_00%d_0.png'"
)
UNSAVED = "document.getElementById('counts').dataset.unsaved"


def test_accept_reject_paint_and_save(browser: Page, tmp_path: Path) -> None:
    # The labels of the demo's teacher.
    labeller = load_labeller("toy", TOYWORLD)
    folder = make_reviewed(tmp_path, [0.0] * 4, label=labeller)
    desk, limits = open_desk(queue_of(folder, 4)), Limits(per_minute=0)

    def saved(number: int) -> str:
        found = desk.saves.read(row_id(folder, number))
        return "" if found is None else found.decision

    with serving(create_review_app(desk, limits), limits) as server:
        browser.open(server.url, ready=READY)
        browser.key("Enter", 13, "\r")
        browser.wait(LOADED % 0)
        browser.key("a", 65)
        browser.wait(LOADED % 1)  # the next one comes by itself
        browser.key("r", 82)
        browser.wait(LOADED % 2)
        browser.wait(f"{UNSAVED} === '0'")
        assert (saved(0), saved(1)) == ("accepted", "rejected")

        # Paint a line of the third class, take it back, and paint it again.
        before = desk.labels(desk.row(row_id(folder, 2)))
        browser.key("b", 66)
        browser.key("3", 51)
        x, y = browser.center("#sheet")
        for _ in range(2):
            browser.drag((x - 90, y), (x, y), (x + 90, y))
            browser.wait("!document.getElementById('save').hidden")
            browser.key("z", 90)
            browser.wait("document.getElementById('save').hidden")
        browser.drag((x - 90, y), (x, y), (x + 90, y))
        browser.key("s", 83)
        browser.wait(LOADED % 3)
        browser.wait(f"{UNSAVED} === '0'")
        there = desk.saves.read(row_id(folder, 2))
        assert there is not None and there.decision == "painted" and there.mask is not None
        painted = decode_mask(there.mask)
        assert (painted[24, 20:28] == 2).all() and (painted != before).mean() < 0.5
        np.testing.assert_array_equal(painted[painted != 2], before[painted != 2])
        port = server.port

        # Somebody else has saved what is open here.
        desk.save(row_id(folder, 3), "rejected", None, reviewer="Bob", follows=None)
        browser.key("a", 65)
        browser.wait("document.getElementById('conflict').open")
        assert "Bob" in browser.run("document.getElementById('conflict-text').textContent")
        assert saved(3) == "rejected"
        browser.click("#mine")
        browser.wait(f"{UNSAVED} === '0'")
        assert saved(3) == "accepted"

    # The server is gone: what is painted stays in the browser, also when the page is closed.
    with serving(create_review_app(desk, limits), limits, port) as server:
        browser.open(server.url, width=390, ready=READY)
        # Nothing is wider than a phone.
        right = "[...document.querySelectorAll('#gallery *')].map(e => e.getBoundingClientRect().right)"
        assert max(browser.run(right)) <= 390 - 10
        browser.click("#cards button:first-child")
        browser.wait(LOADED % 0)
        browser.click("[data-tool=fill]")
        browser.click("[data-id='4']")
        browser.click("#sheet")
        browser.wait("!document.getElementById('save').hidden")
    browser.click("#save")
    browser.wait(f"{UNSAVED} === '1'")
    browser.wait("document.getElementById('alert-text').textContent.startsWith('Not saved yet')")
    assert saved(0) == "accepted"
    browser.call("Page.navigate", url="about:blank")
    with serving(create_review_app(desk, limits), limits, port) as server:
        browser.open(server.url, width=390, ready=READY)
        browser.wait(f"{UNSAVED} === '0'")
        assert saved(0) == "painted" and browser.console == []

        # On a phone: accept and reject are buttons for a thumb, and beside each other on the screen.
        for number, button, decision in ((1, "accept", "accepted"), (3, "reject", "rejected")):
            browser.run(f"document.querySelectorAll('#cards button')[{number}].click()")
            browser.wait(LOADED % number)
            left, top, right, bottom = browser.run(
                f"(b => [b.left, b.top, b.right, b.bottom])(document.getElementById('{button}')"
                ".getBoundingClientRect())"
            )
            assert bottom - top >= 44 and right - left >= 88 and left >= 0 and right <= 390
            assert bottom <= browser.run("innerHeight")
            browser.click(f"#{button}")
            browser.wait(f"document.body.dataset.mode === 'gallery' && {UNSAVED} === '0'")
            assert saved(number) == decision
        assert browser.console == []
