from __future__ import annotations

import dataclasses
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from pipeline.report.retraining_page import (
    Check,
    ClassBars,
    Event,
    Judged,
    LabelShare,
    RetrainingPage,
    retraining_page,
)
from pipeline.report.training_page import Card
from tests.browser import Page

ODD = "<b>猫 & 'dog'</b>"
PICTURE = np.full((40, 40, 3), 90, np.uint8)
JUDGED = Judged(
    name="pets",
    kind="a student",
    promoted=False,
    version="8",
    champion="7",
    has_truth=True,
    images=1234,
    candidate_miou=0.512,
    champion_miou=0.498,
    gain=0.014,
    low=-0.02,
    high=0.05,
    confidence=0.95,
    delta=0.005,
    checks=[
        Check("gain", True, "It gains."),
        Check("interval", False, f"The interval of {ODD} reaches too low."),
        Check("latency", None, "Nobody has measured it."),
    ],
    classes=[ClassBars(ODD, "#102030", 0.5, 0.625), ClassBars("cow", "#405060", None, None)],
    cards=[
        Card(f"{ODD}.jpg", [(name, PICTURE) for name in ("image", "truth", "champion", "candidate")])
        for _ in range(2)
    ],
    history=[
        Event("2026-05-02 10:00:00", "refused", "8", "0008", 0.512, ODD),
        Event("2026-05-01 10:00:00", "promoted", "7", "0007", 0.498, "", now=True),
    ],
)
PAGE = RetrainingPage(
    title=f"{ODD}, tick 8",
    place="s3://bucket/pets/runs/0008",
    toy=False,
    tiles=[("new images", "1,000")],
    models=[JUDGED],
    labels=[LabelShare(ODD, "#102030", 0.25, 0.5), LabelShare("cow", "#405060", 0.75, 0.5)],
    labels_note="They diverge.",
    steps=[("label", "3 s", 2)],
    commands={"Go back": "maskmill rollback 'a b'"},
    alone=[("label", "maskmill label --images 'a b'")],
)


def text_of(page: RetrainingPage) -> str:
    html = re.sub(r"<style>.*?</style>", "", retraining_page(page), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_the_verdict_comes_first_with_what_failed() -> None:
    said = text_of(PAGE)
    assert re.search(r"Refused pets version 8, a student, against champion version 7 The interval of", said)
    assert "candidate, mean IoU 51.2 %" in said and "champion, version 7 49.8 %" in said
    assert "gain in points, 95 % interval +1.4 -2.0 to +5.0" in said
    assert "passed gain It gains." in said and "not judged latency Nobody has measured it." in said
    assert "62.5 → 50.0 -12.5" in said and "– → –" in said
    assert "25.0 → 50.0" in said and "maskmill rollback 'a b'" in said
    assert "Measured on 1,234 images with true masks" in said


def test_names_are_escaped_and_nothing_is_fetched() -> None:
    html = retraining_page(PAGE)
    assert "<b>猫" not in html and "&lt;b&gt;猫" in html
    assert "default-src 'none'" in html
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert html.count('<img src="data:image/') == 8


def test_without_a_champion_there_is_nothing_to_compare_with() -> None:
    first = dataclasses.replace(
        JUDGED,
        promoted=True,
        champion=None,
        champion_miou=None,
        gain=None,
        low=None,
        high=None,
        has_truth=False,
        checks=[Check("gain", None, "There is no champion.")],
        classes=[ClassBars("cow", "#405060", 0.5, None)],
    )
    labels = [LabelShare("cow", "#405060", None, 1.0)]
    said = text_of(dataclasses.replace(PAGE, models=[first], labels=labels, toy=True))
    assert "Promoted pets version 8, a student: there was no champion" in said
    assert "candidate, agreement with the teacher" in said and "agreement, not truth" in said
    assert "interval" not in said and "→" not in said and "a toy" in said


@pytest.mark.parametrize(
    ("low", "gain", "high"), [(-0.02, 0.014, 0.05), (0.1, 0.2, 0.3), (-0.3, -0.2, -0.1), (0.0, 0.0, 0.0)]
)
def test_the_interval_is_drawn_where_it_lies(low: float, gain: float, high: float) -> None:
    model = dataclasses.replace(JUDGED, low=low, gain=gain, high=high)
    html = retraining_page(dataclasses.replace(PAGE, models=[model]))
    line = re.search(r'<div class="line".*?</div>', html, re.DOTALL)
    assert line is not None
    found = [float(number) for number in re.findall(r"(?:left|width):(-?[\d.]+)%", line[0])]
    zero, bound, left, width, dot = found
    assert 0 < bound < zero < 100 and 0 < left <= dot <= left + width + 0.02 and left + width < 100
    # Distances on the line are those of the figures.
    points = {0.0: zero, -JUDGED.delta: bound, low: left, high: left + width, gain: dot}
    farthest = max(points, key=abs)
    for value, place in points.items():
        assert (place - zero) == pytest.approx((points[farthest] - zero) * value / farthest, abs=0.05)


def test_several_models_are_told_apart() -> None:
    other = dataclasses.replace(JUDGED, name="finder", promoted=True)
    said = text_of(dataclasses.replace(PAGE, models=[JUDGED, other]))
    assert "Why (pets)" in said and "Why (finder)" in said and "Champions of finder" in said


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1440])
def test_it_fits_a_telephone_and_a_screen(browser: Page, tmp_path: Path, width: int) -> None:
    file = tmp_path / "report.html"
    file.write_text(retraining_page(PAGE))
    browser.open(file.as_uri(), width=width, ready="document.readyState === 'complete'")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("getComputedStyle(document.querySelector('.said')).fontSize") >= "30px"
    columns = browser.run("getComputedStyle(document.querySelector('.example .row')).gridTemplateColumns")
    assert len(columns.split()) == (2 if width == 390 else 4)
