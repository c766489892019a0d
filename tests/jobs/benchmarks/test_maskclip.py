from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs.benchmarks import labelled, maskclip
from jobs.benchmarks.tables import Request
from models.errors import MaskMillError
from pipeline.datasets.registry import open_dataset
from pipeline.evaluation.published import load_published
from pipeline.labelling.recipes import RECIPES

SUBSET = Path(__file__).resolve().parents[4] / "shared" / "data" / "voc2012_subset"


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    return Request(folder=tmp_path, console=Console(quiet=True))


def test_without_data_every_row_says_what_it_needs_and_keeps_its_published_figure(request_: Request) -> None:
    sections = list(maskclip.annotation_free(request_))
    assert [section.name for section in sections] == ["context59", "cocostuff171", "voc20"]
    rows = {line.name: line for line in sections[0].rows}
    assert rows["MaskCLIP (ViT-B/16)"].published == {"miou": 0.217}
    assert "--root context59=DIR" in rows["MaskCLIP (ViT-B/16)"].missing
    assert "--labels 'MaskCLIP+ (RN50)@context59=TABLE'" in rows["MaskCLIP+ (RN50)"].missing
    assert not any(line.values for section in sections for line in section.rows)


@pytest.mark.parametrize(
    ("table", "sections", "rows"),
    [("maskclip-zero-shot", 3, 7), ("maskclip-robustness", 2, 1)],
)
def test_every_table_has_its_sections(request_: Request, table: str, sections: int, rows: int) -> None:
    made = list(maskclip.TABLES[table][1](request_))
    assert len(made) == sections
    assert all(len(section.rows) >= rows for section in made)
    assert all(line.missing or line.published for section in made for line in section.rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"roots": {"voc02": "x"}}, "Did you mean voc20"),
        ({"datasets": ["context"]}, "--dataset context"),
        ({"labels": {"MaskCLIP+ (RN5)@voc20": "x"}}, "--labels"),
        ({"weights": {"MaskCLIP (RN50)": "x"}}, "--weights"),
        ({"settings": {"head": "plain"}}, "Possible here: pretrained"),
    ],
)
def test_what_a_table_does_not_know_or_fixes_itself_is_refused(
    request_: Request, change: dict, words: str
) -> None:
    with pytest.raises(MaskMillError, match=re.escape(words)):
        list(maskclip.annotation_free(dataclasses.replace(request_, **change)))


def test_all_levels_of_a_corruption_are_measured_at_the_size_of_the_protocol() -> None:
    recipe = maskclip.seed_recipe("context59", RECIPES["maskclip"])
    assert recipe.images.scale == (520, 520)
    assert maskclip.seed_recipe("context60", recipe).images.scale == (520, 520)


def test_figures_of_a_protocol_stand_in_the_tables_of_that_protocol_only(request_: Request) -> None:
    for name, (_, build) in maskclip.TABLES.items():
        published = [
            value for section in build(request_) for line in section.rows for value in line.published
        ]
        table = name.replace("-", "_")
        known = {"maskclip": "maskclip_annotation_free"}
        figures = list(load_published(known.get(table, table)).figures())
        assert len(published) <= len(figures)


@pytest.mark.long
@pytest.mark.skipif(not SUBSET.is_dir(), reason="the VOC subset is not on this machine (shared/data)")
def test_a_row_is_measured_on_photographs_and_not_measured_twice(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = dataclasses.replace(
        request_,
        roots={"voc20": str(SUBSET)},
        settings={"pretrained": "random:0"},
        rows=["MaskCLIP (ViT-B/16)"],
        datasets=["voc20"],
        limit=3,
    )
    (section,) = maskclip.annotation_free(request)
    rows = {line.name: line for line in section.rows}
    (value,) = rows["MaskCLIP (ViT-B/16)"].values["miou"].runs
    assert 0 <= value < 0.5 and "Random weights" in section.note and "not comparable" in section.note
    record = json.loads((request.folder / "rows/voc20-maskclip-vit-b-16/evaluation.json").read_text())
    assert record["protocol"] == "seed" and record["model"]["recipe"]["images"]["scale"] == [2048, 512]
    assert record["metrics"]["miou"] == pytest.approx(value)
    low, high = labelled.interval_of_images(request, "voc20-maskclip-vit-b-16")
    assert 0 <= low < value < high < 1

    def never(*_: Any) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(labelled, "evaluate", never)
    (again,) = maskclip.annotation_free(request)
    assert again == section
    for change, words in (
        ({"limit": 2}, "other images"),
        ({"settings": {"pretrained": "random:1"}}, "another recipe"),
    ):
        with pytest.raises(MaskMillError, match=words):
            list(maskclip.annotation_free(dataclasses.replace(request, **change)))
    assert len(open_dataset("voc20", root=str(SUBSET)).samples) == 321
