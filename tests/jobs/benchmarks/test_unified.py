from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from rich.console import Console

from jobs.benchmark import Benchmark
from jobs.benchmarks import unified
from jobs.benchmarks.labelled import open_limited
from jobs.benchmarks.tables import Request
from models.errors import MaskMillError
from pipeline.datasets.protocols import PROTOCOLS
from pipeline.evaluation.published import load_published
from pipeline.labelling.recipes import load_recipe

SUBSET = Path(__file__).resolve().parents[4] / "shared" / "data" / "voc2012_subset"


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    return Request(folder=tmp_path, console=Console(quiet=True))


def test_each_section_has_the_figures_of_its_protocol_alone(request_: Request) -> None:
    both = dataclasses.replace(request_, protocols=("unified", "seed"))
    sections = {section.name: section for section in unified.unified(both)}
    assert set(sections) == {f"{name}-{key}" for name, known in PROTOCOLS.items() for key in known} | {"mean"}
    known = {
        protocol: {
            figure.value
            for name in tables
            for figure in load_published(name).figures()
            if figure.metric == "miou"
        }
        for protocol, tables in (
            ("unified", ("unified_eight_sets", "unified_repositories")),
            ("seed", ("maskclip_annotation_free",)),
        )
    }
    for name, section in sections.items():
        protocol = "seed" if name.endswith("-seed") else "unified"
        figures = {round(100 * share, 4) for line in section.rows for share in line.published.values()}
        assert figures <= known[protocol], name
    rows = {line.name: line for line in sections["voc20-unified"].rows}
    assert rows["SC-CLIP (ViT-B/16)"].published == {"miou": 0.843}
    assert "--root voc20=DIR" in rows["NACLIP + PAMR (ViT-B/16)"].missing
    assert rows["Trident (ViT-B/16)"].missing is None and rows["Trident (ViT-B/16)"].published
    means = {line.name: line for line in sections["mean"].rows}
    assert means["MaskCLIP (ViT-B/16)"].published == {"miou": 0.303}
    assert not any(line.values for section in sections.values() for line in section.rows)


def test_a_recipe_is_a_row_of_ours(request_: Request) -> None:
    settings = {"refine": "tlp"}
    recipe = load_recipe("unified-sc", ["refine=tlp"])
    asked = dataclasses.replace(request_, recipe=recipe, settings=settings, datasets=["voc20"])
    (section,) = unified.unified(asked)
    assert section.rows[0].name == "ours: unified-sc refine=tlp"
    assert "--root" in section.rows[0].missing
    assert [line.missing for line in section.rows[1:] if line.missing] == ["not asked for"] * 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"datasets": ["voc"]}, "Did you mean"),
        ({"settings": {"head": "sc"}}, "Possible here: pretrained"),
        ({"rows": ["SegFormer"]}, "no row has this"),
        ({"recipe": load_recipe("unified-sc", []), "rows": ["SC-CLIP"]}, "--row chooses"),
        (
            {"recipe": load_recipe("unified-sc", ["temperature=50"]), "settings": {"temperature": 50}},
            "the protocol unified fixes maskclip.temperature",
        ),
    ],
)
def test_what_the_protocol_fixes_is_refused_at_once(request_: Request, change: dict, words: str) -> None:
    with pytest.raises(MaskMillError, match=re.escape(words)):
        unified.unified(dataclasses.replace(request_, **change))


@pytest.mark.parametrize("options", [{"recipe": "toy"}, {"protocol": "seed"}, {"quick": True}])
def test_other_tables_have_fixed_rows(tmp_path: Path, options: dict) -> None:
    with pytest.raises(MaskMillError, match="are fixed"):
        Benchmark(name="maskclip", output=str(tmp_path / "out"), **options).run(Console(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not SUBSET.exists(), reason="needs the photographs in shared/data")
def test_a_sample_is_drawn_from_all_images_and_is_the_same_each_time(request_: Request) -> None:
    asked = dataclasses.replace(request_, roots={"voc20": str(SUBSET)}, limit=20)
    first, _ = open_limited("voc20", asked)
    drawn, _ = open_limited("voc20", asked, draw=True)
    again, _ = open_limited("voc20", asked, draw=True)
    whole, _ = open_limited("voc20", dataclasses.replace(asked, limit=0), draw=True)
    names = [sample.name for sample in whole.samples]
    places = [names.index(sample.name) for sample in drawn.samples]
    assert [sample.name for sample in first.samples] == names[:20]
    assert drawn.fingerprint() == again.fingerprint()
    assert places == sorted(places) and len(set(places)) == 20 and places[-1] > 200


@pytest.mark.long
@pytest.mark.skipif(not SUBSET.exists(), reason="needs the photographs in shared/data")
def test_a_quick_run_draws_images_and_says_how_sure_it_is(request_: Request) -> None:
    settings = {"model": "toyclip", "pretrained": "bundled"}
    recipe = load_recipe("unified-maskclip", [f"{key}={value}" for key, value in settings.items()])
    asked = dataclasses.replace(
        request_,
        roots={"voc20": str(SUBSET)},
        recipe=recipe,
        settings=settings,
        limit=3,
        quick=True,
    )
    (section,) = unified.unified(asked)
    assert section.name == "voc20-unified"
    value = section.rows[0].values["miou"]
    assert value.low <= value.mean <= value.high
    assert "interval" in section.note
