"""``maskmill stats``: what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jobs.options import ViewOptions
from jobs.stats import ShowStatistics
from pipeline.files.storage import Storage
from pipeline.table.labels import summarise
from pipeline.table.record import read_table_record, write_table_record
from tests.pipeline.formats.tables import TOYWORLD, toy_table


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, Storage]:
    """A table, and a smaller one of before, of other scenes."""
    folder = tmp_path_factory.mktemp("stats")
    return toy_table(folder / "now", 13), toy_table(folder / "before", 6, size=32)


def files(table: Storage) -> dict[str, bytes]:
    return {name: table.read_bytes(name) for name in table.list(recursive=True)}


def test_figures_for_people(
    tables: tuple[Storage, Storage], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    table, before = tables
    kept = files(table)
    assert ShowStatistics(table=table.uri, against=before.uri).run() == 0
    assert files(table) == kept, "nothing is written"
    told = capsys.readouterr().out
    counts = summarise(table)
    assert f"{table.uri}: 12 labelled images, 1 failed" in told
    assert "1 truncated, such as: the file ends too soon" in told
    largest = max(counts["class_pixels"], key=lambda number: counts["class_pixels"][number])
    share = counts["class_pixels"][largest] / sum(counts["class_pixels"].values())
    row = next(line for line in told.splitlines() if f" {TOYWORLD.names[int(largest)]} " in line)
    assert f"{share:.1%}" in row and f"{counts['class_images'][largest]} (" in row
    absent = TOYWORLD.num_classes - len({*counts["class_pixels"], *summarise(before)["class_pixels"]})
    assert ("other class" in told) == bool(absent)
    assert "In one image most often: " in told and "quality (mean of the classes' confidence): mean" in told
    assert (
        f"Since {before.uri}, 5 labelled images:" in told and "The classes of the labels diverge by" in told
    )
    assert "agreement" not in told


def test_figures_for_programs(tables: tuple[Storage, Storage], capsys: pytest.CaptureFixture[str]) -> None:
    table, before = tables
    assert ShowStatistics(table=table.uri, against=before.uri, json=True).run() == 0
    found = json.loads(capsys.readouterr().out)
    counts = summarise(table)
    assert found["schema_version"] == 1 and found["table"] == table.uri and found["labelled"] == 12
    assert {str(one["id"]): one["pixels"] for one in found["classes"] if one["pixels"]} == counts[
        "class_pixels"
    ]
    drift = found["drift"]
    assert drift["against"] == before.uri and 0 < drift["divergence"] < 1
    assert drift["failed"] == pytest.approx([1 / 6, 1 / 13]) and 0 <= drift["quality_divergence"] <= 1
    moved = {one["name"]: one["after"] - one["before"] for one in drift["classes"]}
    assert sum(moved.values()) == pytest.approx(0) and max(moved.values()) > 0
    # Against itself, nothing has moved.
    assert ShowStatistics(table=table.uri, against=table.uri, json=True).run() == 0
    still = json.loads(capsys.readouterr().out)["drift"]
    assert (still["divergence"], still["quality_divergence"], still["classes"]) == (0, 0, [])


def test_labels_as_a_view_has_them(
    tables: tuple[Storage, Storage], capsys: pytest.CaptureFixture[str]
) -> None:
    table, before = tables
    stuff = tuple(entry.name for entry in TOYWORLD.classes if entry.kind == "stuff")
    seen = ViewOptions(merge=(f"{','.join(stuff)}=ground",), threshold=("0.5",))
    assert ShowStatistics(table=table.uri, against=before.uri, json=True, seen=seen).run() == 0
    found = json.loads(capsys.readouterr().out)
    names = [one["name"] for one in found["classes"]]
    assert "ground" in names and not {*stuff} & {*names}
    assert 0.4 < found["ignored_pixels"] / found["pixels"] < 0.6
    # Both tables are seen so.
    assert all(one["before"] > 0 for one in found["drift"]["classes"] if one["name"] == "ground")


def test_qualities_of_two_kinds_are_not_compared(
    tables: tuple[Storage, Storage], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = toy_table(tmp_path / "older", 6)
    write_table_record(older, read_table_record(older.uri).model_copy(update={"quality": "softmin"}))
    assert ShowStatistics(table=tables[0].uri, against=older.uri).run() == 0
    told = capsys.readouterr().out
    assert "Quality is not compared" in told and "Mean label quality" not in told


def test_a_page(tables: tuple[Storage, Storage], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, before = tables
    page = tmp_path / "page.html"
    assert ShowStatistics(table=table.uri, against=before.uri, page=page, json=True).run() == 0
    told = json.loads(capsys.readouterr().out)
    text = page.read_text()
    shares = dict(re.findall(r"</span>([a-z]+)</td>.*?<td class=\"v\">([\d.]+) %<br>", text))
    moved = {one["name"] for one in told["drift"]["classes"] if one["before"]}
    assert shares == {
        one["name"]: f"{100 * one['pixel_share']:.1f}"
        for one in told["classes"]
        if one["pixels"] or one["name"] in moved
    }
    for line in ("1 truncated, such as: the file ends too soon", f"Since {before.uri}", "In one image"):
        assert line in text
    assert f"Histogram from 0 to 1: {', '.join(map(str, told['quality']['histogram']))}" in text
    assert "<script" not in text and "http:" not in text and "https:" not in text, (
        "it needs nothing but itself"
    )


def test_a_page_of_a_table_without_labels(tmp_path: Path) -> None:
    table = toy_table(tmp_path / "table", 1)  # the last one has failed
    assert ShowStatistics(table=table.uri, page=tmp_path / "page.html").run() == 0
    assert "Quality</h2>" not in (tmp_path / "page.html").read_text()
